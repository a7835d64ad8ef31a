"""Bytes that an average over workers sends, in closed form.

Per device and in one direction, as `hardware.Collective.sent_bytes` counts them
in a compiled program. Compilers may choose another exchange: over 256 chips,
libtpu makes an all-reduce of an all-gather of 30 kB or less from each (60
million numbers), which sends twice as much; that of BERT-large stays a gather.
"""

import math
from collections.abc import Iterable, Sequence

from bertjax.parallel.grids import LANES, Compression, grid_of
from bertjax.parallel.signs import groups_of


def compressed_bytes(
  shapes: Iterable[Sequence[int]],
  workers: int,
  compression: Compression = Compression(),  # noqa: B008 frozen
  stacked: Iterable[int] | None = None,
) -> float:
  """What a worker sends in one `compressed_all_reduce`.

  Twice (n - 1) messages of a bit per number of a chunk, and its scales, each
  in whole lines: 2 (n - 1) / n (d / 8) bytes for d numbers without padding and
  scales.

  Args:
    shapes: of the tensors, on one device.
    workers: n.
    compression: scales.
    stacked: by tensor, leading axes that only replicate layers.
  """
  shapes = list(shapes)
  depths = [0] * len(shapes) if stacked is None else list(stacked)
  grids = [
    grid_of(shape, workers, compression, depth)
    for shape, depth in zip(shapes, depths)
  ]
  scales = {
    "buffer": 1,
    "chunk": 1,
    "tensor": len(grids),
    "shard": len(grids),
    "layer": sum(grid.rows for grid in grids),
  }.get(compression.granularity)
  if scales is None:
    scales = sum(grid.rows * grid.blocks for grid in grids)
  words = sum(group.words for group in groups_of(grids))
  lines = words + -(-scales // LANES)
  return 2 * (workers - 1) * 4 * LANES * lines


def ring_bytes(
  shapes: Iterable[Sequence[int]], workers: int, bits: int = 16
) -> float:
  """What a worker sends in a ring all-reduce of the same tensors."""
  numbers = sum(math.prod(shape) for shape in shapes)
  return 2 * (workers - 1) / workers * numbers * bits / 8
