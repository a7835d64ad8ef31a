"""Moves the rows of a strip [128, 128 n] along the lanes, by their index.

By a gather within 128 lanes and a choice between neighbours. The TPU's strided
rotation takes less than half the work on a v5, but it is neither a v4's nor
goes both ways, which gradients need. Setting up a gather's pattern costs more
than the gather: the rows that share one, eight of every strip, go together.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention.tpu.problem import LANES


def _pattern(first: int, rows: int) -> tuple[jax.Array, jax.Array]:
  """Indices of lanes, and of the rows from `first` on, int32 [rows, 128]."""
  lane, row = (
    jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), axis) for axis in (1, 0)
  )
  return lane, row + first


def _gathered(x: jax.Array, index: jax.Array) -> list[jax.Array]:
  """The lanes `index` of every 128 lanes of x."""
  return [
    jnp.take_along_axis(
      x[:, n : n + LANES], index, axis=1, mode="promise_in_bounds"
    )
    for n in range(0, x.shape[1], LANES)
  ]


def _by_rows(
  strips: Sequence[jax.Array],
  move: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  rows: int,
) -> list[jax.Array]:
  """`move(some rows of a strip, their lanes, their indices)`, of all rows."""
  found = [[] for _ in strips]
  for first in range(0, LANES, rows):
    lane, row = _pattern(first, rows)
    for strip, parts in zip(strips, found):
      parts.append(move(strip[first : first + rows], lane, row))
  return [jnp.concatenate(parts, axis=0) for parts in found]


def skew(strips: Sequence[jax.Array], rows: int) -> list[jax.Array]:
  """[128, 128 + columns] each -> [128, columns] each.

  Entry (i, j) of a result is entry (i, j - i + 127) of its strip.

  Args:
    strips: float32.
    rows: that are moved at once.
  """

  def move(x, lane, row):
    pieces = _gathered(x, (lane - row - 1) & (LANES - 1))
    chosen = [
      jnp.where(lane > row, b, a) for a, b in itertools.pairwise(pieces)
    ]
    return jnp.concatenate(chosen, axis=1)

  return _by_rows(strips, move, rows)


def unskew(strips: Sequence[jax.Array], rows: int) -> list[jax.Array]:
  """The transposition of `skew`: [128, columns] -> [128, 128 + columns]."""

  def move(x, lane, row):
    nothing = jnp.zeros((rows, LANES), x.dtype)
    pieces = _gathered(x, (lane + row + 1) & (LANES - 1))
    pieces = [nothing, *pieces, nothing]
    before = lane + row < LANES - 1
    chosen = [jnp.where(before, a, b) for a, b in itertools.pairwise(pieces)]
    return jnp.concatenate(chosen, axis=1)

  return _by_rows(strips, move, rows)


def toeplitz(entries: jax.Array, rows: int) -> jax.Array:
  """`skew` of 128 equal rows [1, 128 + columns]: [128, columns].

  Only the first rows are gathered; the others are those, rotated.
  """
  lane, row = _pattern(0, rows)
  equal = jnp.broadcast_to(entries, (rows, entries.shape[1]))
  pieces = _gathered(equal, (lane - row - 1) & (LANES - 1))
  found = []
  for first in range(0, LANES, rows):
    moved = [pltpu.roll(x, first, 1) if first else x for x in pieces]
    later = lane > row + first
    chosen = [jnp.where(later, b, a) for a, b in itertools.pairwise(moved)]
    found.append(jnp.concatenate(chosen, axis=1))
  return jnp.concatenate(found, axis=0)
