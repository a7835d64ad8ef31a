"""What the README names exists: commands, flags, rows of tables, paths."""

import ast
import dataclasses
import importlib.util
import pathlib
import re
import shlex

from absl.testing import absltest, parameterized

from bertjax import config, experiment, hardware, stopping
from bertjax.analysis import ANALYSES
from bertjax.data.beam import __main__ as beam
from bertjax.data.instances import INSTANCES
from bertjax.data.masking import UNITS
from bertjax.data.shapes.sources import SHAPE_SOURCES
from bertjax.data.sources import (
  FILTERS,
  PREPROCESSORS,
  SCORERS,
  SOURCES,
  SPLITS,
)
from bertjax.data.tokenizers import TOKENIZERS, TRAINERS
from bertjax.evals import EVALUATORS
from bertjax.layers.attention import ATTENTION
from bertjax.models import MODELS
from bertjax.objectives import OBJECTIVES
from bertjax.optim import OPTIMIZERS, PRECONDITIONERS, schedules
from bertjax.predict import __main__ as predict
from bertjax.tasks import READERS, TASKS
from tests.configs_test import _load

_ROOT = pathlib.Path(__file__).parents[1]
_TEXT = (_ROOT / "README.md").read_text("utf-8").replace(r"\|", "|")
_COMMANDS = [
  shlex.split(line.removeprefix("python -m "), comments=True)
  for line in _TEXT.splitlines()
  if line.startswith("python -m bertjax.")
]
# What the documents plan for, or rent.
_ON_PODS = [
  words
  for name in ("README.md", "gcp/README.md")
  for line in (_ROOT / name).read_text("utf-8").replace("\\\n", "").splitlines()
  if "--topology=" in line and "--config=" in line
  for words in [shlex.split(line.partition("&&")[0], comments=True)[3:]]
]
_SPANS = re.findall(r"`([^`\n]+)`", _TEXT)
_TABLES = {
  "MODELS": MODELS,
  "OBJECTIVES": OBJECTIVES,
  "OPTIMIZERS": OPTIMIZERS,
  "PRECONDITIONERS": PRECONDITIONERS,
  "SCHEDULES": schedules.SCHEDULES,
  "STOP_RULES": stopping.STOP_RULES,
  "DATA": experiment.DATA,
  "SOURCES": SOURCES,
  "SHAPE_SOURCES": SHAPE_SOURCES,
  "PREPROCESSORS": PREPROCESSORS,
  "FILTERS": FILTERS,
  "SCORERS": SCORERS,
  "SPLITS": SPLITS,
  "TOKENIZERS": TOKENIZERS,
  "INSTANCES": INSTANCES,
  "TASKS": TASKS,
  "EVALUATORS": EVALUATORS,
}
# What may stand for `name` in `field = dict(name=...)`; a source inside of a
# task is one of its readers.
_NAMED = {
  "data": experiment.DATA,
  "data.instances": INSTANCES,
  "data.source": SOURCES,
  "data.tokenizer": TOKENIZERS,
  "evals.replicas": EVALUATORS,
  "optim": OPTIMIZERS,
  "optim.precondition": PRECONDITIONERS,
  "source": READERS,
  "split": SPLITS,
  "task": TASKS,
}
_CHOICES = {"attend": ATTENTION, "kind": TRAINERS, "unit": dict.fromkeys(UNITS)}
_ALTERNATIVES = r'("\w+"(?: \| "\w+")*)'


def _flags(module: str) -> set[str]:
  """Names of the flags that a command's source defines."""
  found = set()
  path = pathlib.Path(importlib.util.find_spec(module).origin)
  if path.name == "__init__.py":
    path = path.with_name("__main__.py")
  for node in ast.walk(ast.parse(path.read_text("utf-8"))):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
      if node.func.attr.startswith("DEFINE"):
        # What parses it may stand before the name.
        names = [x.value for x in node.args if isinstance(x, ast.Constant)]
        found.add(names[0])
      elif node.func.attr == "define_config":
        found.add("config")
  return found


def _names(alternatives: str) -> list[str]:
  return re.findall(r'"(\w+)"', alternatives)


class CommandsTest(parameterized.TestCase):
  def test_there_are_commands(self):
    modules = {module for module, *_ in _COMMANDS}
    self.assertContainsSubset(
      {f"bertjax.{name}" for name in ("train", "evaluate", "predict", "plan")},
      modules,
    )

  @parameterized.parameters(*_COMMANDS)
  def test_module_flags_and_config_exist(self, module, *arguments):
    known = _flags(module)
    fields = {field.name for field in dataclasses.fields(config.Settings)}
    for argument in arguments:
      name, _, value = argument.removeprefix("--").partition("=")
      if module == "bertjax.report":
        self.assertStartsWith(argument, "runs/")
      elif not argument.startswith("--"):
        self.assertIn(name, {*predict.TASKS, *ANALYSES, *beam.COMMANDS})
      elif name.startswith("config."):
        self.assertIn("config", known)
        self.assertIn(name.split(".")[1], fields)
      else:
        self.assertIn(name, known)
      if name == "config":
        path, _, variant = value.partition(":")
        self.assertNotEmpty(config.stage_configs(_load(_ROOT / path, variant)))
      if name == "topology":
        hardware.parse(value)


class PodsTest(parameterized.TestCase):
  @parameterized.parameters(*_ON_PODS)
  def test_batches_divide_over_the_chips(self, *arguments):
    given = dict(x[2:].split("=", 1) for x in arguments if "=" in x)
    path, _, variant = given["config"].partition(":")
    tried = dict(x.split("=") for x in given.get("sweep", "").split())
    shards = hardware.parse(given["topology"]).num_devices
    for stage in config.stage_configs(_load(_ROOT / path, variant)).values():
      parts = tried.get("microbatches", str(stage.get("microbatches", 1)))
      for part in parts.split(","):
        self.assertEqual(stage["data"]["batch_size"] % (int(part) * shards), 0)


class NamesTest(absltest.TestCase):
  def test_names_of_parts_are_in_their_tables(self):
    found = re.findall(rf"([\w.]+) ?= ?dict\(name={_ALTERNATIVES}", _TEXT)
    self.assertEqual(set(_NAMED), {field for field, _ in found})
    for field, alternatives in found:
      for name in _names(alternatives):
        self.assertIn(name, _NAMED[field], field)

  def test_options_of_parts_are_in_their_tables(self):
    for field, table in _CHOICES.items():
      found = re.findall(rf"\b{field} ?= ?{_ALTERNATIVES}", _TEXT)
      self.assertNotEmpty(found, field)
      for name in _names(" ".join(found)):
        self.assertIn(name, table, field)

  def test_the_further_sources_are_sources(self):
    [line] = [x for x in _SPANS if re.fullmatch(r"jsonl( \w+)+", x)]
    self.assertContainsSubset(line.split(), SOURCES)

  def test_tables_and_paths_exist(self):
    named = [span for span in _SPANS if span in _TABLES or span.isupper()]
    named = [span for span in named if not span.startswith((".", "["))]
    self.assertContainsSubset(named, _TABLES)
    self.assertLen(set(named), len(_TABLES))
    kept = re.compile(r"(configs|experiments|tests)/\w")
    paths = [span for span in _SPANS if kept.match(span)]
    self.assertNotEmpty(paths)
    for path in paths:
      self.assertTrue((_ROOT / path).exists(), path)


if __name__ == "__main__":
  absltest.main()
