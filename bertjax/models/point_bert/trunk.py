"""The Transformer of Point-BERT (Yu et al. 2022, section 3.3).

A pre-norm encoder over the patches of a cloud. What it adds to BERT's parts:
positions, a function of the patches' centres, enter every block anew; queries,
keys and values have no bias; rows skip sublayers at random while training.
"""

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from bertjax.layers.attention import ATTENTION, Attend, SelfAttention
from bertjax.layers.block import Block, pre_norm
from bertjax.layers.feed_forward import FeedForward, gelu
from bertjax.layers.norm import LayerNorm
from bertjax.metrics import flops
from bertjax.models.checks import check_at_least, check_heads, check_rates
from bertjax.models.encoder import Batch, Encoder, HeadStyle, remat_policy
from bertjax.models.point_bert.inputs import (
  CentrePositions,
  PatchEmbeddings,
  grouped,
)
from bertjax.models.point_bert.patch_embedding import check_shrink
from bertjax.models.point_bert.starts import STARTS, kernel_init
from bertjax.registry import lookup
from bertjax.reuse import Partial

_EPSILON = 1e-5


class PointEncoder(Encoder):
  """An encoder of clouds of points, [CLS] and one position for each patch.

  Attributes:
    patches: of a cloud, g.
    patch_size: points of a patch, m.
    skip_near_origin: see `points.farthest_point_sampling`.
  """

  patches: int = 64
  patch_size: int = 32
  skip_near_origin: bool = False

  @property
  def least_points(self) -> int:
    """Of a cloud that can be cut into patches."""
    return max(self.patches, self.patch_size)

  def prepare(self, batch: Batch) -> Batch:
    """The batch with the `patches` of its `points`, if it has none yet."""
    return grouped(
      batch,
      patches=self.patches,
      size=self.patch_size,
      skip_near_origin=self.skip_near_origin,
    )

  def cloud_flops(self, num_points: int) -> float:
    """FLOPs of the matrix products of one cloud's forward pass."""
    cloud = jax.ShapeDtypeStruct((1, num_points, 3), jnp.float32)
    alone = self.clone(parent=None, name=None)
    return flops.products(
      lambda x: alone.init(jax.random.key(0), {"points": x}), cloud
    )


def point_bert(
  *,
  patches: int = 64,
  patch_size: int = 32,
  skip_near_origin: bool = False,
  num_layers: int = 12,
  emb_dim: int = 384,
  num_heads: int = 6,
  mlp_dim: int | None = None,
  patch_features: int = 256,
  shrink: int = 1,
  start: str = "pretraining",
  dropout_rate: float = 0.0,
  attention_dropout_rate: float | None = None,
  drop_path_rate: float = 0.1,
  scan: bool = True,
  unroll: int = 1,
  remat: str = "auto",
  keep_layers: bool = False,
  dtype: Dtype = jnp.float32,
  attend: str | Attend = "flash",
) -> PointEncoder:
  """An encoder of point clouds, of the published size by default.

  Its rows have [CLS] and one position for each patch. The number of patches and
  points is no matter of its parameters.

  Args:
    patches: of a cloud, g.
    patch_size: points of a patch, m.
    skip_near_origin: see `points.farthest_point_sampling`.
    num_layers: depth l.
    emb_dim: model width e.
    num_heads: heads h, which must divide e.
    mlp_dim: feed-forward width f, 4 e by default.
    patch_features: width of the vector that `MiniPointNet` makes of a patch.
    shrink: by what the widths within `MiniPointNet` are divided.
    start: key of `STARTS`.
    dropout_rate: of sublayer outputs.
    attention_dropout_rate: of attention weights; None: `dropout_rate`.
    drop_path_rate: see `Encoder`.
    scan: see `Encoder`.
    unroll: see `Encoder`.
    remat: see `Encoder`.
    keep_layers: see `Encoder`.
    dtype: compute dtype; parameters are float32.
    attend: key of `ATTENTION`, or an implementation.

  Raises:
    ValueError: an unknown name, a number or rate out of range, or heads that do
      not divide the width.
  """
  if mlp_dim is None:
    mlp_dim = 4 * emb_dim
  if attention_dropout_rate is None:
    attention_dropout_rate = dropout_rate
  check_at_least(
    1,
    patches=patches,
    patch_size=patch_size,
    num_layers=num_layers,
    emb_dim=emb_dim,
    num_heads=num_heads,
    mlp_dim=mlp_dim,
    patch_features=patch_features,
    unroll=unroll,
  )
  check_shrink(shrink)
  check_heads(num_heads, emb_dim)
  check_rates(
    dropout_rate=dropout_rate,
    attention_dropout_rate=attention_dropout_rate,
    drop_path_rate=drop_path_rate,
  )
  remat_policy(remat)
  if isinstance(attend, str):
    attend = lookup(ATTENTION, attend, "model.attend")
  values = lookup(STARTS, start, "model.start")
  make_norm = Partial(LayerNorm, epsilon=_EPSILON, dtype=dtype)
  mixer = Partial(
    SelfAttention,
    num_heads=num_heads,
    head_dim=emb_dim // num_heads,
    attend=attend,
    dropout_rate=attention_dropout_rate,
    dtype=dtype,
    projection_bias=False,
    kernel_init=kernel_init,
    name="attention",
  )
  feed_forward = Partial(
    FeedForward,
    mlp_dim=mlp_dim,
    activation=gelu,
    dtype=dtype,
    kernel_init=kernel_init,
    name="mlp",
  )
  block = Partial(
    Block,
    mixer=mixer,
    feed_forward=feed_forward,
    norm=Partial(make_norm, in_loop=scan and unroll < num_layers),
    residual=pre_norm,
    dropout_rate=dropout_rate,
  )
  inputs = dict(emb_dim=emb_dim, start=values, dtype=dtype)
  return PointEncoder(
    make_embeddings=Partial(
      PatchEmbeddings, features=patch_features, shrink=shrink, **inputs
    ),
    make_block=block,
    num_layers=num_layers,
    style=HeadStyle(None, emb_dim, gelu, _EPSILON, dtype),
    make_final_norm=make_norm,
    make_positions=Partial(CentrePositions, **inputs),
    patches=patches,
    patch_size=patch_size,
    skip_near_origin=skip_near_origin,
    drop_path_rate=drop_path_rate,
    scan=scan,
    unroll=unroll,
    remat=remat,
    keep_layers=keep_layers,
  )
