"""Features of patches carried back to points, for part segmentation.

Point-BERT, appendix, after PointNet++ (Qi et al. 2017) and DGCNN (Wang et al.
2019). Channels come in the order of the released weights.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from bertjax import points
from bertjax.layers.batch_norm import batch_norm
from bertjax.layers.largest import largest
from bertjax.models.point_bert.dgcnn import NEIGHBOURS, convolved, edges


class Carry(nn.Module):
  """Interpolates features at other points and maps them there, twice.

  Attributes:
    widths: of the two maps, each followed by BatchNorm and ReLU.
    dtype: compute dtype.
  """

  widths: tuple[int, int]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    targets: Float[Array, "b n 3"],
    own: Float[Array, "b n c"],
    centres: Float[Array, "b g 3"],
    features: Float[Array, "b g e"],
    *,
    train: bool,
  ) -> Float[Array, "b n f"]:
    """Features of the targets.

    Args:
      targets: where features are wanted.
      own: what the targets know themselves; it comes first.
      centres: where features are known.
      features: of the centres.
      train: whether BatchNorm takes the batch's statistics.
    """
    carried = points.interpolate(targets, centres, features)
    x = jnp.concatenate([own.astype(carried.dtype), carried], axis=-1)
    for i, width in enumerate(self.widths):
      x = nn.Dense(width, dtype=self.dtype, name=f"dense_{i}")(x)
      x = jax.nn.relu(batch_norm(train, f"norm_{i}", self.dtype)(x))
    return x


class Refine(nn.Module):
  """Two edge convolutions: towards sparser points, then among its own.

  Attributes:
    widths: of the two.
    dtype: compute dtype.
  """

  widths: tuple[int, int]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    targets: Float[Array, "b n 3"],
    own: Float[Array, "b n e"],
    centres: Float[Array, "b g 3"],
    features: Float[Array, "b g e"],
  ) -> Float[Array, "b n f"]:
    """Features of the targets, arguments as those of `Carry`."""
    for i, width in enumerate(self.widths):
      count = min(NEIGHBOURS, centres.shape[1])
      index, _ = points.nearest(targets, centres, count)
      x = edges(own, features, index)
      own = largest(convolved(x, width, f"edge_{i}", self.dtype), 2)
      centres, features = targets, own
    return own
