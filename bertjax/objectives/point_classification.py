"""Point-BERT's classes of clouds.

Yu et al. 2022, arXiv:2111.14819, section 4.2.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from bertjax.layers.dropout import Dropout
from bertjax.layers.largest import largest
from bertjax.layers.linear import Linear
from bertjax.models.point_bert import PointEncoder
from bertjax.models.point_bert.starts import kernel_init
from bertjax.objectives.base import Metrics, Terms
from bertjax.objectives.masked_lm import cross_entropy
from bertjax.objectives.point_fine_tuning import (
  Batch,
  PointFineTuning,
  check_rates,
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
  check_rates(smoothing=smoothing, dropout_rate=dropout_rate)
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
