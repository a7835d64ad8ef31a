"""Position-wise feed-forward layers."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from bertjax.layers.linear import Linear, bert_init
from bertjax.layers.matmul import finished

# What remat policies call the input of the activation.
INNER = "mlp_inner"


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x), the erf form that published PyTorch BERTs were exported with."""
  return jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
  """The tanh approximation that the original BERT was trained with."""
  return jax.nn.gelu(x, approximate=True)


def _gelu_tanh_forward(x):
  return gelu_tanh(x), x


def _gelu_tanh_backward(x, g):
  # The tanh is computed again: cheaper than keeping it. The barrier keeps XLA
  # from finding out that it has it already.
  slope = jax.lax.optimization_barrier(jnp.asarray((2 / np.pi) ** 0.5, x.dtype))
  square = x * x
  t = jnp.tanh(slope * x * (1 + 0.044715 * square))
  inner = slope * (1 + 3 * 0.044715 * square)
  return (g * 0.5 * (1 + t + x * (1 - t * t) * inner),)


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_tanh_backward)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": gelu,
  "gelu_tanh": gelu_tanh,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "tanh": jnp.tanh,
}


class FeedForward(nn.Module):
  """Two linear maps around an activation, which is computed in float32.

  Attributes:
    mlp_dim: inner width f.
    activation: applied between the two maps.
    dtype: compute dtype.
    kernel_init: initializer of both kernels.
  """

  mlp_dim: int
  activation: Callable[[jax.Array], jax.Array] = gelu_tanh
  dtype: Dtype = jnp.float32
  kernel_init: Initializer = bert_init

  @nn.compact
  def __call__(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
    inner = Linear(
      "bte,ef->btf",
      (self.mlp_dim,),
      ("embed", "mlp"),
      dtype=self.dtype,
      kernel_init=self.kernel_init,
      name="up",
    )(x)
    inner = checkpoint_name(inner, INNER)
    inner = self.activation(inner.astype(jnp.float32)).astype(self.dtype)
    outer = Linear(
      "btf,fe->bte",
      (x.shape[-1],),
      ("mlp", "embed"),
      dtype=self.dtype,
      kernel_init=self.kernel_init,
      name="down",
    )(inner)
    return finished(outer)
