"""A vector for each patch of points."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from bertjax.layers.batch_norm import batch_norm
from bertjax.layers.matmul import einsum

_SHRINKS = (1, 2, 4, 8, 16, 32)


def check_shrink(shrink: int) -> None:
  """Raises ValueError for a `model.shrink` that the widths do not allow."""
  if shrink not in _SHRINKS:
    raise ValueError(
      f"model.shrink={shrink} must be a power of 2, at most {_SHRINKS[-1]}: it"
      " divides widths of 128 and more, which groups of 4 divide."
    )


class SetDense(nn.Module):
  """`nn.Dense` of what is known of a set, joined to what is of a member.

  A set's part is mapped once, and not once for each of its members, which are
  many: the sum of the two products is that of the joined features.

  Attributes:
    features: width of the output.
    dtype: compute dtype.
    kernel_init: initializer of the kernel.
  """

  features: int
  dtype: Dtype = jnp.float32
  kernel_init: Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self, whole: Float[Array, "b g c"], members: Float[Array, "b g m d"]
  ) -> Float[Array, "b g m e"]:
    """Both are mapped by one kernel, the set's features first."""
    split, inputs = whole.shape[-1], whole.shape[-1] + members.shape[-1]
    kernel = self.param("kernel", self.kernel_init, (inputs, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    of_set = einsum("bgc,ce->bge", whole, kernel[:split], self.dtype)
    of_member = einsum("bgmd,de->bgme", members, kernel[split:], self.dtype)
    shared = (of_set + bias[None, None]).astype(self.dtype)
    return of_member.astype(self.dtype) + shared[:, :, None]


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
    x = SetDense(
      512 // self.shrink, self.dtype, self.kernel_init, name="patch_in"
    )(x.max(axis=-2), x)
    x = jax.nn.relu(batch_norm(train, "patch_norm", self.dtype)(x))
    return dense(self.features, "patch_out")(x).max(axis=-2)
