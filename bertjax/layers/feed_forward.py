"""Position-wise feed-forward layers."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from bertjax.layers.linear import Linear


def gelu(x: jax.Array) -> jax.Array:
  """x Phi(x), the erf form that published PyTorch BERTs were exported with."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """The tanh approximation that the original BERT was trained with."""
  return jax.nn.gelu(x, approximate=True)


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
  """

  mlp_dim: int
  activation: Callable[[jax.Array], jax.Array] = gelu_tanh
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
    inner = Linear(
      "bte,ef->btf",
      (self.mlp_dim,),
      ("embed", "mlp"),
      dtype=self.dtype,
      name="up",
    )(x)
    inner = self.activation(inner.astype(jnp.float32)).astype(self.dtype)
    return Linear(
      "btf,fe->bte",
      (x.shape[-1],),
      ("mlp", "embed"),
      dtype=self.dtype,
      name="down",
    )(inner)
