"""The notebooks of `colab/`: they are as committed ones should be, and run."""

import ast
import importlib
import inspect
import os
import pathlib
from unittest import mock

import nbclient
import nbformat
import pytest
from absl.testing import absltest, parameterized

from tests import optimized

_ROOT = pathlib.Path(__file__).parents[1]
_NOTEBOOKS = {p.stem: p for p in (_ROOT / "colab").glob("*.ipynb")}
# What a run of seconds sets; the others are as a user finds them.
_SMALL = {
  "quickstart": dict(VARIANT="tiny"),
  "fine_tune": dict(EPOCHS=1),
  "plan_a_pod": dict(SIZE="tiny"),
}


def _cells(notebook, *, tag=None):
  cells = [c for c in notebook.cells if c.cell_type == "code"]
  if tag is None:
    return [c for c in cells if not c.metadata.get("tags")]
  return [c for c in cells if tag in c.metadata.get("tags", [])]


def _calls(tree: ast.Module):
  """Every call of something imported: what is called, and the call."""
  known = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      module = importlib.import_module(node.module)
      for alias in node.names:
        if not hasattr(module, alias.name):
          importlib.import_module(f"{node.module}.{alias.name}")
        known[alias.asname or alias.name] = getattr(module, alias.name)
    elif isinstance(node, ast.Import):
      for alias in node.names:
        importlib.import_module(alias.name)
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call):
      continue
    names = ast.unparse(node.func).split(".")
    if names[0] in known:
      called = known[names[0]]
      for name in names[1:]:
        called = getattr(called, name)
      yield called, node


class NotebooksTest(parameterized.TestCase):
  def test_there_are_some(self):
    self.assertEqual(set(_NOTEBOOKS), set(_SMALL))

  @parameterized.parameters(*_SMALL)
  def test_it_is_valid_and_holds_no_output(self, name):
    notebook = nbformat.read(_NOTEBOOKS[name], as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
      if cell.cell_type == "code":
        self.assertEqual((cell.outputs, cell.execution_count), ([], None))

  def test_all_are_set_up_alike(self):
    setups = set()
    for path in _NOTEBOOKS.values():
      [cell] = _cells(nbformat.read(path, as_version=4), tag="setup")
      setups.add(cell.source.replace("[tpu]", ""))
    self.assertLen(setups, 1)

  @parameterized.parameters(*_SMALL)
  def test_what_it_imports_exists_and_takes_what_it_is_given(self, name):
    cells = _cells(nbformat.read(_NOTEBOOKS[name], as_version=4))
    tree = ast.parse("\n".join(cell.source for cell in cells))
    calls = [*_calls(tree)]
    self.assertNotEmpty(calls)
    for called, node in calls:
      keywords = {word.arg: None for word in node.keywords}
      inspect.signature(called).bind(*node.args, **keywords)

  @parameterized.parameters(*_SMALL)
  @pytest.mark.slow
  def test_it_runs(self, name):
    notebook = nbformat.read(_NOTEBOOKS[name], as_version=4)
    [given] = _cells(notebook, tag="parameters")
    temporary = pathlib.Path(self.create_tempdir())
    small = dict(_SMALL[name])
    if "WORKDIR" in given.source:
      small["WORKDIR"] = str(temporary / "run")
    for key, value in small.items():
      self.assertIn(f"{key} = ", given.source)
      given.source += f"\n{key} = {value!r}"
    folder = str(_ROOT / "colab")
    with mock.patch.dict(os.environ, optimized.environment(), clear=True):
      os.environ["JAX_PLATFORMS"] = "cpu"
      os.environ["BERTJAX_CACHE"] = str(temporary / "cache")
      client = nbclient.NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": folder}}
      )
      client.execute()
    *_, last = _cells(notebook)
    self.assertNotEmpty(last.outputs)


if __name__ == "__main__":
  absltest.main()
