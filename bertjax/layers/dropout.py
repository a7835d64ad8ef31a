"""Dropout (Srivastava et al. 2014) that spends little on random bits."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bertjax.parallel import sharding


def _element_index(shape: tuple[int, ...]) -> jax.Array:
  """Row-major number of every element, modulo 2**32."""
  index = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index += along * np.uint32(stride % 2**32)
    stride *= shape[axis]
  return index


def _mix(x: jax.Array, multiplier: int, shift: int) -> jax.Array:
  x = x * np.uint32(multiplier)
  return x ^ (x >> np.uint32(shift))


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Random 32-bit words: a keyed hash of each element's index.

  Two words drawn from `key` enter three rounds of multiply and xor-shift (the
  finalizer "triple32" of Wellons' hash prospector). Threefry for every element
  costs about six times as much on a CPU. Like it, this gives the same words on
  any mesh, also inside `shard_map` over "data" if the first axis is the batch;
  unlike it, it is meant for dropout only.
  """
  first, second = jax.random.bits(key, (2,), jnp.uint32)
  row, size = jnp.uint32(0), math.prod(shape[1:])
  if shape:
    row += jnp.uint32(sharding.first_row(shape[0]))
  x = _element_index(shape) + (first + row * np.uint32(size % 2**32))
  if shape and sharding.global_rows(shape[0]) * size > 2**32:
    # The index wraps: rows of the first axis get words of their own.
    rows = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) + row
    x ^= _mix(rows, 0x9E3779B1, 15)
  x = _mix(x ^ (x >> np.uint32(17)), 0xED5AD4BB, 11)
  x = _mix(x + second, 0xAC4C1B51, 15)
  return _mix(x, 0x31848BAB, 14)


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Random unsigned words, one per element, by the generator of the key.

  Threefry keys seed `hashed_bits`; "rbg" keys take 16-bit words from the
  platform's own generator, which on a TPU costs least of all, and which gives
  other words on another mesh.
  """
  if str(jax.random.key_impl(key)) in ("rbg", "unsafe_rbg"):
    return _platform_words(key, shape)
  return hashed_bits(key, shape)


def _platform_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """16-bit words of the platform's generator, on each device its own part.

  Left to the partitioner, every device would draw the words of the whole global
  batch and take its slice of them.

  Args:
    key: PRNG key, "rbg" or "unsafe_rbg".
    shape: of activations: rows first, then, if there are three axes, places.
  """
  names = ("batch", "length") if len(shape) == 3 else ("batch",)
  parts = sharding.parts(shape, names[: len(shape)])
  if sharding.split_by_hand("data"):
    key = jax.random.fold_in(key, jax.lax.axis_index("data"))
  if not any(parts):
    return jax.random.bits(key, shape, jnp.uint16)
  mesh = jax.sharding.get_abstract_mesh()
  local = list(shape)
  for i, axes in enumerate(parts):
    local[i] //= math.prod(mesh.shape[axis] for axis in axes)

  def draw(key):
    own = jax.random.fold_in(key, jax.lax.axis_index(sum(parts, ())))
    return jax.random.bits(own, tuple(local), jnp.uint16)

  return jax.shard_map(
    draw,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(*(axes or None for axes in parts)),
    axis_names=set(mesh.auto_axes),
    check_vma=False,  # equal along the other axes, which types can't show
  )(key)


def keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
  """Boolean mask that is False with probability `rate`.

  The probability is exact to half a unit of the words: 2**-33, or 2**-17 for
  "rbg" keys.

  Args:
    key: PRNG key of any generator.
    shape: of the mask.
    rate: probability of False.
  """
  words = random_words(key, shape)
  limit = 2 ** jnp.iinfo(words.dtype).bits
  threshold = min(round(rate * limit), limit - 1)
  return words >= words.dtype.type(threshold)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
  """Zeroes elements with probability `rate` and rescales the others."""
  kept = (x.astype(jnp.float32) / (1.0 - rate)).astype(x.dtype)
  return jnp.where(keep_mask(key, x.shape, rate), kept, jnp.zeros_like(x))


class Dropout(nn.Module):
  """Dropout that draws from the "dropout" stream when training.

  Attributes:
    rate: probability of zeroing, in [0, 1).
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if not train or self.rate == 0.0:
      return x
    return dropout(x, self.make_rng("dropout"), self.rate)
