"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382).

In training a row skips a sublayer with some probability, which grows from layer
to layer; what is kept is scaled up, so that its mean is what it is without.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bertjax.parallel import sharding


def linear_rates(num_layers: int, last: float) -> Float[Array, " l"] | None:
  """Rates of the layers, from 0 in the first to `last`; None if all are 0.

  A single layer is the last one.
  """
  if not last:
    return None
  if num_layers == 1:
    return jnp.full(1, last, jnp.float32)
  return jnp.linspace(0.0, last, num_layers, dtype=jnp.float32)


def drop_path(
  x: Float[Array, "b *n"], key: jax.Array, rate: Float[Array, ""] | float
) -> Float[Array, "b *n"]:
  """Zeroes whole rows with probability `rate` and rescales the others.

  Args:
    x: rows.
    key: PRNG key.
    rate: in [0, 1), the same for all rows.
  """
  rows = x.shape[0]
  shape = (sharding.global_rows(rows),) + (1,) * (x.ndim - 1)
  kept = jax.random.bernoulli(key, 1.0 - rate, shape)
  kept = jax.lax.dynamic_slice_in_dim(kept, sharding.first_row(rows), rows)
  scaled = (x.astype(jnp.float32) / (1.0 - rate)).astype(x.dtype)
  return jnp.where(kept, scaled, jnp.zeros_like(x))


class DropPath(nn.Module):
  """`drop_path` that draws from the "dropout" stream when training."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b *n"],
    rate: Float[Array, ""] | None,
    *,
    train: bool,
  ) -> Float[Array, "b *n"]:
    """x without the rows that skip it; all of it if there is no rate."""
    if not train or rate is None:
      return x
    return drop_path(x, self.make_rng("dropout"), rate)
