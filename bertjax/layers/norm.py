"""Layer normalisation (Ba et al. 2016, arXiv:1607.06450) as BERT uses it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from bertjax.parallel.sharding import platform

# What remat policies call the mean and inverse deviation of every row.
STATISTICS = "norm_statistics"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  in_loop: bool = False,
) -> jax.Array:
  """Normalises the last axis in float32; returns float32.

  The backward pass keeps `x` in its own dtype and two numbers per row; left to
  autodiff it would keep three float32 arrays of the size of `x`.

  Args:
    x: [..., e].
    scale: [e].
    bias: [e].
    epsilon: added to the variance.
    in_loop: whether it is kept in stacks, by a loop over layers. Numbers of
      rows have the name `STATISTICS` then, and x is read from its stack; out of
      a loop a TPU is faster without either.
  """
  return _forward(x, scale, bias, epsilon, in_loop)[0]


def _along_rows(vector: jax.Array, x: jax.Array) -> jax.Array:
  return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _forward(x, scale, bias, epsilon, in_loop):
  kept = x
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x - mean).mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + epsilon)
  if in_loop:
    # Without the axis of length 1, which a TPU would pad.
    mean, inverse = (
      checkpoint_name(row.squeeze(-1), STATISTICS)[..., None]
      for row in (mean, inverse)
    )
  normed = (x - mean) * inverse
  y = normed * _along_rows(scale, x) + _along_rows(bias, x)
  return y, (kept, scale, mean, inverse)


def _backward(epsilon, in_loop, residuals, g):
  del epsilon
  if not (in_loop and platform() == "tpu"):
    # Keeps XLA from keeping its float32 copies instead. In a loop it cannot,
    # and a TPU would copy x out of its stack for this.
    residuals = jax.lax.optimization_barrier(residuals)
  x, scale, mean, inverse = residuals
  normed = (x.astype(jnp.float32) - mean) * inverse
  rows = tuple(range(x.ndim - 1))
  scaled = g * _along_rows(scale, x)
  # The parts of the gradient that a row's mean and variance take away.
  along = (scaled * normed).mean(-1, keepdims=True)
  dx = inverse * (scaled - scaled.mean(-1, keepdims=True) - normed * along)
  return dx.astype(x.dtype), (g * normed).sum(rows), g.sum(rows)


layer_norm.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
  """LayerNorm over the model width.

  Attributes:
    epsilon: added to the variance; 1e-12 in BERT, 1e-5 in RoBERTa.
    dtype: dtype of the output; statistics and parameters are float32.
    in_loop: see `layer_norm`.
  """

  epsilon: float = 1e-12
  dtype: Dtype = jnp.float32
  in_loop: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = (x.shape[-1],)
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
      width,
      jnp.float32,
    )
    bias = self.param(
      "bias",
      nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
      width,
      jnp.float32,
    )
    y = layer_norm(x, scale, bias, self.epsilon, self.in_loop)
    return y.astype(self.dtype)
