"""A decoder that folds a small grid around each of a few points."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Array, Float

from bertjax.layers.batch_norm import batch_norm
from bertjax.models.point_bert.patch_embedding import SetDense

_FOLD = 4  # fine points of a coarse one
_STEP = 0.05
_GRID = np.array(
  [(x, y) for y in (-_STEP, _STEP) for x in (-_STEP, _STEP)], np.float32
)


class Folding(nn.Module):
  """Patches of points from vectors (Yang et al. 2018; section 3.2).

  Attributes:
    size: points m of a patch, a multiple of 4.
    dtype: compute dtype.
    shrink: by what the widths of hidden layers are divided.

  Raises:
    ValueError: another size.
  """

  size: int
  dtype: Dtype = jnp.float32
  shrink: int = 1

  @nn.compact
  def __call__(
    self, features: Float[Array, "b g e"], *, train: bool
  ) -> tuple[Float[Array, "b g k 3"], Float[Array, "b g m 3"]]:
    """The coarse and the fine patch, relative to its centre, float32."""
    if self.size % _FOLD or self.size < 1:
      raise ValueError(
        f"size={self.size}: a patch has a multiple of {_FOLD} points."
      )

    def dense(width, name):
      return nn.Dense(width, dtype=self.dtype, name=name)

    b, g, _ = features.shape
    wide, narrow = 1024 // self.shrink, 512 // self.shrink
    x = jax.nn.relu(dense(wide, "coarse_in")(features))
    x = jax.nn.relu(dense(wide, "coarse_middle")(x))
    x = dense(3 * (self.size // _FOLD), "coarse_out")(x)
    coarse = x.reshape(b, g, -1, 3)
    anchors = jnp.repeat(coarse, _FOLD, axis=2)
    grid = jnp.tile(jnp.asarray(_GRID, x.dtype), (self.size // _FOLD, 1))
    grid = jnp.broadcast_to(grid, (b, g, *grid.shape))
    x = jnp.concatenate([grid, anchors], axis=-1)
    x = SetDense(narrow, self.dtype, name="fold_0")(features, x)
    x = jax.nn.relu(batch_norm(train, "fold_norm_0", self.dtype)(x))
    x = dense(narrow, "fold_1")(x)
    x = jax.nn.relu(batch_norm(train, "fold_norm_1", self.dtype)(x))
    fine = dense(3, "fold_out")(x) + anchors
    return coarse.astype(jnp.float32), fine.astype(jnp.float32)
