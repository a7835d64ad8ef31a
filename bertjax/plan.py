r"""Plans a run on hardware that nobody here has: does it fit, how fast is it.

  python -m bertjax.plan --config=configs/bert.py:base --topology=v5e:4x4 \
      --vocab_size=30522
  python -m bertjax.plan --config=... --topology=2xv5e:16x16 --json=plan.json
  python -m bertjax.plan --config=configs/fine_tune.py:mnli --topology=v5e:2x2 \
      --config.model.name=bert --config.model.size=base --vocab_size=30522 \
      --rows_per_epoch=392702
  python -m bertjax.plan --config=... --topology=v5e:4x4 \
      --sweep="mesh.fsdp=1,4 microbatches=1,2,4"

Compiles the config's own training step with the accelerator's compiler, which
needs no accelerator: minutes for a large model, nothing is downloaded or read
but the files of data.name="static", whose rows say how long they are.
Times are estimates from the compiled program; `bertjax.hardware` says how, and
what they leave out. A config with stages gets a page for each, or a table with
`--sweep`, whose values count for that stage, whatever it says itself. How many
steps `stop.epochs` are only the data know, or `--rows_per_epoch`.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from absl import app, flags

from bertjax import cli, hardware, records
from bertjax.config import Settings, plain, settings, stage_configs
from bertjax.data.abstract import steps_of
from bertjax.planning import (
  activations,
  advice,
  handed_down,
  page,
  pods,
  sweep,
)
from bertjax.planning.outcome import Plan
from bertjax.planning.step import lower_step
from bertjax.registry import lookup


def plan(
  stage: Settings,
  topology: str | hardware.Topology,
  *,
  steps: int | None = None,
  vocab_size: int | None = None,
  suggest: bool = True,
) -> Plan:
  """Compiles a stage's training step and reads what it costs.

  Args:
    stage: the checked config, without stages.
    topology: what to compile for, as "v5e:4x4".
    steps: that the stage takes; by default `stop.steps`; 0: unknown.
    vocab_size: of the tokenizer, if the config does not tell.
    suggest: whether to look for what would fit, if this does not.

  Raises:
    ValueError: unknown topology, one that no pod holds, or a config that does
      not fit it.
    CompilerMissing: the compiler is not installed.
    CompilerEnded: the compiler came to no result.
  """
  if isinstance(topology, str):
    topology = hardware.parse(topology)
  pods.check(topology)
  steps = stage.stop.get("steps", 0) if steps is None else steps
  try:
    program = hardware.compile_for(
      topology, lower_step, settings=stage, vocab_size=vocab_size
    )
  except hardware.OutOfMemory as err:
    found = Plan(
      topology, err.info, steps, err.needed, available_bytes=err.available
    )
    if not suggest:
      return found
    suggestion = advice.suggest(stage, topology, err, vocab_size)
    return dataclasses.replace(found, suggestion=suggestion)
  module, on_tpu = program.module, topology.chip.platform == "tpu"
  cost = hardware.price_module(module, program.schedules, topology.chip)
  return Plan(
    topology=topology,
    facts=program.info,
    steps=steps,
    needed_bytes=program.memory.total,
    memory=program.memory,
    activation_bytes=activations.kept_bytes(module),
    collectives=tuple(hardware.read_collectives(module)),
    cost=cost if on_tpu else None,
    traffic=None if on_tpu else cost,
    kernels=tuple(program.kernels),
  )


def stages(
  config: Any, rows_per_epoch: int | None = None
) -> Iterator[tuple[str, Settings, int]]:
  """Name, settings and number of own steps of each stage of a config.

  The number is 0 where only the data know it. What a stage would find in the
  workdir of the one before is filled in.

  Args:
    config: a ConfigDict or mapping.
    rows_per_epoch: of the training split, for stages that count epochs.
  """
  done, stage = 0, None
  for name, fields in stage_configs(config).items():
    stage = handed_down.continued(settings(fields), stage)
    steps = stage.stop.get("steps") or 0
    if (epochs := stage.stop.get("epochs")) and rows_per_epoch:
      size = stage.data.get("batch_size", 1)
      taken = steps_of(epochs, rows_per_epoch, size)
      steps = min(steps or taken, taken)
    # A stage that continues the schedule continues to count, too.
    continues = not (stage.init_from or {}).get("reset_schedule", True)
    before = done if continues else 0
    unknown = not steps or before is None
    yield name, stage, 0 if unknown else max(0, steps - before)
    done = steps or None


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
  given = flags.FLAGS
  if not given["config"].present or given.topology is None:
    raise app.UsageError("--config and --topology are required.")
  cli.quiet()
  with cli.clear_errors():
    answer(plain(cli.config()), given)


def answer(config: Mapping[str, Any], given: Any) -> None:
  """Prints the pages or tables of a config's stages, and writes their figures.

  The file is written after each stage, so that it outlives a failure of the
  next.

  Args:
    config: plain values.
    given: the flags of this command, as attributes.

  Raises:
    ValueError: unknown topology or stage, a config that does not fit it, or a
      file that cannot be written.
    CompilerMissing: the compiler is not installed.
  """
  path = None
  if given.json not in (None, "-"):
    cli.check_output("json", given.json)
    path = pathlib.Path(given.json)
    if path.exists() and not path.is_file():
      raise ValueError(
        f"--json={path} is a device or pipe, which cannot be replaced; --json=-"
        " prints the figures."
      )
    path = path.resolve()  # not the link
  pods.check(hardware.parse(given.topology))  # before anything compiles
  make = _pages if given.sweep is None else _tables
  figures = {}
  for name, page_text, found in make(config, given):
    figures[name or "plan"] = found
    if given.json != "-":
      print(page_text)
    if path is not None:
      records.write_json(path, figures)
  if given.json == "-":
    print(json.dumps(figures, indent=2))


# Of a stage: its name, what to print and what --json says.
_Answer = tuple[str, str, Any]


def _pages(config: Any, given: Any) -> Iterator[_Answer]:
  for name in _chosen(config, given):
    made = _planned(config, name, given)
    yield name, page.render(made, name), page.figures(made)


def _tables(config: Any, given: Any) -> Iterator[_Answer]:
  tried = sweep.axes(given.sweep)
  count = math.prod(map(len, tried.values()))
  for name in _chosen(config, given):

    def made(stage, name=name):
      changed = stage
      if name:
        changed = {**config, "stages": {**config["stages"], name: stage}}
      return _planned(changed, name, given, suggest=False)

    trials = []
    for trial in sweep.trials(stage_configs(config)[name], tried, made):
      trials.append(trial)
      print(f"{len(trials)} of {count}: {trial}", file=sys.stderr)
    figures = sweep.figures(trials, page.figures)
    yield name, sweep.render(trials, name), figures


def _chosen(config: Any, given: Any) -> list[str]:
  names = {name: name for name in stage_configs(config)}
  if given.stage is None:
    return list(names)
  if "" in names:
    raise ValueError(f"stage={given.stage!r}: the config has no stages.")
  return [lookup(names, given.stage, "stage")]


def _planned(config: Any, name: str, given: Any, **options: Any) -> Plan:
  found = {key: rest for key, *rest in stages(config, given.rows_per_epoch)}
  stage, steps = found[name]
  what = name or "the training step"
  print(f"Compiling {what} for {given.topology}...", file=sys.stderr)
  return plan(
    stage, given.topology, steps=steps, vocab_size=given.vocab_size, **options
  )


def _define_flags() -> None:
  """Not on import: `bertjax.train` has a --config as well."""
  cli.define_config()
  flags.DEFINE_string(
    "topology", None, "What to plan for, as v5e:4x4, 2xv5e:16x16 or h100:8."
  )
  flags.DEFINE_string("stage", None, "Only this stage of the config.")
  flags.DEFINE_integer(
    "vocab_size", None, "Size of a tokenizer that is not here.", lower_bound=1
  )
  flags.DEFINE_integer(
    "rows_per_epoch", None, "Examples to train on.", lower_bound=1
  )
  flags.DEFINE_string(
    "sweep", None, 'Values to try, as "mesh.fsdp=1,4 microbatches=1,2".'
  )
  flags.DEFINE(cli.PATH, "json", None, "File for all figures; - prints them.")


if __name__ == "__main__":
  _define_flags()
  cli.run(main, flags_parser=cli.parse_flags)
