r"""Plans a run on hardware that nobody here has: does it fit, how fast is it.

  python -m bertjax.plan --config=configs/bert.py:base --topology=v5e:4x4
  python -m bertjax.plan --config=... --topology=2xv5e:16x16 --json=plan.json
  python -m bertjax.plan --config=configs/fine_tune.py:mnli --topology=v5e:2x2 \
      --config.model.name=bert --config.model.size=base --vocab_size=30522 \
      --rows_per_epoch=392702

Compiles the config's own training step with the accelerator's compiler, which
needs no accelerator: minutes for a large model, nothing is downloaded or read.
Times are estimates from the compiled program; `bertjax.hardware` says how, and
what they leave out. A config with stages gets a page for each. How many steps
`stop.epochs` are only the data know, or `--rows_per_epoch`.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from bertjax import cli, hardware
from bertjax.config import Settings, settings, stage_configs
from bertjax.data.abstract import steps_of
from bertjax.planning import advice, page
from bertjax.planning.outcome import Plan
from bertjax.planning.step import lower_step
from bertjax.registry import lookup


def plan(
  stage: Settings,
  topology: str | hardware.Topology,
  *,
  steps: int | None = None,
  vocab_size: int | None = None,
) -> Plan:
  """Compiles a stage's training step and reads what it costs.

  Args:
    stage: the checked config, without stages.
    topology: what to compile for, as "v5e:4x4".
    steps: that the stage takes; by default `stop.steps`; 0: unknown.
    vocab_size: of the tokenizer, if the config does not tell.

  Raises:
    ValueError: unknown topology, or a config that does not fit it.
    CompilerMissing: the compiler is not installed.
  """
  if isinstance(topology, str):
    topology = hardware.parse(topology)
  steps = stage.stop.get("steps", 0) if steps is None else steps
  try:
    program = hardware.compile_for(
      topology, lower_step, settings=stage, vocab_size=vocab_size
    )
  except hardware.OutOfMemory as err:
    suggestion = advice.suggest(stage, topology, err, vocab_size)
    return Plan(topology, err.info, steps, err.needed, suggestion=suggestion)
  on_tpu = topology.chip.platform == "tpu"
  return Plan(
    topology=topology,
    facts=program.info,
    steps=steps,
    needed_bytes=program.memory.total,
    memory=program.memory,
    collectives=tuple(hardware.read_collectives(program.module)),
    cost=hardware.price(program) if on_tpu else None,
    kernels=tuple(program.kernels),
  )


def stages(
  config: Any, rows_per_epoch: int | None = None
) -> Iterator[tuple[str, Settings, int]]:
  """Name, settings and number of own steps of each stage of a config.

  Args:
    config: a ConfigDict or mapping.
    rows_per_epoch: of the training split, for stages that count epochs.
  """
  done = 0
  for name, fields in stage_configs(config).items():
    stage = settings(fields)
    steps = stage.stop.get("steps") or 0
    if (epochs := stage.stop.get("epochs")) and rows_per_epoch:
      size = stage.data.get("batch_size", 1)
      taken = steps_of(epochs, rows_per_epoch, size)
      steps = min(steps or taken, taken)
    # A stage that continues the optimizer continues to count, too.
    continues = (stage.init_from or {}).get("carry") == "optimizer"
    yield name, stage, steps - done if continues else steps
    done = steps


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
  given = flags.FLAGS
  if not given["config"].present or given.topology is None:
    raise app.UsageError("--config and --topology are required.")
  cli.quiet()
  figures = {}
  with cli.clear_errors():
    if given.json != "-":
      cli.check_output("json", given.json)
    found = stages(cli.config(), given.rows_per_epoch)
    chosen = {name: rest for name, *rest in found}
    if given.stage is not None:
      chosen = {given.stage: lookup(chosen, given.stage, "stage")}
    for name, (stage, steps) in chosen.items():
      print(f"Compiling {name} for {given.topology}...", file=sys.stderr)
      made = plan(
        stage, given.topology, steps=steps, vocab_size=given.vocab_size
      )
      figures[name] = page.figures(made)
      if given.json != "-":
        print(page.render(made, name))
  text = json.dumps(figures, indent=2)
  if given.json == "-":
    print(text)
  elif given.json is not None:
    pathlib.Path(given.json).write_text(text + "\n")


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
  flags.DEFINE_string("json", None, "File for all figures; - prints them.")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
