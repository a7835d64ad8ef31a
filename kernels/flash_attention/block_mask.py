"""Block masks: patterns of visible tiles, and the tables that kernels walk.

A pattern is bool [row blocks, column blocks], or [heads, ...] for one per head
(`per_head`), made of numpy so that kernels can shrink their grids to it. Union
and intersection of patterns are `|` and `&`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.flash_attention.layouts import Sizes
from kernels.flash_attention.options import (
  Extras,
  Options,
  Unsupported,
  block_size,
)


def full(rows: int, columns: int | None = None) -> np.ndarray:
  """Every block: dense attention."""
  return np.ones((rows, columns or rows), bool)


def block_diagonal(blocks: int, group: int = 1) -> np.ndarray:
  """Consecutive groups of `group` blocks that see only themselves."""
  index = np.arange(blocks) // group
  return index[:, None] == index[None]


def sliding_window(blocks: int, left: int, right: int) -> np.ndarray:
  """Blocks at most `left` before and `right` after the own one."""
  distance = np.subtract.outer(np.arange(blocks), np.arange(blocks))
  return (distance <= left) & (distance >= -right)


def stripe(blocks: int, count: int) -> np.ndarray:
  """The first `count` blocks see all and are seen by all."""
  first = np.arange(blocks) < count
  return first[:, None] | first[None]


def longformer(blocks: int, *, window: int, num_global: int) -> np.ndarray:
  """Local plus global attention (Beltagy et al. 2020, arXiv:2004.05150).

  Args:
    blocks: per side.
    window: width of the local band in blocks, odd.
    num_global: leading blocks that see all and are seen by all.
  """
  half = _half(window)
  return sliding_window(blocks, half, half) | stripe(blocks, num_global)


def big_bird(
  blocks: int,
  *,
  window: int = 3,
  num_global: int = 2,
  num_random: int = 3,
  seed: int = 0,
) -> np.ndarray:
  """Window, global and random blocks (Zaheer et al. 2020, arXiv:2007.14062).

  Args:
    blocks: per side.
    window: width of the local band, odd.
    num_global: leading blocks that see all and are seen by all.
    num_random: further blocks of every row, drawn among those not visible.
    seed: of the drawing; give every head its own.
  """
  mask = longformer(blocks, window=window, num_global=num_global)
  rng = np.random.default_rng(seed)
  for row in mask:
    hidden = np.flatnonzero(~row)
    chosen = rng.permutation(hidden)[:num_random]
    row[chosen] = True
  return mask


def butterfly(blocks: int, *, num_global: int = 0) -> np.ndarray:
  """Pairs whose indices differ in at most one bit, plus a global stripe.

  Block-sparse FlashAttention's pattern: i xor j in {0, 1, 2, 4, ...}, a share
  of (log2 n + 1) / n of the blocks.
  """
  index = np.arange(blocks)
  differ = np.bitwise_xor.outer(index, index)
  return ((differ & (differ - 1)) == 0) | stripe(blocks, num_global)


def strided(blocks: int, stride: int) -> np.ndarray:
  """The last `stride` blocks, and every `stride`-th (Child et al. 2019).

  In both directions, for encoders; add `causal` for the paper's form.
  """
  distance = np.subtract.outer(np.arange(blocks), np.arange(blocks))
  return (np.abs(distance) < stride) | (distance % stride == 0)


def fixed(blocks: int, stride: int, summary: int = 1) -> np.ndarray:
  """The own group of `stride` blocks, and each group's last `summary` ones."""
  columns = np.arange(blocks) % stride >= stride - summary
  return block_diagonal(blocks, stride) | columns[None]


def per_head(make: Callable[[int], np.ndarray], heads: int) -> np.ndarray:
  """Stacks `make(head)` for every head: bool [heads, rows, columns]."""
  return np.stack([make(head) for head in range(heads)])


def _half(window: int) -> int:
  if window < 1 or window % 2 == 0:
    raise ValueError(f"window={window} blocks must be odd and at least 1.")
  return window // 2


class TileMap(NamedTuple):
  """Which tiles a kernel has to visit.

  numpy if nothing traced decides, else jax arrays.

  Attributes:
    active: bool [1|h, row tiles, column tiles]; position and block mask leave
      something visible.
    whole: likewise; they leave everything visible, so that the tile needs no
      mask but for segments and ragged ends.
  """

  active: np.ndarray | jax.Array
  whole: np.ndarray | jax.Array


