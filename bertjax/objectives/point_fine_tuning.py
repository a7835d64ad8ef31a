"""Point-BERT's classes of clouds and of their points.

Yu et al. 2022, arXiv:2111.14819, sections 4.2 and 4.4 and the appendix.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from bertjax import points
from bertjax.layers.dropout import Dropout
from bertjax.layers.largest import largest
from bertjax.layers.linear import Linear
from bertjax.metrics import flops
from bertjax.models.point_bert import PointEncoder
from bertjax.models.point_bert.patch_embedding import batch_norm
from bertjax.models.point_bert.propagation import Carry, Refine
from bertjax.models.point_bert.starts import kernel_init
from bertjax.objectives.base import BatchSpec, Metrics, Terms
from bertjax.objectives.masked_lm import cross_entropy

Batch = Mapping[str, Any]


class PointFineTuning(nn.Module):
  """An encoder of clouds with a head for one task.

  Attributes:
    encoder: what is trained.
    fresh: parts that may begin untrained when the encoder's weights come from
      elsewhere.
    reads: see `Objective`.
  """

  encoder: PointEncoder
  fresh: ClassVar[tuple[str, ...]] = ("classifier",)
  reads: ClassVar[tuple[str, ...]] = ("points", "labels")

  def encode(self, batch: Batch) -> Float[Array, "b t e"]:
    """Final states of [CLS] and of patches."""
    return self.encoder(batch, train=False).hidden

  def outputs(self, batch: Batch) -> dict[str, jax.Array]:
    """All that the model says of clouds, for comparisons."""
    return {"hidden": self.encode(batch), "logits": self.logits(batch)}

  def row_flops(self, params: Any, batch: BatchSpec) -> float:
    """Of encoder and head."""
    del params
    row = {
      name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
      for name, x in batch.items()
    }
    return flops.products(
      lambda row: self.init(jax.random.key(0), row, train=False), row
    )


class CloudHead(nn.Module):
  """[CLS] and the largest of the patches -> scores of classes.

  Attributes:
    num_classes: classes c.
    inner: width of what lies between.
    dropout_rate: of that.
    dtype: compute dtype.
  """

  num_classes: int
  inner: int = 256
  dropout_rate: float = 0.5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "b t e"], *, train: bool
  ) -> Float[Array, "b c"]:
    x = jnp.concatenate([hidden[:, 0], largest(hidden[:, 1:], 1)], axis=-1)
    x = Linear(
      "be,ec->bc",
      (self.inner,),
      ("embed", None),
      dtype=self.dtype,
      kernel_init=kernel_init,
      name="dense",
    )(x)
    x = Dropout(self.dropout_rate)(jax.nn.relu(x), train=train)
    return Linear(
      "be,ec->bc",
      (self.num_classes,),
      (None, "classes"),
      dtype=self.dtype,
      kernel_init=kernel_init,
      name="classes",
    )(x).astype(jnp.float32)


class PointClassification(PointFineTuning):
  """Classes of clouds: `labels` int32 [b], -1 for none.

  Attributes:
    num_classes: classes c.
    labels: their names, () if they have none.
    smoothing: share of the probability that the other classes get.
    dropout_rate: within the head.
  """

  num_classes: int
  labels: tuple[str, ...] = ()
  smoothing: float = 0.0
  dropout_rate: float = 0.5

  def setup(self):
    self.classifier = CloudHead(
      self.num_classes,
      dropout_rate=self.dropout_rate,
      dtype=self.encoder.style.dtype,
    )

  @property
  def coefficients(self) -> dict[str, float]:
    return {"classification": 1.0}

  def weights(self, batch: Batch) -> Terms:
    return {"classification": (batch["labels"] >= 0).sum().astype(jnp.float32)}

  def logits(self, batch: Batch, *, train: bool = False) -> Float[Array, "b c"]:
    """Scores of the classes, float32."""
    return self.classifier(self.encoder(batch, train=train).hidden, train=train)

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    logits, labels = self.logits(batch, train=train), batch["labels"]
    loss, correct, count = cross_entropy(logits, labels)
    metrics = {"loss_of_classes": (loss, count), "accuracy": (correct, count)}
    if train and self.smoothing:
      loss = smoothed(logits, labels, self.smoothing)
    return {"classification": loss}, metrics


def smoothed(
  logits: Float[Array, "b c"], labels: Int[Array, " b"], share: float
) -> Float[Array, ""]:
  """Sum of cross-entropies against labels that leave others a share.

  The other classes alone have equal parts of it; the label keeps the rest.

  Args:
    logits: scores.
    labels: -1 counts nothing.
    share: of the other classes together.
  """
  log_probs = jax.nn.log_softmax(logits)
  own = jax.nn.one_hot(labels, logits.shape[-1])
  targets = own * (1 - share) + (1 - own) * share / (logits.shape[-1] - 1)
  losses = -(targets * log_probs).sum(-1)
  return jnp.where(labels >= 0, losses, 0.0).sum()


class Segmenter(nn.Module):
  """Scores of every point's part from patches after three blocks.

  Attributes:
    num_parts: parts of all categories together, p.
    num_categories: of the objects.
    levels: points of the two clouds between patches and all points.
    emb_dim: model width e.
    dropout_rate: before the last map.
    dtype: compute dtype.
  """

  num_parts: int
  num_categories: int
  levels: tuple[int, int]
  emb_dim: int
  dropout_rate: float = 0.5
  dtype: Dtype = jnp.float32

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

    fine, coarse = (self._thinned(cloud, count) for count in self.levels)
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
    index = points.farthest_point_sampling(jax.lax.stop_gradient(cloud), count)
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
  """

  num_parts: int
  num_categories: int
  class_parts: tuple[tuple[int, ...], ...] = ()
  labels: tuple[str, ...] = ()
  levels: tuple[int, int] = (512, 256)
  blocks: tuple[int, int, int] = (4, 8, 12)
  dropout_rate: float = 0.5
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
    )

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
    logits = self.logits(batch, train=train)
    loss, correct, count = cross_entropy(logits, batch["parts"])
    metrics = {"loss_of_parts": (loss, count), "accuracy": (correct, count)}
    return {"segmentation": loss}, metrics


