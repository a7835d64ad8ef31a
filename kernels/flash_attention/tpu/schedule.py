"""Which tiles a kernel visits, in which order: the table behind its grid.

A grid step is one visit of a tile (i, j): rows of queries i, columns of keys j.
Tiles that the block mask, causality or the window hide entirely are not in the
table, so they cost neither a fetch nor a step. The table travels as a scalar
prefetch operand: the block specs read tile indices from it.

Two int32 per visit: i in bits 0-11, j in bits 12-23, flags above; and the row
whose last visit comes next, which is the row of the output block to hold.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.flash_attention.tpu import sparse
from kernels.flash_attention.tpu.problem import Problem
from kernels.flash_attention.tpu.tiles import Tiles

_BITS = 12
MAX_TILES = 1 << _BITS
# The first and last visit of a row of tiles, of a column of tiles; whether
# there is anything to compute; whether masks must be evaluated.
ROW_FIRST, ROW_LAST, COL_FIRST, COL_LAST, COMPUTE, PARTIAL = (
  1 << (2 * _BITS + n) for n in range(6)
)
_FLAGS = 1 << 6


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A table and what is known of it at trace time.

  Attributes:
    table: int32 [2 * heads * visits]; None if tile 0, 0 is all there is.
    heads: of the table; 1 serves all.
    visits: per head.
    computes: whether some visits, or all, compute (True, False or None: some).
    partial: likewise whether masks must be evaluated.
    tiles: (row tiles, column tiles).
  """

  table: Any
  heads: int
  visits: int
  computes: bool | None
  partial: bool | None
  tiles: tuple[int, int]

  @property
  def one_row_visit(self) -> bool:
    """Whether every row of tiles is visited exactly once."""
    return self.table is None or (self.tiles[1] == 1 and self.heads == 1)

  @property
  def one_column_visit(self) -> bool:
    """Whether every column of tiles is visited exactly once."""
    return self.table is None or (self.tiles[0] == 1 and self.heads == 1)

  def entry(self, group: Any, visit: Any, table: Any) -> "Visit":
    """The visit of a grid step; `table` is the prefetched operand."""
    if table is None:
      return Visit(None)
    place = visit if self.heads == 1 else group * self.visits + visit
    return Visit(table[place], table[place + self.heads * self.visits])


class Visit:
  """One entry of the table: tile (i, j), and the next row to be complete."""

  def __init__(self, word: Any, out_row: Any = 0):
    self._word = word
    self.out_row = out_row

  @property
  def i(self) -> Any:
    return 0 if self._word is None else self._word & (MAX_TILES - 1)

  @property
  def j(self) -> Any:
    if self._word is None:
      return 0
    return jax.lax.shift_right_logical(self._word, _BITS) & (MAX_TILES - 1)

  def has(self, flag: int) -> Any:
    """Whether a flag is set; the only visit is first and last."""
    return True if self._word is None else (self._word & flag) != 0


def _limits(problem: Problem) -> tuple[float, float]:
  """Least and greatest visible row - column (positions)."""
  left, right = problem.options.window or (math.inf, math.inf)
  return (0 if problem.options.causal else -right), left


def _geometry(problem: Problem, tiles: Tiles) -> tuple[np.ndarray, np.ndarray]:
  """(visible, partial) bool [rows, columns] by position and key padding."""
  t, s, rows, columns = tiles.t, tiles.s, tiles.rows, tiles.columns
  j = np.arange(columns)[None]
  i = np.arange(rows)[:, None]
  partial = np.broadcast_to((j + 1) * s > problem.s, (rows, columns))
  visible = np.ones((rows, columns), bool)
  if problem.positional and problem.offset is None:
    return visible, np.ones((rows, columns), bool)
  if problem.positional:
    low, high = _limits(problem)
    nearest = i * t + problem.offset - ((j + 1) * s - 1)
    farthest = (i + 1) * t - 1 + problem.offset - j * s
    visible = (farthest >= low) & (nearest <= high)
    partial = partial | (nearest < low) | (farthest > high)
  return visible, partial


