"""Nearest neighbours and what is read from them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from bertjax.parallel.sharding import platform

_FEW = 4  # neighbours that are looked for one by one


def squared_distances(
  a: Float[Array, "b n 3"], b: Float[Array, "b m 3"]
) -> Float[Array, "b n m"]:
  """Of all pairs, float32."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return sum(
    (a[:, :, None, axis] - b[:, None, :, axis]) ** 2 for axis in range(3)
  )


def nearest(
  queries: Float[Array, "b g 3"], points: Float[Array, "b n 3"], count: int
) -> tuple[Int[Array, "b g k"], Float[Array, "b g k"]]:
  """Indices and squared distances of the nearest points, the nearest first.

  A query that is one of the points is its own neighbour.

  Args:
    queries: whose neighbours are looked for.
    points: among which.
    count: how many neighbours k.

  Raises:
    ValueError: `count` is not in 1..n.
  """
  n = points.shape[1]
  if not 1 <= count <= n:
    raise ValueError(f"count={count} must be between 1 and {n}, the points.")
  distances = squared_distances(queries, points)
  if count <= _FEW and platform() == "tpu":
    return _few_smallest(distances, count)
  negative, index = jax.lax.top_k(-distances, count)
  return index, -negative


def _few_smallest(
  x: Float[Array, "b g n"], count: int
) -> tuple[Int[Array, "b g k"], Float[Array, "b g k"]]:
  """What `top_k` says of -x, by a pass for each; TPUs would sort for that one.

  Of three neighbours among 512 a sixth of the cycles; CPUs take four times as
  long as for `top_k`.
  """
  places = jax.lax.broadcasted_iota(jnp.int32, x.shape, 2)
  indices, values = [], []
  for _ in range(count):
    index = jax.lax.argmin(jax.lax.stop_gradient(x), 2, jnp.int32)
    here = places == index[..., None]
    indices.append(index)
    values.append(jnp.where(here, x, 0).sum(-1))
    x = jnp.where(here, jnp.inf, x)
  return jnp.stack(indices, -1), jnp.stack(values, -1)


def gather(
  features: Shaped[Array, "b n c"], index: Int[Array, "b *k"]
) -> Shaped[Array, "b *k c"]:
  """Features of the points with these indices."""
  return jax.vmap(lambda x, i: x[i])(features, index)


def interpolate(
  targets: Float[Array, "b n 3"],
  points: Float[Array, "b g 3"],
  features: Float[Array, "b g c"],
  count: int = 3,
  epsilon: float = 1e-8,
) -> Float[Array, "b n c"]:
  """Features carried from points to targets, weighted by inverse squares.

  Args:
    targets: where features are wanted.
    points: where they are known.
    features: of the points.
    count: nearest points that are averaged; fewer where there are fewer.
    epsilon: added to squared distances.
  """
  index, distances = nearest(targets, points, min(count, points.shape[1]))
  weights = 1 / (distances + epsilon)
  weights /= weights.sum(-1, keepdims=True)
  weights = weights.astype(features.dtype)
  return jnp.einsum("bnkc,bnk->bnc", gather(features, index), weights)