# Builders: rows of `OBJECTIVES`.


def _check_rates(**rates: float) -> None:
  for name, rate in rates.items():
    if not 0.0 <= rate < 1.0:
      raise ValueError(f"objective.{name}={rate} must lie in [0, 1).")


def point_classification(
  *,
  encoder: PointEncoder,
  num_classes: int,
  labels: Sequence[str] = (),
  smoothing: float = 0.0,
  dropout_rate: float = 0.5,
) -> PointClassification:
  """See `PointClassification`.

  Raises:
    ValueError: a number of classes or a rate out of range.
  """
  _check_rates(smoothing=smoothing, dropout_rate=dropout_rate)
  if num_classes < 2:
    raise ValueError(f"objective.num_classes={num_classes} must be at least 2.")
  if labels and len(labels) != num_classes:
    raise ValueError(
      f"objective.num_classes={num_classes} differs from the {len(labels)}"
      f" objective.labels: {', '.join(labels)}."
    )
  return PointClassification(
    encoder, num_classes, tuple(labels), smoothing, dropout_rate
  )


def part_segmentation(
  *,
  encoder: PointEncoder,
  class_parts: Sequence[Sequence[int]],
  labels: Sequence[str] = (),
  levels: Sequence[int] = (512, 256),
  blocks: Sequence[int] | None = None,
  dropout_rate: float = 0.5,
) -> PartSegmentation:
  """See `PartSegmentation`.

  Args:
    encoder: of point clouds.
    class_parts: by category, the numbers of its parts.
    labels: names of the categories.
    levels: see `Segmenter`.
    blocks: see `PartSegmentation`; None: after each third of the stack.
    dropout_rate: within the head.

  Raises:
    ValueError: no parts, more or fewer names than categories, blocks that the
      encoder does not have, or a rate out of range.
  """
  _check_rates(dropout_rate=dropout_rate)
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
  )


POINT_FINE_TUNING = {
  "point_classification": point_classification,
  "part_segmentation": part_segmentation,
}
