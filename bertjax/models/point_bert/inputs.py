"""What Point-BERT's Transformer reads: patches of a cloud, and where they are.

A batch holds `points` [b, n, 3], or the `patches` that `grouped` makes of them.
Pre-training adds which of them are `masked`, and where embeddings come from.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from bertjax import points
from bertjax.layers.feed_forward import gelu
from bertjax.layers.linear import Linear
from bertjax.models.point_bert.patch_embedding import MiniPointNet
from bertjax.models.point_bert.starts import STARTS, Start, kernel_init

_POSITION_DIM = 128


def grouped(
  batch: Mapping[str, Any],
  *,
  patches: int,
  size: int,
  skip_near_origin: bool = False,
) -> dict[str, Any]:
  """The batch with the `Patches` of its `points`, unless it has some already.

  Args:
    batch: see above.
    patches: how many, g.
    size: points of each, m.
    skip_near_origin: see `points.farthest_point_sampling`.

  Raises:
    ValueError: neither points nor patches, or too few points.
  """
  if "patches" in batch:
    return dict(batch)
  if "points" not in batch:
    raise ValueError(
      f"a batch of {', '.join(batch) or 'nothing'} has no points; use data of"
      " point clouds (data.name='points')."
    )
  cloud = batch["points"]
  if max(patches, size) > cloud.shape[1]:
    raise ValueError(
      f"model.patches={patches} of model.patch_size={size} points cannot be"
      f" made of clouds of {cloud.shape[1]}; both may be at most that."
    )
  made = points.group(cloud, patches, size, skip_near_origin=skip_near_origin)
  return {**batch, "patches": made}


def moved(
  x: Float[Array, "b g e"], sources: Int[Array, "b g"]
) -> Float[Array, "b g e"]:
  """Embeddings from elsewhere in the batch, without gradient.

  Args:
    x: embeddings.
    sources: for each patch, whose embedding it gets: i * g + j for patch j of
      cloud i. Those that keep their own keep its gradient.
  """
  b, g, e = x.shape
  own = jnp.arange(b * g).reshape(b, g)
  others = jax.lax.stop_gradient(x).reshape(b * g, e)[sources]
  return jnp.where((sources == own)[..., None], x, others)


class PatchEmbeddings(nn.Module):
  """[CLS], then a vector for each patch.

  Attributes:
    emb_dim: model width e.
    features: width of `MiniPointNet`.
    shrink: see `MiniPointNet`.
    start: initial values.
    dtype: compute dtype.
  """

  emb_dim: int
  features: int = 256
  shrink: int = 1
  start: Start = STARTS["pretraining"]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, batch: Mapping[str, Any], *, train: bool
  ) -> Float[Array, "b t e"]:
    """Embeds `patches`; `sources` move some of them, `masked` hides some.

    There is a mask vector only for whoever masks: [b, g], True where hidden.
    """
    x = MiniPointNet(
      self.features,
      self.dtype,
      shrink=self.shrink,
      kernel_init=kernel_init,
      name="patches",
    )(batch["patches"].points, train=train)
    x = Linear(
      "bgc,ce->bge",
      (self.emb_dim,),
      (None, "embed"),
      dtype=self.dtype,
      kernel_init=kernel_init,
      name="project",
    )(x)
    if "sources" in batch:
      x = moved(x, batch["sources"])
    if "masked" in batch:
      mask = self.param("mask", kernel_init, (self.emb_dim,), jnp.float32)
      x = jnp.where(batch["masked"][..., None], mask.astype(self.dtype), x)
    cls = self.param("cls", self.start.cls, (self.emb_dim,), jnp.float32)
    return _with_first(cls, x)


class CentrePositions(nn.Module):
  """A position for [CLS], then a function of each patch's centre.

  Attributes:
    emb_dim: model width e.
    start: initial values.
    dtype: compute dtype of the result; coordinates are read in float32.
  """

  emb_dim: int
  start: Start = STARTS["pretraining"]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, batch: Mapping[str, Any]) -> Float[Array, "b t e"]:
    inner = Linear(
      "bgc,cf->bgf",
      (_POSITION_DIM,),
      (None, None),
      kernel_init=kernel_init,
      name="up",
    )(batch["patches"].centres.astype(jnp.float32))
    x = Linear(
      "bgf,fe->bge",
      (self.emb_dim,),
      (None, "embed"),
      dtype=self.dtype,
      kernel_init=kernel_init,
      name="down",
    )(gelu(inner).astype(self.dtype))
    cls = self.param(
      "cls", self.start.cls_position, (self.emb_dim,), jnp.float32
    )
    return _with_first(cls, x)


def _with_first(
  first: Float[Array, " e"], x: Float[Array, "b g e"]
) -> Float[Array, "b t e"]:
  """The same vector before each row."""
  b, _, e = x.shape
  rows = jnp.broadcast_to(first.astype(x.dtype), (b, 1, e))
  return jnp.concatenate([rows, x], axis=1)
