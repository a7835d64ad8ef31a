"""Farthest point sampling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_NEAR_ORIGIN = 1e-3


def farthest_point_sampling(
  points: Float[Array, "b n 3"],
  count: int,
  *,
  start: Int[Array, " b"] | int = 0,
  skip_near_origin: bool = False,
) -> Int[Array, "b g"]:
  """Points that are far from each other, by their index.

  After `start` always the point whose distance to those already chosen is
  largest; of equals the first.

  Args:
    points: clouds.
    count: how many points g to choose.
    start: index of the first one, of all clouds or of each.
    skip_near_origin: never choose a point with a squared norm of 1e-3 or less
      after the first: so do the CUDA kernels that most codes share, which take
      such points for padding.

  Raises:
    ValueError: `count` is not in 1..n.
  """
  b, n, _ = points.shape
  if not 1 <= count <= n:
    raise ValueError(f"count={count} must be between 1 and {n}, the points.")
  points = points.astype(jnp.float32)
  # Coordinates first: the long axis last is what vectors are made of.
  rows = points.transpose(2, 0, 1)
  first = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (b,))
  distances = jnp.full((b, n), jnp.inf, jnp.float32)
  if skip_near_origin:
    near = (rows**2).sum(0) <= _NEAR_ORIGIN
    distances = jnp.where(near, -1.0, distances)

  def choose(carry, _):
    distances, last = carry
    chosen = jnp.take_along_axis(rows, last[None, :, None], axis=2)
    distances = jnp.minimum(distances, ((rows - chosen) ** 2).sum(0))
    following = distances.argmax(1).astype(jnp.int32)
    return (distances, following), last

  _, found = jax.lax.scan(choose, (distances, first), length=count)
  return found.T
