"""Point-BERT's parts of clouds.

Yu et al. 2022, arXiv:2111.14819, section 4.4 and the appendix.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from bertjax import points, registry
from bertjax.layers.batch_norm import NEW_SHARE, averaging, batch_norm
from bertjax.layers.dropout import Dropout
from bertjax.models.point_bert import PointEncoder
from bertjax.models.point_bert.propagation import Carry, Refine
from bertjax.objectives.base import Metrics, Terms
from bertjax.objectives.masked_lm import cross_entropy
from bertjax.objectives.point_fine_tuning import (
  Batch,
  PointFineTuning,
  check_rates,
)
from bertjax.objectives.schedules import Staircase
from bertjax.objectives.step import current_step


class Segmenter(nn.Module):
  """Scores of every point's part from patches after three blocks.

  Attributes:
    num_parts: parts of all categories together, p.
    num_categories: of the objects.
    levels: points of the two clouds between patches and all points.
    emb_dim: model width e.
    dropout_rate: before the last map.
    dtype: compute dtype.
    skip_near_origin: see `points.farthest_point_sampling`.
  """

  num_parts: int
  num_categories: int
  levels: tuple[int, int]
  emb_dim: int
  dropout_rate: float = 0.5
  dtype: Dtype = jnp.float32
  skip_near_origin: bool = False

  @nn.compact
  def __call__(
    self,
    cloud: Float[Array, "b n 3"],
    category: Int[Array, " b"],
    centres: Float[Array, "b g 3"],
    low: Float[Array, "b g e"],
    middle: Float[Array, "b g e"],
    high: Float[Array, "b g e"],
    *,
    train: bool,
  ) -> Float[Array, "b n p"]:
    """Scores, float32, from patches after an early, a later and the last block.

    The finer cloud between them starts from the early block, the coarser from
    the later one; the last one's reach them by way of each other.
    """
    e = self.emb_dim

    def carry(level, *inputs):
      widths = (4 * e, e)
      module = Carry(widths, self.dtype, name=f"carry_{level}")
      return module(*inputs, train=train)

    def refine(level, *inputs):
      # The released widths of 512 and 384 are those of e = 384.
      widths = (4 * (e // 3), e)
      return Refine(widths, self.dtype, name=f"refine_{level}")(*inputs)

    fine = self._thinned(cloud, self.levels[0])
    coarse = fine[:, : self.levels[1]]  # what fewer farthest points would be
    at_coarse = carry(2, coarse, coarse, centres, middle)
    at_fine = carry(1, fine, fine, centres, low)
    at_coarse = refine(2, coarse, at_coarse, centres, high)
    at_fine = refine(1, fine, at_fine, coarse, at_coarse)
    kind = jax.nn.one_hot(category, self.num_categories)
    kind = jnp.broadcast_to(
      kind[:, None], (*cloud.shape[:2], self.num_categories)
    )
    own = jnp.concatenate([kind, cloud.astype(jnp.float32)], axis=-1)
    x = carry(0, cloud, own, fine, at_fine)
    x = nn.Dense(128, dtype=self.dtype, name="dense")(x)
    x = jax.nn.relu(batch_norm(train, "norm", self.dtype)(x))
    x = Dropout(self.dropout_rate)(x, train=train)
    x = nn.Dense(self.num_parts, dtype=self.dtype, name="classes")(x)
    return x.astype(jnp.float32)

  def _thinned(
    self, cloud: Float[Array, "b n 3"], count: int
  ) -> Float[Array, "b m 3"]:
    index = points.farthest_point_sampling(
      cloud, count, skip_near_origin=self.skip_near_origin
    )
    return points.gather(cloud, index)


class PartSegmentation(PointFineTuning):
  """Parts of points: `parts` int32 [b, n], -1 for none, given the `category`.

  Attributes:
    num_parts: parts of all categories together.
    num_categories: of the objects.
    class_parts: by category, its parts; () if unknown.
    labels: names of the categories, () if they have none.
    levels: see `Segmenter`.
    blocks: after which three blocks patches are read, counted from 1.
    dropout_rate: within the head.
    new_share: of a batch in the averages of BatchNorm, by step; see
      `averaging`.
  """

  num_parts: int
  num_categories: int
  class_parts: tuple[tuple[int, ...], ...] = ()
  labels: tuple[str, ...] = ()
  levels: tuple[int, int] = (512, 256)
  blocks: tuple[int, int, int] = (4, 8, 12)
  dropout_rate: float = 0.5
  new_share: Callable[[jax.Array], jax.Array] | None = None
  fresh = ("segmenter",)
  reads = ("points", "category", "parts")

  def setup(self):
    self.segmenter = Segmenter(
      self.num_parts,
      self.num_categories,
      self.levels,
      self.encoder.style.emb_dim,
      self.dropout_rate,
      self.encoder.style.dtype,
      self.encoder.skip_near_origin,
    )

  @property
  def least_points(self) -> int:
    return max(super().least_points, self.levels[0])

  @property
  def coefficients(self) -> dict[str, float]:
    return {"segmentation": 1.0}

  def weights(self, batch: Batch) -> Terms:
    return {"segmentation": (batch["parts"] >= 0).sum().astype(jnp.float32)}

  def logits(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "b n p"]:
    """Scores of all parts for every point, float32."""
    batch = self.encoder.prepare(batch)
    encoded = self.encoder(batch, train=train)
    low, middle, high = (
      self.encoder.normed(encoded.layers[block])[:, 1:] for block in self.blocks
    )
    return self.segmenter(
      batch["points"],
      batch["category"],
      batch["patches"].centres,
      low,
      middle,
      high,
      train=train,
    )

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    step, share, told = current_step(self), NEW_SHARE, {}
    if step is not None and self.new_share is not None:
      share = self.new_share(step)
      told = {"batch_norm_share": (share, jnp.ones((), jnp.float32))}
    with averaging(share):
      logits = self.logits(batch, train=train)
    loss, correct, count = cross_entropy(logits, batch["parts"])
    metrics = {"loss_of_parts": (loss, count), "accuracy": (correct, count)}
    return {"segmentation": loss}, metrics | told


def part_segmentation(
  *,
  encoder: PointEncoder,
  class_parts: Sequence[Sequence[int]],
  labels: Sequence[str] = (),
  levels: Sequence[int] = (512, 256),
  blocks: Sequence[int] | None = None,
  dropout_rate: float = 0.5,
  batch_norm_momentum: Mapping[str, Any] | None = None,
) -> PartSegmentation:
  """See `PartSegmentation`.

  Args:
    encoder: of point clouds.
    class_parts: by category, the numbers of its parts.
    labels: names of the categories.
    levels: see `Segmenter`.
    blocks: see `PartSegmentation`; None: after each third of the stack.
    dropout_rate: within the head.
    batch_norm_momentum: arguments of `Staircase` for the share of a batch in
      the averages of BatchNorm, PyTorch's momentum; None: always 0.1.

  Raises:
    ValueError: no parts, more or fewer names than categories, blocks that the
      encoder does not have, or a rate out of range.
  """
  check_rates(dropout_rate=dropout_rate)
  class_parts = tuple(tuple(map(int, parts)) for parts in class_parts)
  every = {part for parts in class_parts for part in parts}
  if not every or min(every) < 0:
    raise ValueError(
      f"objective.class_parts={class_parts} must hold the numbers of the parts"
      " of each category, from 0."
    )
  if labels and len(labels) != len(class_parts):
    raise ValueError(
      f"objective.labels={tuple(labels)} must name the {len(class_parts)}"
      " categories of objective.class_parts."
    )
  depth = encoder.num_layers
  if blocks is None:
    blocks = tuple(max(1, depth * third // 3) for third in (1, 2, 3))
  if len(blocks) != 3 or not all(1 <= block <= depth for block in blocks):
    raise ValueError(
      f"objective.blocks={tuple(blocks)} must be three of the encoder's blocks"
      f" 1 to {depth}."
    )
  if len(levels) != 2 or not levels[0] >= levels[1] >= 1:
    raise ValueError(
      f"objective.levels={tuple(levels)} must be the points of a finer and of a"
      " coarser cloud."
    )
  return PartSegmentation(
    encoder.clone(keep_layers=True),
    max(every) + 1,
    len(class_parts),
    class_parts,
    tuple(labels),
    tuple(levels),
    tuple(blocks),
    dropout_rate,
    _momentum(batch_norm_momentum),
  )


def _momentum(given: Mapping[str, Any] | None) -> Staircase | None:
  if given is None:
    return None
  made = registry.call(Staircase, given, "objective.batch_norm_momentum")
  if not (
    0 < made.floor <= made.start <= 1
    and 0 < made.factor <= 1
    and made.every >= 1
  ):
    raise ValueError(
      f"objective.batch_norm_momentum={dict(given)} must satisfy 0 < floor <="
      " start <= 1, 0 < factor <= 1 and every >= 1 (steps)."
    )
  return made
