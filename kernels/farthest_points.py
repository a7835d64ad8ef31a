"""Farthest point sampling as one Pallas kernel for TPUs.

The loop over chosen points is short of work: a step reads a cloud once and asks
for its farthest point, which the next one needs. A loop of XLA's takes six to
twelve times the cycles (`benchmarks.farthest_points`); here clouds and
distances stay in VMEM, clouds side by side in the sublanes, points in lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

_SUBLANES, _LANES = 8, 128
# Clouds of a program: two chains of steps hide each other's latency.
_BLOCK = 2 * _SUBLANES
_VMEM_BYTES = 2**23  # of coordinates and distances of a block


def fits(num_points: int) -> bool:
  """Whether clouds of this size are small enough."""
  return 4 * 4 * _BLOCK * _rounded(num_points, _LANES) <= _VMEM_BYTES


def farthest_points(
  rows: Float[Array, "3 b n"],
  distances: Float[Array, "b n"],
  first: Int[Array, " b"],
  count: int,
  *,
  interpret: bool = False,
) -> Int[Array, "b g"]:
  """Points that are far from each other, by their index.

  Args:
    rows: coordinates of clouds, float32.
    distances: to begin with, float32: infinity, or what a point may not be
      farther than.
    first: the first point of each.
    count: how many points g to choose.
    interpret: run on any platform, for tests.
  """
  _, b, n = rows.shape
  clouds, points = _rounded(b, _SUBLANES), _rounded(n, _LANES)
  block = min(clouds, _BLOCK)
  clouds = _rounded(clouds, block)
  width = _rounded(count, _LANES)
  pad = (0, clouds - b), (0, points - n)
  rows = jnp.pad(rows, ((0, 0), *pad))
  distances = jnp.pad(distances, pad, constant_values=-jnp.inf)  # no point
  first = jnp.pad(first[:, None].astype(jnp.float32), (pad[0], (0, 0)))
  found = pl.pallas_call(
    functools.partial(_kernel, count=count),
    out_shape=jax.ShapeDtypeStruct((clouds, width), jnp.int32),
    grid=(clouds // block,),
    in_specs=[
      pl.BlockSpec((3, block, points), lambda i: (0, i, 0)),
      pl.BlockSpec((block, points), lambda i: (i, 0)),
      pl.BlockSpec((block, 1), lambda i: (i, 0)),
    ],
    out_specs=pl.BlockSpec((block, width), lambda i: (i, 0)),
    scratch_shapes=[pltpu.VMEM((block, points), jnp.float32)],
    interpret=interpret,
    name="farthest_points",
  )(rows, distances, first)
  return found[:b, :count]


def _kernel(rows, start, first, found, distances, *, count):
  distances[...] = start[...]
  # Indices as floats: exact, and what lanes can be reduced in.
  lanes = _places(distances.shape)
  columns = _places(found.shape)

  def choose(step, carry):
    last, chosen = carry
    chosen = jnp.where(columns == step.astype(jnp.float32), last, chosen)
    here = lanes == last
    square = jnp.zeros(distances.shape, jnp.float32)
    for axis in range(3):
      x = rows[axis]
      own = jnp.sum(jnp.where(here, x, 0.0), axis=1, keepdims=True)
      square += (x - own) ** 2
    nearest = jnp.minimum(distances[...], square)
    distances[...] = nearest
    most = jnp.max(nearest, axis=1, keepdims=True)
    after = float(distances.shape[1])
    # Of equals the first.
    following = jnp.where(nearest == most, lanes, after)
    return jnp.min(following, axis=1, keepdims=True), chosen

  _, chosen = jax.lax.fori_loop(
    0, count, choose, (first[...], jnp.zeros(found.shape, jnp.float32))
  )
  found[...] = chosen.astype(jnp.int32)


def _places(shape: tuple[int, int]) -> Float[Array, "b n"]:
  return jax.lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32)


def _rounded(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
