"""What each measure brings to BERT's training step on a TPU v5e, on paper.

  python -m experiments.training_step.run [--workdir DIR] [--variant tiny]

Every row is a whole training step, compiled by the TPU's own compiler and
priced from the compiled program; nothing runs on a TPU.
"""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

from bertjax.registry import lookup
from experiments import command
from experiments.measurements import LIBRARY, Measurements, fingerprint
from experiments.outcome import Outcome
from experiments.training_step import findings, measure, step

# What a step is made of; a change there is another step.
SOURCES = (*LIBRARY, measure.__file__, step.__file__)


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much a variant measures.

  Attributes:
    base: variant, batch_size and seq_len of the waterfall's step.
    rungs: measures taken one after the other; the others are in all rows.
      (): one row, with all of them.
    loops: further steps, whose scan runs so many layers an iteration.
    shapes: further steps, with all measures.
    instances: ways to make rows whose fill is measured.
    rows: of each, to look at.
  """

  base: dict[str, Any]
  rungs: tuple[str, ...]
  loops: tuple[int, ...]
  shapes: tuple[dict[str, Any], ...]
  instances: tuple[str, ...]
  rows: int


def _shape(variant: str, batch_size: int, seq_len: int) -> dict[str, Any]:
  return dict(variant=variant, batch_size=batch_size, seq_len=seq_len)


SCALES = {
  command.FULL: Scale(
    base=_shape("large", 8, 512),
    rungs=tuple(step.MEASURES),
    loops=(4,),
    shapes=(
      _shape("large", 32, 512),
      _shape("large", 64, 128),
      _shape("base", 8, 512),
      _shape("base", 32, 512),
      _shape("base", 64, 512),
      _shape("base", 64, 128),
    ),
    instances=("nsp", "packed"),
    rows=512,
  ),
  "tiny": Scale(
    base=_shape("tiny", 2, 128)
    | {"vocab_size": 512, "model": {"num_layers": 1}},
    rungs=(),
    loops=(),
    shapes=(),
    instances=(),
    rows=0,
  ),
}


def run(workdir: pathlib.Path, variant: str = command.FULL) -> Outcome:
  """Measures what is not measured yet and states what was found.

  Args:
    workdir: of all measurements; a second call continues there.
    variant: key of `SCALES`.

  Raises:
    CompilerMissing: `libtpu` is not installed.
  """
  scale = lookup(SCALES, variant, "variant")
  made = Measurements(workdir, fingerprint(SOURCES))
  rows = []
  for part, label, function, arguments in plan(scale):
    found = made.get(function, **arguments)
    shown = {
      name: " ".join(map(str, value)) if isinstance(value, tuple) else value
      for name, value in arguments.items()
      if name != "model"
    }
    rows.append({"part": part, "step": label, **shown, **found})
  return findings.outcome(rows)


def plan(scale: Scale) -> Iterable[tuple[str, str, Any, dict[str, Any]]]:
  """(part, label, function of `measure`, its arguments) of every row."""
  base = scale.base
  for number in range(len(scale.rungs) + 1):
    label = scale.rungs[number - 1] if number else "plain"
    without = {"without": scale.rungs[number:]}
    yield findings.WATERFALL, label, measure.cost, base | without
  for layers in scale.loops:
    model = {"scan": True, "unroll": layers}
    label = f"scan, {layers} layers an iteration"
    yield findings.LOOPS, label, measure.cost, base | {"model": model}
  for shape in scale.shapes:
    label = "{variant}, {batch_size} x {seq_len}".format(**shape)
    yield findings.SHAPES, label, measure.cost, shape
  for name in scale.instances:
    arguments = dict(instances=name, seq_len=base["seq_len"], rows=scale.rows)
    yield findings.FILL, name, measure.filled, arguments


if __name__ == "__main__":
  command.main(run)
