"""Signs, 32 to a word, and which tensors share words."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped, UInt32

from bertjax.parallel.grids import (
  BITS,
  LANES,
  LONG,
  REGISTER,
  Grid,
  pad,
  round_up,
)


def pack_signs(
  positive: Bool[Array, "n lines lanes"],
) -> UInt32[Array, "n words lanes"]:
  """32 signs to a word, of 32 lines; the i-th of them is bit i.

  The lines of a word are neighbours, or if possible stand as far apart as a TPU
  has lines in a register: then nothing is moved across lines.
  """
  chunks, lines, lanes = positive.shape
  words = -(-lines // BITS)
  positive = pad(positive, words * BITS)
  positive = positive.reshape(chunks, -1, BITS, _apart(words), lanes)
  # Not `positive << shift`: XLA would convert it to words in the old shape.
  bits = jnp.where(positive, jnp.uint32(1) << _shifts(), jnp.uint32(0))
  bits = jnp.sum(bits, axis=2, dtype=jnp.uint32)
  return bits.reshape(chunks, words, lanes)


def unpack_signs(
  words: UInt32[Array, "n words lanes"],
) -> Bool[Array, "n lines lanes"]:
  """The signs that `pack_signs` packed, padding included: is it positive?"""
  chunks, count, lanes = words.shape
  words = words.reshape(chunks, -1, 1, _apart(count), lanes)
  positive = ((words >> _shifts()) & jnp.uint32(1)).astype(bool)
  return settled(positive).reshape(chunks, count * BITS, lanes)


def settled(positive: Array) -> Array:
  """The same signs; what they come from is not computed in another shape.

  Across a change of shape XLA fuses nothing. What it writes to memory there is
  then a byte per sign, not the four of a number or a word.
  """
  return jax.lax.optimization_barrier(positive)


def _apart(words: int) -> int:
  """Lines from one sign of a word to the next."""
  return 1 if words % REGISTER else REGISTER


def _shifts() -> UInt32[Array, "1 1 b 1 1"]:
  return jnp.arange(BITS, dtype=jnp.uint32)[None, None, :, None, None]


def in_lines(x: Shaped[Array, "n ..."]) -> Shaped[Array, "n lines lanes"]:
  """Lines of LANES, the last one padded."""
  if x.shape[-1] != LANES:
    x = x.reshape(x.shape[0], -1)
    x = pad(x, round_up(x.shape[1], LANES))
  return x.reshape(x.shape[0], -1, LANES)


def sign_lines(grids: Iterable[Grid]) -> list[int]:
  """By tensor, lines of LANES that its signs take in a chunk."""
  return [-(-grid.rows * grid.piece // LANES) for grid in grids]


class Group(NamedTuple):
  """Tensors whose signs are packed together.

  Attributes:
    members: which.
    lines: of their signs in a chunk, padding included.
  """

  members: list[int]
  lines: int

  @property
  def words(self) -> int:
    """Lines of words."""
    return self.lines // BITS


def groups_of(grids: Sequence[Grid]) -> list[Group]:
  """Tensors alone; those in whole registers; the rest, which misalign them."""
  lines = sign_lines(grids)
  found = [Group([i], lines[i]) for i, grid in enumerate(grids) if grid.alone]
  others = [i for i, grid in enumerate(grids) if not grid.alone]
  whole = [i for i in others if lines[i] % REGISTER == 0]
  rest = [i for i in others if lines[i] % REGISTER]
  for members in (whole, rest):
    total = sum(lines[i] for i in members)
    # Words in whole registers, too, where that adds less than 1 / LONG.
    unit = BITS * REGISTER
    unit = unit if total >= unit * LONG else BITS
    if total:
      found.append(Group(members, round_up(total, unit)))
  return found
