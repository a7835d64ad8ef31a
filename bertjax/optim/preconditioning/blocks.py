"""Factors in diagonal blocks: d x d becomes k blocks of about d/k x d/k.

A side that is k times as wide as its blocks takes 1/k of the memory and of the
work, and forgets how features of different blocks are correlated.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How one side of a layer is divided.

  Blocks are equally wide; the last is padded, by less than their number. A side
  that is one block has no axis of blocks.

  Attributes:
    width: d of the side.
    most: widest block; None for no limit.
  """

  width: int
  most: int | None = None

  @property
  def number(self) -> int:
    """k."""
    return 1 if self.most is None else math.ceil(self.width / self.most)

  @property
  def block(self) -> int:
    """Width w of a block."""
    return math.ceil(self.width / self.number)

  def identity(
    self, stack: Sequence[int], dtype: str
  ) -> Float[Array, "*blocks w w"]:
    """The factor I; `blocks` is the stack, and k if there are several."""
    inner = () if self.number == 1 else (self.number,)
    return jnp.tile(jnp.eye(self.block, dtype=dtype), (*stack, *inner, 1, 1))

  def split(
    self, vectors: Float[Array, "*stack r d"]
  ) -> Float[Array, "*blocks r w"]:
    """Each block's part of vectors, with zeros for padding."""
    if self.number == 1:
      return vectors
    parts = self._padded(vectors, -1)
    shape = (*vectors.shape[:-1], self.number, self.block)
    return jnp.moveaxis(parts.reshape(shape), -2, -3)

  def any(self, flag: Array) -> Array:
    """[*blocks] -> [*stack]: whether it holds for one of a layer's blocks."""
    return flag if self.number == 1 else flag.any(-1)

  def each(self, flag: Array) -> Array:
    """[*stack] -> what broadcasts against [*blocks]."""
    return flag if self.number == 1 else flag[..., None]

  def unpadded(
    self, factor: Float[Array, "*blocks w w"]
  ) -> Float[Array, "*blocks w w"]:
    """The factor with the identity where there is only padding.

    No vector points there, so rules that grow would grow without end.
    """
    padding = self.number * self.block - self.width
    if not padding:
      return factor
    place = jnp.arange(self.number * self.block).reshape(self.number, -1)
    empty = place >= self.width
    empty = empty[:, :, None] | empty[:, None, :]
    empty = empty.reshape((1,) * (factor.ndim - 3) + empty.shape)
    eye = jnp.eye(self.block, dtype=factor.dtype)
    return jnp.where(empty, jnp.broadcast_to(eye, factor.shape), factor)

  def times(
    self,
    factor: Float[Array, "*blocks w w"],
    matrix: Float[Array, "*stack d n"],
  ) -> Float[Array, "*stack d n"]:
    """The block-diagonal matrix of the factor, by a matrix."""
    if self.number == 1:
      return factor @ matrix
    parts = self._padded(matrix, -2)
    stack, columns = matrix.shape[:-2], matrix.shape[-1]
    parts = parts.reshape(*stack, self.number, self.block, columns)
    found = (factor @ parts).reshape(*stack, -1, columns)
    return found[..., : self.width, :]

  def _padded(self, x: Array, axis: int) -> Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, self.number * self.block - self.width)
    return jnp.pad(x, pads)
