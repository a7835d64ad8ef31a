"""Block masks as tiles to visit; within tiles they are operands.

A tile is a multiple of 128 positions each way, as the lanes want. A mask of
larger blocks is refined to tiles. A mask of smaller blocks makes a tile visited
if any of its blocks is visible, and evaluated within if not all of them are.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels.flash_attention.capabilities import Sides
from kernels.flash_attention.tpu.problem import LANES
from kernels.flash_attention.tpu.tiles import Tiles

_SUBLANES = 8
_LARGEST = 1024


def tile(block: tuple[int, int]) -> tuple[int, int]:
  """The least tile that whole blocks make up."""
  return tuple(math.lcm(n, LANES) for n in block)


def _makes_tiles(size: int) -> bool:
  if size % LANES == 0:
    return True
  return size % _SUBLANES == 0 and math.lcm(size, LANES) <= _LARGEST


SIDES = Sides(
  f"multiples of {LANES}, or multiples of {_SUBLANES} whose least common"
  f" multiple with {LANES} is at most {_LARGEST}",
  _makes_tiles,
)


def by_tile(mask: Any, block: tuple[int, int], tiles: Tiles) -> tuple[Any, Any]:
  """(some, all) visible, bool [1|h, row tiles, column tiles].

  Args:
    mask: bool [1|h, row blocks, column blocks], numpy or traced.
    block: positions of a block.
    tiles: whose t and s are multiples or divisors of the block's.
  """
  xp = np if isinstance(mask, np.ndarray) else jnp
  some, whole = mask, mask
  for axis, size, side, count in (
    (1, block[0], tiles.t, tiles.rows),
    (2, block[1], tiles.s, tiles.columns),
  ):
    if size >= side:
      some, whole = (
        xp.take(xp.repeat(x, size // side, axis), xp.arange(count), axis)
        for x in (some, whole)
      )
      continue
    missing = [(0, 0)] * 3
    missing[axis] = (0, count * (side // size) - mask.shape[axis])
    shape = list(some.shape)
    shape[axis : axis + 1] = [count, side // size]
    some = xp.pad(some, missing).reshape(shape).any(axis + 1)
    # Blocks past the end hide nothing that is not padding.
    whole = xp.pad(whole, missing, constant_values=True)
    whole = whole.reshape(shape).all(axis + 1)
  return some, whole
