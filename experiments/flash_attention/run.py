"""FlashAttention's claims, on compilers and two CPU cores.

  python -m experiments.flash_attention.run [--workdir DIR] [--variant tiny]

(a) it is exact, (b) its memory is linear in the length, (c) it moves fewer
bytes, (d) block-sparse attention costs the share of blocks it keeps, (e) a
training step gets faster, (f) on the CPU it is faster, from some length on. Of
(f) alone the figures depend on what else the machine does.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

from bertjax.registry import lookup
from experiments import command
from experiments.flash_attention import findings, measure
from experiments.measurements import Measurements, fingerprint
from experiments.outcome import Outcome
from kernels import bench

_HOME = pathlib.Path(__file__).parent
Shape = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large a variant is; shapes are (batch, heads, length, width).

  Attributes:
    exact: shape of the comparison of errors.
    memory_heads: of the comparison of memory.
    memory_lengths: likewise.
    traffic: shape of the comparison of bytes.
    sparse: shape of block-sparse attention.
    blocks: per side, a power of two.
    patterns: keys of `measure.PATTERNS`, "full" among them.
    steps: attention and dropout of its weights, in a training step.
    model: variant of configs/bert.py.
    batch_size: of its step.
    crossover_batch: of attention on the CPU, with 4 heads.
    crossover_lengths: likewise.
    repeats: of each time.
  """

  exact: Shape
  memory_heads: int
  memory_lengths: tuple[int, ...]
  traffic: Shape
  sparse: Shape
  blocks: int
  patterns: tuple[str, ...]
  steps: tuple[tuple[str, float], ...]
  model: str
  batch_size: int
  crossover_batch: int
  crossover_lengths: tuple[int, ...]
  repeats: int


SCALES = {
  command.FULL: Scale(
    exact=(1, 2, 512, 64),
    memory_heads=2,
    memory_lengths=(1024, 2048, 4096, 8192, 16_384),
    traffic=(64, 16, 1024, 64),
    sparse=(1, 4, 8192, 64),
    blocks=16,
    patterns=tuple(measure.PATTERNS),
    # The stock kernel knows no dropout.
    steps=(
      ("flash", 0.1),
      ("reference", 0.1),
      ("reference", 0.0),
      ("stock", 0.0),
      ("flash", 0.0),
    ),
    model="large",
    batch_size=8,
    crossover_batch=4,
    crossover_lengths=(128, 256, 512, 1024, 2048, 4096),
    repeats=3,
  ),
  "tiny": Scale(
    exact=(1, 1, 128, 16),
    memory_heads=1,
    memory_lengths=(256, 512),
    traffic=(1, 2, 256, 64),
    sparse=(1, 1, 512, 64),
    blocks=4,
    patterns=("full", "butterfly"),
    steps=(),  # compiling a training step takes minutes
    model="mini",
    batch_size=2,
    crossover_batch=1,
    crossover_lengths=(32, 64),
    repeats=1,
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
  sources = [*bench.SOURCES, _HOME / "measure.py", _HOME / "step.py"]
  made = Measurements(workdir, fingerprint(sources))
  rows = []
  for part, function, arguments in plan(scale):
    found = made.get(function, **arguments)
    shown = {
      name: " ".join(map(str, value)) if isinstance(value, tuple) else value
      for name, value in arguments.items()
    }
    rows.append({"part": part, **shown, **found})
  return findings.outcome(rows)


def plan(scale: Scale) -> Iterable[tuple[str, Any, dict[str, Any]]]:
  """(part, function of `measure`, its arguments) of every measurement."""
  for backend in ("blockwise", "gpu", "tpu"):
    yield (
      findings.EXACT,
      measure.exactness,
      {"backend": backend, "sizes": scale.exact},
    )
  for length in scale.memory_lengths:
    sizes = (1, scale.memory_heads, length, 64)
    for name in ("dense", "blockwise"):
      arguments = {"name": name, "sizes": sizes}
      yield findings.CPU_MEMORY, measure.cpu_memory, arguments
    for name in ("dense", "ours"):
      arguments = {"name": name, "sizes": sizes}
      yield findings.TPU_MEMORY, measure.tpu_cost, arguments
  for name in ("dense", "ours"):
    arguments = {"name": name, "sizes": scale.traffic}
    yield findings.TRAFFIC, measure.tpu_cost, arguments
  for pattern in scale.patterns:
    arguments = {"pattern": pattern, "blocks": scale.blocks}
    sizes = {"sizes": scale.sparse}
    yield findings.SPARSE, measure.sparse_cost, arguments | sizes
  for attend, dropout in scale.steps:
    yield (
      findings.STEP,
      measure.step_cost,
      {
        "variant": scale.model,
        "attend": attend,
        "attention_dropout": dropout,
        "batch_size": scale.batch_size,
      },
    )
  for dtype, length, name in itertools.product(
    ("float32", "bfloat16"), scale.crossover_lengths, ("dense", "blockwise")
  ):
    yield (
      findings.CROSSOVER,
      measure.cpu_seconds,
      {
        "name": name,
        "sizes": (scale.crossover_batch, 4, length, 64),
        "dtype": dtype,
        "repeats": scale.repeats,
      },
    )


if __name__ == "__main__":
  command.main(run)
