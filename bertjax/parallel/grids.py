"""How tensors are cut into the chunks of a compressed average.

A tensor of m numbers is cut into n pieces of m / n, rounded up to whole lines;
chunk k is the k-th piece of all tensors. A line holds numbers that lie side by
side in memory: a row of a matrix, or 128 of the numbers as they are counted.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

BITS = 32  # signs in a word
LANES = 128  # numbers in a line
# A TPU keeps eight lines in a register. Pieces of so many lines are rounded up
# to whole registers: an eighth longer at most.
REGISTER = 8
LONG = REGISTER * REGISTER
GRANULARITIES = ("buffer", "chunk", "tensor", "layer", "shard")
SCALES = ("l1", "rms")


@dataclasses.dataclass(frozen=True)
class Compression:
  """How numbers become signs and scales.

  Attributes:
    scale: "l1", the mean magnitude, which makes the error least; or "rms", as
      DeepSpeed has it.
    granularity: what shares a scale. "buffer": all numbers of a worker, and
      all of a server's chunk; "chunk": those of a chunk, on both sides;
      "tensor"; "layer": a layer of a scanned stack; "shard": what one device
      holds of a tensor, so that nothing is summed within a worker, but scales
      depend on how it is sharded; or an int: blocks of at most so many numbers.
    error_feedback: keep what was not sent; False is for ablations.
  """

  scale: str = "l1"
  granularity: str | int = "buffer"
  error_feedback: bool = True

  def __post_init__(self):
    if self.scale not in SCALES:
      raise ValueError(
        f"scale={self.scale!r} is unknown; choose from {', '.join(SCALES)}."
      )
    blocks = isinstance(self.granularity, int) and self.granularity is not True
    if blocks and self.granularity < 1:
      raise ValueError(
        f"granularity={self.granularity}: blocks have at least one number."
      )
    if not blocks and self.granularity not in GRANULARITIES:
      raise ValueError(
        f"granularity={self.granularity!r} is unknown; choose from"
        f" {', '.join(GRANULARITIES)}, or an int for blocks."
      )

  @property
  def by_block(self) -> bool:
    """Whether granularity is a size of blocks."""
    return isinstance(self.granularity, int)


class Grid(NamedTuple):
  """How a tensor divides: `[chunks, rows, blocks, lines, lanes]`, padded.

  Attributes:
    rows: layers with scales of their own, else 1.
    length: numbers in a row.
    blocks: of a row's piece in one chunk.
    lines: of a block.
    lanes: numbers in a line.
    order: of the tensor's axes, in which its numbers are counted.
    alone: whether its words hold no other tensor's signs.
  """

  rows: int
  length: int
  blocks: int
  lines: int
  lanes: int
  order: tuple[int, ...]
  alone: bool = False

  @property
  def piece(self) -> int:
    """Numbers of a row in one chunk, padding included."""
    return self.blocks * self.lines * self.lanes

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """Of one chunk."""
    return self.rows, self.blocks, self.lines, self.lanes

  def split(self, x: Array, chunks: int) -> Array:
    """`[...]` -> `[chunks, rows, blocks, lines, lanes]`, padded with zeros."""
    lines = -(-self.length // self.lanes)
    x = x.transpose(self.order).reshape(self.rows, self.length)
    x = pad(x, lines * self.lanes)
    x = x.reshape(self.rows, lines, self.lanes)
    x = pad(x, chunks * self.blocks * self.lines)
    x = x.reshape(self.rows, chunks, *self.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  def join(self, x: Array, shape: Sequence[int]) -> Array:
    """The inverse of `split`."""
    x = jnp.swapaxes(x, 0, 1).reshape(self.rows, -1, self.lanes)
    x = x[:, : -(-self.length // self.lanes)].reshape(self.rows, -1)
    x = x[:, : self.length].reshape([shape[axis] for axis in self.order])
    return x.transpose([self.order.index(axis) for axis in range(len(shape))])

  def spread(self, scale: Array, shape: Sequence[int]) -> Array:
    """Scales `[n, rows, blocks]`, broadcastable against a tensor."""
    chunks, _, blocks = scale.shape
    if chunks * blocks == 1:
      depth = depth_of(shape, self.rows) if scale.shape[1] > 1 else 0
      return scale.reshape(*shape[:depth], *(1,) * (len(shape) - depth))
    scale = scale[..., None, None]
    if not self.alone:
      return self.join(jnp.broadcast_to(scale, (chunks, *self.shape)), shape)
    # A number for each line: small, and a line is a row of the tensor.
    scale = jnp.broadcast_to(scale, (chunks, *self.shape[:-1], 1))
    line = self._replace(length=self.length // self.lanes, lanes=1, alone=False)
    last = self.order[-1]
    return line.join(
      scale, [1 if axis == last else n for axis, n in enumerate(shape)]
    )


def pad(x: Array, length: int) -> Array:
  """Zeros at the end of axis 1, up to a length."""
  if x.shape[1] == length:
    return x
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, length - x.shape[1])
  return jnp.pad(x, widths)


def round_up(n: int, unit: int) -> int:
  """The next multiple of the unit."""
  return -(-n // unit) * unit


def grid_of(
  shape: Sequence[int], chunks: int, compression: Compression, stacked: int = 0
) -> Grid:
  """How a tensor of this shape divides into chunks.

  Args:
    shape: of the tensor, on one device.
    chunks: number of workers.
    compression: its granularity counts.
    stacked: leading axes that only replicate layers.
  """
  size = math.prod(shape)
  rows = 1
  if compression.granularity == "layer" and size:
    rows = math.prod(shape[:stacked])
  length = size // rows
  order = order_of(shape, rows)
  piece = max(1, -(-length // chunks))
  if compression.by_block:
    blocks = -(-piece // compression.granularity)
    return Grid(rows, length, blocks, 1, -(-piece // blocks), order)
  lanes = shape[order[-1]] if order else 1
  if size and lanes % LANES == 0:
    lines = round_up(-(-length // (lanes * chunks)), BITS)
    if (chunks * lines * lanes - length) * REGISTER <= length:
      return Grid(rows, length, 1, lines, lanes, order, alone=True)
  lines = -(-piece // LANES)
  if lines >= LONG:
    lines = round_up(lines, REGISTER)
  return Grid(rows, length, 1, lines, LANES, order)


def order_of(shape: Sequence[int], rows: int) -> tuple[int, ...]:
  """Axes of a tensor, that one last which a TPU lays along its lanes.

  That is the last one, or if it does not fill lines of LANES the longest that
  does; never one of the leading axes that make up `rows`.
  """
  axes = tuple(range(len(shape)))
  wide = [
    axis for axis in axes[depth_of(shape, rows) :] if shape[axis] % LANES == 0
  ]
  if not wide or wide[-1] == axes[-1]:
    return axes
  last = max(wide, key=lambda axis: shape[axis])
  return (*(axis for axis in axes if axis != last), last)


def depth_of(shape: Sequence[int], rows: int) -> int:
  """How many leading axes of a tensor make up its grid's rows."""
  depth = 0
  while math.prod(shape[:depth]) < rows:
    depth += 1
  return depth