def _flags(visible, partial, by_column: bool, every: bool, xp):
  """(visits, flags) of the tiles of one head, each [rows, columns].

  Tiles with nothing visible are visited, without computing, only where their
  row (or column, if `by_column`) would otherwise never be written; or all of
  them, if `every`.
  """
  rows, columns = visible.shape
  i, j = xp.meshgrid(xp.arange(rows), xp.arange(columns), indexing="ij")
  visit = visible | ((j == 0) & ~visible.any(1, keepdims=True))
  if by_column:
    visit = visit | ((i == 0) & ~visible.any(0, keepdims=True))
  if every:
    visit = xp.ones_like(visible)
  flags = COMPUTE * visible + PARTIAL * partial
  # Either order visits a row from left to right and a column downwards.
  for axis, first, last in ((1, ROW_FIRST, ROW_LAST), (0, COL_FIRST, COL_LAST)):
    number = visit.cumsum(axis)
    flags = flags + first * (visit & (number == 1))
    flags = flags + last * (visit & (number == visit.sum(axis, keepdims=True)))
  return visit, flags


def _sequence(visible, partial, by_column: bool, every: bool, xp):
  """Words and output rows [visits] of one head, and its number of visits."""
  rows, columns = visible.shape
  size = rows * columns
  visit, flags = _flags(visible, partial, by_column, every, xp)
  rank = xp.arange(size).reshape(rows, columns)
  if by_column:
    rank = xp.arange(size).reshape(columns, rows).T
  # Sorted by rank, idle tiles last; flags ride along, which spares gathers.
  key = xp.where(visit, rank, size + rank) * _FLAGS + flags // ROW_FIRST
  key = xp.sort(key.ravel())
  place, count = xp.arange(size), visit.sum()
  rank, flags = key // _FLAGS % size, key % _FLAGS * ROW_FIRST
  if by_column:
    i, j = rank % rows, rank // rows
  else:
    i, j = rank // columns, rank % columns
  tile = i + (j << _BITS)
  # Idle steps stay where they are: no fetch.
  live, final = place < count, place + 1 == count
  tile = xp.where(live, tile, xp.where(final, tile, 0).max())
  flags = xp.where(live, flags, 0)
  # The next last visit of a row, with the row in the lower bits.
  ends = xp.where(flags & ROW_LAST, place * MAX_TILES + i, size * MAX_TILES + i)
  if xp is np:
    ends = np.minimum.accumulate(ends[::-1])[::-1]
  else:
    ends = jax.lax.cummin(ends, reverse=True)
  out_row = xp.where(live, ends % MAX_TILES, xp.where(final, i, 0).max())
  return xp.stack([tile + flags, out_row]).astype(xp.int32), count


def build(
  problem: Problem,
  tiles: Tiles,
  block_mask: Any,
  *,
  by_column: bool,
  every: bool = False,
) -> Schedule:
  """The visits of a kernel.

  Args:
    problem: the call.
    tiles: of the kernel.
    block_mask: bool [1|h, blocks, blocks], numpy or traced, or None.
    by_column: columns outside, rows inside: the order of the backward pass.
    every: also visit tiles where there is nothing to compute.
  """
  visible, partial = _geometry(problem, tiles)
  if visible.size == 1 and block_mask is None:
    return Schedule(None, 1, 1, True, bool(partial[0, 0]), (1, 1))
  traced = not isinstance(block_mask, np.ndarray | None)
  xp = jnp if traced else np
  shown, partly = visible[None], partial[None]
  if block_mask is not None:
    some, whole = sparse.by_tile(block_mask, problem.block, tiles)
    shown = some & visible[None]
    inside = partial[None] | ~whole if problem.finer else partial[None]
    partly = shown & inside
  made = [_sequence(v, p, by_column, every, xp) for v, p in zip(shown, partly)]
  if traced:
    table = xp.stack([words for words, _ in made], axis=1)
    # What is known of a traced mask: with small blocks, nothing.
    computes, masked = None, None if problem.finer else _agree(partial)
  else:
    visits = max(count for _, count in made)
    table = np.stack([words[:, :visits] for words, _ in made], axis=1)
    computing = (table[0] & COMPUTE) != 0
    computes = True if computing.all() else None
    masked = _agree((table[0] & PARTIAL)[computing] != 0)
  return Schedule(
    table.reshape(-1),
    len(made),
    table.shape[2],
    computes,
    masked,
    visible.shape,
  )


def _agree(values: np.ndarray) -> bool | None:
  """The common value, or None."""
  if values.all():
    return True
  return None if values.any() else False
