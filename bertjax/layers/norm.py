"""Layer normalisation (Ba et al. 2016, arXiv:1607.06450) as BERT uses it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Normalises the last axis in float32; returns float32.

  The backward pass keeps `x` in its own dtype and two numbers per row; left to
  autodiff it would keep three float32 arrays of the size of `x`.
  """
  return _forward(x, scale, bias, epsilon)[0]


def _along_rows(vector: jax.Array, x: jax.Array) -> jax.Array:
  return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _forward(x, scale, bias, epsilon):
  kept = x
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x - mean).mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + epsilon)
  normed = (x - mean) * inverse
  y = normed * _along_rows(scale, x) + _along_rows(bias, x)
  return y, (kept, scale, mean, inverse)


def _backward(epsilon, residuals, g):
  del epsilon
  # The barrier keeps XLA from keeping its float32 copies instead.
  x, scale, mean, inverse = jax.lax.optimization_barrier(residuals)
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
  """

  epsilon: float = 1e-12
  dtype: Dtype = jnp.float32

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
    return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)
