"""Edge convolutions between neighbouring patches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from bertjax import points

_GROUPS, _NEIGHBOURS = 4, 4
_WIDTHS = (256, 512, 512, 1024)


def _leaky_relu(x: jax.Array) -> jax.Array:
  return jax.nn.leaky_relu(x, 0.2)


class DGCNN(nn.Module):
  """Features of patches from those of their neighbours (Wang et al. 2019).

  The neighbours are the nearest centres, a patch itself among them, and the
  same for all four edge convolutions.

  Attributes:
    features: width of the output.
    dtype: compute dtype.
    shrink: by what the widths of hidden layers are divided.
  """

  features: int
  dtype: Dtype = jnp.float32
  shrink: int = 1

  @nn.compact
  def __call__(
    self, x: Float[Array, "b g c"], centres: Float[Array, "b g 3"]
  ) -> Float[Array, "b g e"]:
    count = min(_NEIGHBOURS, centres.shape[1])
    index, _ = points.nearest(centres, centres, count)
    x = nn.Dense(128 // self.shrink, dtype=self.dtype, name="input")(x)
    kept = []
    for number, width in enumerate(_WIDTHS):
      around = points.gather(x, index)
      middle = jnp.broadcast_to(x[:, :, None], around.shape)
      edges = jnp.concatenate([around - middle, middle], axis=-1)
      width //= self.shrink
      x = self._convolved(edges, width, f"edge_{number}").max(axis=2)
      kept.append(x)
    return self._convolved(
      jnp.concatenate(kept, axis=-1), self.features, "output"
    )

  def _convolved(self, x: jax.Array, width: int, name: str) -> jax.Array:
    x = nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)(x)
    norm = nn.GroupNorm(
      _GROUPS, epsilon=1e-5, dtype=self.dtype, name=f"{name}_norm"
    )
    return _leaky_relu(norm(x))
