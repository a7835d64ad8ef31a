"""Layer normalisation (Ba et al. 2016, arXiv:1607.06450) as BERT uses it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Normalises the last axis in float32; returns float32."""
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  centred = x - mean
  variance = jnp.square(centred).mean(-1, keepdims=True)
  shape = (1,) * (x.ndim - 1) + scale.shape
  normed = centred * jax.lax.rsqrt(variance + epsilon)
  return normed * scale.reshape(shape) + bias.reshape(shape)


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
