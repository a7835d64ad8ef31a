"""BERT on pods, on paper: what a compiler and a data sheet say of scaling.

  python -m experiments.scaling.run [--workdir DIR] [--variant tiny]

Every step is compiled for its pod (a minute or two each); nothing runs. (a) How
much of a chip's speed is left on a pod, by mesh; (b) how long LAMB's recipe and
MLPerf's take; (c) where a bit per number instead of thirty-two or sixteen pays.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from bertjax.registry import lookup
from experiments import command
from experiments.measurements import LIBRARY, Measurements, fingerprint
from experiments.outcome import Outcome
from experiments.scaling import findings, measure


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large a variant is.

  Attributes:
    weak: model, topology, mesh and optimizer of steps with equal rows per chip.
    rows_per_chip: of those.
    recipes: variant and stage of configs/lamb.py, topology, microbatches.
  """

  weak: tuple[tuple[str, str, dict[str, int], str], ...]
  rows_per_chip: int
  recipes: tuple[tuple[str, str, str, int], ...]


_PODS = ("v5e:4x4", "v5e:16x16", "v5p:8x8x8")
_MESHES: tuple[dict[str, int], ...] = (
  {},
  {"fsdp": 4},
  {"model": 2},
  {"seq": 2},
)
SCALES = {
  command.FULL: Scale(
    weak=(
      *(
        (model, chip, {}, "lamb")
        for model in ("base", "large")
        for chip in ("v5e:1x1", "v5p:1x1x1")
      ),
      *(
        (model, pod, mesh, "lamb")
        for model in ("base", "large")
        for pod in _PODS
        for mesh in _MESHES
      ),
      ("large", "v5e:16x16", {}, "onebit_lamb"),
      ("large", "4xv5e:16x16", {}, "lamb"),
    ),
    rows_per_chip=8,
    recipes=(
      ("large", "phase1", "v5e:16x16", 8),
      ("large", "phase2", "v5e:16x16", 16),
      ("large", "phase1", "v5p:8x8x8", 2),
      ("large", "phase2", "v5p:8x8x8", 4),
      ("mlperf_3072", "", "v5p:4x4x4", 3),
    ),
  ),
  "tiny": Scale(
    weak=(
      ("tiny", "v5e:1x1", {}, "lamb"),
      ("tiny", "v5e:2x2", {}, "lamb"),
    ),
    rows_per_chip=1,
    recipes=(),
  ),
}


def run(workdir: pathlib.Path, variant: str = command.FULL) -> Outcome:
  """Compiles what is not compiled yet and states what was found.

  Args:
    workdir: of all measurements; a second call continues there.
    variant: key of `SCALES`.

  Raises:
    CompilerMissing: `libtpu` is not installed.
  """
  scale = lookup(SCALES, variant, "variant")
  made = Measurements(workdir, fingerprint([*LIBRARY, measure.__file__]))
  rows = []
  for part, function, arguments in _plan(scale):
    found = made.get(function, **arguments)
    rows.append({"part": part, **arguments, **found})
  return findings.outcome(rows)


def _plan(scale: Scale) -> Iterator[tuple[str, Any, dict[str, Any]]]:
  for model, topology, mesh, optimizer in scale.weak:
    arguments = {
      "variant": model,
      "topology": topology,
      "mesh": mesh,
      "rows_per_chip": scale.rows_per_chip,
      "optimizer": optimizer,
    }
    yield findings.WEAK, measure.weak, arguments
  for model, stage, topology, microbatches in scale.recipes:
    arguments = {
      "variant": model,
      "stage": stage,
      "topology": topology,
      "microbatches": microbatches,
    }
    yield findings.RECIPE, measure.recipe, arguments


if __name__ == "__main__":
  command.main(run)
