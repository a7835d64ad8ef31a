"""A vector for each patch of points."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from bertjax.layers.batch_norm import batch_norm


class MiniPointNet(nn.Module):
  """Patches, as sets of points, to vectors (Qi et al. 2017; section 3.1).

  Attributes:
    features: width of a patch's vector.
    dtype: compute dtype.
    shrink: by what the widths of hidden layers are divided.
    kernel_init: initializer of all kernels.
  """

  features: int = 256
  dtype: Dtype = jnp.float32
  shrink: int = 1
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self, patches: Float[Array, "b g m 3"], *, train: bool
  ) -> Float[Array, "b g e"]:
    def dense(width, name):
      return nn.Dense(
        width, dtype=self.dtype, kernel_init=self.kernel_init, name=name
      )

    x = dense(128 // self.shrink, "point_in")(patches)
    x = jax.nn.relu(batch_norm(train, "point_norm", self.dtype)(x))
    x = dense(256 // self.shrink, "point_out")(x)
    whole = x.max(axis=-2, keepdims=True)
    x = jnp.concatenate([jnp.broadcast_to(whole, x.shape), x], axis=-1)
    x = dense(512 // self.shrink, "patch_in")(x)
    x = jax.nn.relu(batch_norm(train, "patch_norm", self.dtype)(x))
    return dense(self.features, "patch_out")(x).max(axis=-2)