def tile_map(
  n: Sizes, extras: Extras, options: Options, rows: int, columns: int
) -> TileMap:
  """The tiles of `rows` x `columns` positions that attention must visit.

  Raises:
    Unsupported: the tiles do not divide the blocks of the mask.
  """
  static = not isinstance(extras.offset, jax.Array)
  xp = np if static else jnp
  offset = n.s - n.t if extras.offset is None else extras.offset
  top = xp.arange(math.ceil(n.t / rows))[:, None] * rows
  bottom = xp.minimum(top + rows, n.t) - 1 + offset
  top = top + offset
  first = np.arange(math.ceil(n.s / columns))[None] * columns
  last = np.minimum(first + columns, n.s) - 1
  left, right = options.window or (None, None)
  if options.causal:
    right = 0 if right is None else min(right, 0)
  active = whole = xp.ones((top.shape[0], first.shape[1]), bool)
  if left is not None:
    active = active & (last >= top - left)
    whole = whole & (first >= bottom - left)
  if right is not None:
    active = active & (first <= bottom + right)
    whole = whole & (last <= top + right)
  active, whole = active[None], whole[None]
  if extras.block_mask is not None:
    blocks = tile_blocks(n, extras, options, rows, columns)
    active, whole = active & blocks, whole & blocks
  return TileMap(active, whole)


def tile_blocks(
  n: Sizes, extras: Extras, options: Options, rows: int, columns: int
) -> np.ndarray | jax.Array:
  """The block mask in tiles, bool [1|h, row tiles, column tiles].

  Raises:
    Unsupported: the tiles do not divide the blocks.
  """
  block = block_size(extras, options, n.t, n.s)
  mask = extras.block_mask
  xp = np if isinstance(mask, np.ndarray) else jnp
  for axis, (tile, size, length) in enumerate(
    zip((rows, columns), block, (n.t, n.s)), start=1
  ):
    if mask.shape[axis] > 1 and size % tile:
      raise Unsupported(
        f"tiles of {(rows, columns)} do not divide the blocks of the"
        f" block_mask, {block}."
      )
    if mask.shape[axis] > 1:
      mask = xp.repeat(mask, size // tile, axis=axis)
      mask = xp.take(mask, np.arange(math.ceil(length / tile)), axis=axis)
    else:
      mask = xp.repeat(mask, math.ceil(length / tile), axis=axis)
  return mask


class Table(NamedTuple):
  """For each row of tiles, the columns to visit, compact.

  Attributes:
    count: int32 [1|h, rows], number of active columns.
    index: int32 [1|h, rows, width], the active columns in order, then the last
      of them repeated: a pipeline does not fetch again what it has.
  """

  count: np.ndarray | jax.Array
  index: np.ndarray | jax.Array


def table(active: np.ndarray | jax.Array) -> Table:
  """The compact rows of a tile map; for columns pass its transpose.

  Args:
    active: bool [1|h, rows, columns]. Of a numpy array the table is as wide as
      its fullest row, of a traced one as wide as there are columns.
  """
  static = isinstance(active, np.ndarray)
  xp = np if static else jnp
  count = active.sum(-1).astype(np.int32)
  # Stable: active columns first, each group in order.
  order = xp.argsort(~active, axis=-1, stable=True).astype(np.int32)
  if static:
    order = order[..., : max(1, int(count.max(initial=0)))]
  slot = np.arange(order.shape[-1])[None, None]
  last = xp.maximum(count[..., None] - 1, 0)
  index = xp.take_along_axis(order, xp.minimum(slot, last), axis=-1)
  return Table(count, xp.where(count[..., None] > 0, index, 0))


def active_list(
  active: np.ndarray | jax.Array,
) -> tuple[np.ndarray | jax.Array, int | jax.Array]:
  """All active tiles in order of (head, row, column).

  Returns:
    int32 [tiles, 3] of (head, row, column), and how many of them count.
  """
  if isinstance(active, np.ndarray):
    found = np.argwhere(active).astype(np.int32)
    return found, len(found)
  found = jnp.stack(jnp.nonzero(active, size=active.size, fill_value=0), -1)
  return found.astype(jnp.int32), active.sum()
