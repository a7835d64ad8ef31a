"""Edge convolutions between neighbouring patches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from bertjax import points
from bertjax.layers.largest import largest

_GROUPS, NEIGHBOURS = 4, 4
_WIDTHS = (256, 512, 512, 1024)


def _leaky_relu(x: jax.Array) -> jax.Array:
  return jax.nn.leaky_relu(x, 0.2)


def edges(
  own: Float[Array, "b n c"],
  features: Float[Array, "b g c"],
  index: Int[Array, "b n k"],
) -> Float[Array, "b n k d"]:
  """What neighbours have more than a point itself, then the point: d = 2 c.

  Args:
    own: features of the points.
    features: of what their neighbours are among.
    index: of the neighbours.
  """
  around = points.gather(features, index)
  middle = jnp.broadcast_to(own[:, :, None], around.shape)
  return jnp.concatenate([around - middle, middle], axis=-1)


def convolved(
  x: Float[Array, "*n c"], width: int, name: str, dtype: Dtype
) -> Float[Array, "*n d"]:
  """A map of each point, GroupNorm and LeakyReLU; in a module's own method."""
  x = nn.Dense(width, use_bias=False, dtype=dtype, name=name)(x)
  norm = nn.GroupNorm(_GROUPS, epsilon=1e-5, dtype=dtype, name=f"{name}_norm")
  return _leaky_relu(norm(x))


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
    count = min(NEIGHBOURS, centres.shape[1])
    index, _ = points.nearest(centres, centres, count)
    x = nn.Dense(128 // self.shrink, dtype=self.dtype, name="input")(x)
    kept = []
    for number, width in enumerate(_WIDTHS):
      width //= self.shrink
      x = convolved(edges(x, x, index), width, f"edge_{number}", self.dtype)
      x = largest(x, 2)
      kept.append(x)
    whole = jnp.concatenate(kept, axis=-1)
    return convolved(whole, self.features, "output", self.dtype)
