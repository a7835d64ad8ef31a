"""Dropout (Srivastava et al. 2014) that spends few random bits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
  """Boolean mask that is False with probability `rate`, to within 2**-17.

  One 32-bit word decides two elements: random bits are the costliest part of
  dropout on every platform.

  Args:
    key: PRNG key.
    shape: of the mask; the last dimension may be odd.
    rate: probability of False.
  """
  *lead, last = shape
  words = jax.random.bits(key, (*lead, (last + 1) // 2), jnp.uint32)
  halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
  halves = halves.reshape(*lead, -1)[..., :last]
  return halves >= np.uint16(min(round(rate * 2**16), 2**16 - 1))


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
