"""Farthest point sampling."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from bertjax.parallel.sharding import parts, platform
from kernels import farthest_points

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
  largest; of equals the first. There is no derivative.

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
  points = jax.lax.stop_gradient(points).astype(jnp.float32)
  # Coordinates first: the long axis last is what vectors are made of.
  rows = points.transpose(2, 0, 1)
  first = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (b,))
  distances = jnp.full((b, n), jnp.inf, jnp.float32)
  if skip_near_origin:
    near = (rows**2).sum(0) <= _NEAR_ORIGIN
    distances = jnp.where(near, -1.0, distances)

  if platform() == "tpu" and farthest_points.fits(n):
    return _by_kernel(rows, distances, first, count)
  return _by_loop(rows, distances, first, count)


def _by_loop(
  rows: Float[Array, "3 b n"],
  distances: Float[Array, "b n"],
  first: Int[Array, " b"],
  count: int,
) -> Int[Array, "b g"]:
  n = rows.shape[2]
  places = jnp.arange(n, dtype=jnp.int32)[None]

  def choose(carry, _):
    distances, last = carry
    # Sums written out, and two passes for `argmax`: what CPUs make vectors of.
    x, y, z = (
      jnp.square(row - jnp.take_along_axis(row, last[:, None], axis=1))
      for row in rows
    )
    distances = jnp.minimum(distances, x + y + z)
    most = distances.max(1, keepdims=True)
    following = jnp.where(distances == most, places, n - 1).min(1)
    return (distances, following), last

  _, found = jax.lax.scan(choose, (distances, first), length=count)
  return found.T


def _by_kernel(
  rows: Float[Array, "3 b n"],
  distances: Float[Array, "b n"],
  first: Int[Array, " b"],
  count: int,
) -> Int[Array, "b g"]:
  """By the TPU's kernel, each device of the clouds that it has."""
  mesh = jax.sharding.get_abstract_mesh()

  def local(rows, distances, first):
    return farthest_points.farthest_points(rows, distances, first, count)

  if not mesh.auto_axes:
    return local(rows, distances, first)
  (axes,) = parts(first.shape, ("batch",))
  clouds = PartitionSpec(axes or None)
  return jax.shard_map(
    local,
    in_specs=(PartitionSpec(None, axes or None), clouds, clouds),
    out_specs=clouds,
    # All axes: the partitioner must not get to see a kernel.
    axis_names=set(mesh.auto_axes),
    check_vma=False,
  )(rows, distances, first)
