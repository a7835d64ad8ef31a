"""Chamfer distances between clouds, in memory linear in their size."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bertjax.points.neighbours import gather, squared_distances

_CHUNK = 512  # points whose distances to all others are held at a time


class Chamfer(NamedTuple):
  """Squared distances of every point to the nearest of the other cloud.

  Attributes:
    forward: from the first cloud to the second.
    backward: from the second to the first.
  """

  forward: Float[Array, "b n"]
  backward: Float[Array, "b m"]

  @property
  def l2(self) -> Float[Array, " b"]:
    """CD-L2: the means of squared distances, added."""
    return self.forward.mean(-1) + self.backward.mean(-1)

  @property
  def l1(self) -> Float[Array, " b"]:
    """CD-L1: half the sum of the means of distances."""
    return (_root(self.forward).mean(-1) + _root(self.backward).mean(-1)) / 2

  def f_score(self, threshold: float = 0.01) -> Float[Array, " b"]:
    """Harmonic mean of the shares of points that are nearer than this."""
    precision = (self.forward < threshold**2).mean(-1)
    recall = (self.backward < threshold**2).mean(-1)
    total = precision + recall
    return jnp.where(
      total > 0, 2 * precision * recall / jnp.maximum(total, 1e-12), 0
    )


def _root(x: jax.Array) -> jax.Array:
  """Square root whose slope at 0 is 0, not infinite."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def chamfer(a: Float[Array, "b n 3"], b: Float[Array, "b m 3"]) -> Chamfer:
  """Nearest distances between two clouds, both ways.

  The table of all pairs exists for 512 points at a time, in the backward pass
  not at all: nearest points are remembered.

  Args:
    a: clouds.
    b: others.

  Raises:
    ValueError: an empty cloud.
  """
  if not (a.shape[1] and b.shape[1]):
    raise ValueError(f"clouds of {a.shape[1]} and {b.shape[1]} points: empty.")
  return Chamfer(*_nearest_both(a.astype(jnp.float32), b.astype(jnp.float32)))


@functools.partial(jax.custom_vjp)
def _nearest_both(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _forward(a, b)[0]


def _forward(a, b):
  batch, n, _ = a.shape
  size = min(_CHUNK, n)
  chunks = -(-n // size)
  # Padding repeats the last point, and is nobody's only nearest one.
  rest = jnp.broadcast_to(a[:, -1:], (batch, chunks * size - n, 3))
  parts = jnp.concatenate([a, rest], 1).reshape(batch, chunks, size, 3)

  def visit(carry, part):
    least, where, first = carry
    table = squared_distances(part, b)
    mine, index = table.min(2), table.argmin(2).astype(jnp.int32)
    theirs = table.min(1)
    closer = theirs < least
    found = first + table.argmin(1).astype(jnp.int32)
    carry = (
      jnp.where(closer, theirs, least),
      jnp.where(closer, found, where),
      first + size,
    )
    return carry, (mine, index)

  m = b.shape[1]
  start = (
    jnp.full((batch, m), jnp.inf, jnp.float32),
    jnp.zeros((batch, m), jnp.int32),
    jnp.zeros((), jnp.int32),
  )
  (backward, to_a, _), (mine, index) = jax.lax.scan(
    visit, start, parts.swapaxes(0, 1)
  )

  def whole(x):
    return x.swapaxes(0, 1).reshape(batch, -1)[:, :n]

  to_a = jnp.minimum(to_a, n - 1)
  return (whole(mine), backward), (a, b, whole(index), to_a)


def _backward(kept, cotangents):
  a, b, to_b, to_a = kept
  forward, backward = cotangents
  pull_a = 2 * (a - gather(b, to_b)) * forward[..., None]
  pull_b = 2 * (b - gather(a, to_a)) * backward[..., None]
  scatter = jax.vmap(lambda x, i, y: x.at[i].add(-y))
  return scatter(pull_a, to_a, pull_b), scatter(pull_b, to_b, pull_a)


_nearest_both.defvjp(_forward, _backward)
