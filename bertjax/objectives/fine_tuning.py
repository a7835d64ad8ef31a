"""Heads for downstream tasks (Devlin et al. 2018, section 4).

Each is one small layer on top of a pre-trained encoder: classes or a number per
row (one text or a pair of texts), classes per token, the span that answers a
question, the right one of several choices. `logits` gives what predictions are
made from.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bertjax.layers.dropout import Dropout
from bertjax.layers.linear import Linear
from bertjax.models.encoder import Encoder
from bertjax.objectives.base import BatchSpec, Metrics, Terms
from bertjax.objectives.masked_lm import Pooler, cross_entropy

Batch = Mapping[str, jax.Array]

_INVISIBLE = -1e30  # finite: a row of nothing but padding must not give NaN


def _count(valid: jax.Array) -> jax.Array:
  return valid.sum().astype(jnp.float32)


class FineTuning(nn.Module):
  """An encoder with a head for one task.

  Attributes:
    encoder: what is trained.
    fresh: parts that may begin untrained when the encoder's weights come from
      elsewhere.
    reads: see `Objective`.
    independent_rows: see `Objective`.
  """

  encoder: Encoder
  fresh: ClassVar[tuple[str, ...]] = ("pooler", "classifier")
  reads: ClassVar[tuple[str, ...]] = ("tokens", "segment_ids", "labels")
  independent_rows: ClassVar[bool] = True

  def encode(self, batch: Batch) -> Float[Array, "b t e"]:
    """Final hidden states, without dropout."""
    return self.encoder(batch, train=False).hidden

  def outputs(self, batch: Batch) -> dict[str, jax.Array]:
    """All that the model says of plain rows, for comparisons."""
    return {"hidden": self.encode(batch), "logits": self.logits(batch)}

  def row_flops(self, params: Any, batch: BatchSpec) -> float:
    """Of the encoder, for each of a row's texts; heads count nothing."""
    _, *texts, seq_len = batch["tokens"].shape
    one = self.encoder.row_flops(params["encoder"], seq_len)
    return math.prod(texts) * one


class Classification(FineTuning):
  """Classes, labels or a number from the first token's pooled state.

  The batch's `labels` are int32 [b] with -1 for none; for several labels a row
  int32 [b, c] of 0, 1 and -1 (unknown); for a number (one class) float32 [b]
  with NaN for none.

  Attributes:
    num_classes: classes c; 1 means regression by squared error.
    labels: their names, () if they have none.
    multilabel: each class is a yes-no question of its own.
    dropout_rate: of the pooled state.
  """

  num_classes: int
  labels: tuple[str, ...] = ()
  multilabel: bool = False
  dropout_rate: float = 0.1

  def setup(self):
    dtype = self.encoder.style.dtype
    self.pooler = Pooler(dtype)
    self.dropout = Dropout(self.dropout_rate)
    self.classifier = Linear(
      "be,ec->bc", (self.num_classes,), ("embed", "classes"), dtype=dtype
    )

  @property
  def term(self) -> str:
    if self.multilabel:
      return "multilabel"
    return "regression" if self.num_classes == 1 else "classification"

  @property
  def coefficients(self) -> dict[str, float]:
    return {self.term: 1.0}

  def _labelled(self, labels: jax.Array) -> jax.Array:
    return ~jnp.isnan(labels) if self.term == "regression" else labels >= 0

  def weights(self, batch: Batch) -> Terms:
    return {self.term: _count(self._labelled(batch["labels"]))}

  def logits(self, batch: Batch, *, train: bool = False) -> Float[Array, "b c"]:
    """Scores of the classes (or the number itself), float32."""
    pooled = self.pooler(self.encoder(batch, train=train).hidden)
    pooled = self.dropout(pooled, train=train)
    return self.classifier(pooled).astype(jnp.float32)

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    logits, labels = self.logits(batch, train=train), batch["labels"]
    if self.term == "classification":
      loss, correct, count = cross_entropy(logits, labels)
      metrics = {"accuracy": (correct, count)}
    elif self.term == "regression":
      valid = self._labelled(labels)
      # The gradient of a masked NaN is NaN, so it must not enter at all.
      error = logits[:, 0] - jnp.where(valid, labels, 0.0)
      loss = jnp.where(valid, error**2, 0.0).sum()
      metrics, count = {}, _count(valid)
    else:
      valid = self._labelled(labels)
      losses = optax.sigmoid_binary_cross_entropy(
        logits, jnp.maximum(labels, 0).astype(jnp.float32)
      )
      loss, count = jnp.where(valid, losses, 0.0).sum(), _count(valid)
      correct = _count(((logits > 0) == (labels > 0)) & valid)
      metrics = {"accuracy": (correct, count)}
    return {self.term: loss}, {f"{self.term}_loss": (loss, count), **metrics}


class TokenClassification(FineTuning):
  """Classes of tokens: `labels` int32 [b, t], -1 where a token has none.

  Attributes:
    num_classes: classes c.
    labels: their names, () if they have none.
    dropout_rate: of the final hidden states.
  """

  num_classes: int
  labels: tuple[str, ...] = ()
  dropout_rate: float = 0.1
  fresh = ("classifier",)

  def setup(self):
    self.dropout = Dropout(self.dropout_rate)
    self.classifier = Linear(
      "bte,ec->btc",
      (self.num_classes,),
      ("embed", "classes"),
      dtype=self.encoder.style.dtype,
    )

  @property
  def coefficients(self) -> dict[str, float]:
    return {"tagging": 1.0}

  def weights(self, batch: Batch) -> Terms:
    return {"tagging": _count(batch["labels"] >= 0)}

  def logits(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "b t c"]:
    """Scores of the classes, float32."""
    hidden = self.encoder(batch, train=train).hidden
    hidden = self.dropout(hidden, train=train)
    return self.classifier(hidden).astype(jnp.float32)

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    logits = self.logits(batch, train=train)
    loss, correct, count = cross_entropy(logits, batch["labels"])
    metrics = {"tagging_loss": (loss, count), "accuracy": (correct, count)}
    return {"tagging": loss}, metrics


class SpanQA(FineTuning):
  """First and last token of an answer; (0, 0), the [CLS], is "no answer".

  The batch's `labels` are int32 [b, 2], -1 for none. The loss is the mean of
  the two cross-entropies. Padding is no candidate, so that a row's loss does
  not depend on its padding (in the reference implementation it does).
  """

  fresh = ("span",)

  def setup(self):
    self.span = Linear(
      "bte,ec->btc",
      (2,),
      ("embed", "classes"),
      dtype=self.encoder.style.dtype,
    )

  @property
  def coefficients(self) -> dict[str, float]:
    return {"span": 1.0}

  def weights(self, batch: Batch) -> Terms:
    return {"span": _count(batch["labels"][:, 0] >= 0)}

  def logits(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "b t 2"]:
    """Scores of every token as first and as last of the answer, float32."""
    hidden = self.encoder(batch, train=train).hidden
    return self.span(hidden).astype(jnp.float32)

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    logits, labels = self.logits(batch, train=train), batch["labels"]
    visible = (batch["segment_ids"] > 0)[..., None]
    logits = jnp.swapaxes(jnp.where(visible, logits, _INVISIBLE), 1, 2)
    loss = cross_entropy(logits, labels)[0] / 2
    count = self.weights(batch)["span"]
    hits = (logits.argmax(-1) == labels).all(-1)  # a label of -1 never hits
    metrics = {
      "span_loss": (loss, count),
      "span_accuracy": (_count(hits), count),
    }
    return {"span": loss}, metrics


class MultipleChoice(FineTuning):
  """The right one of c rows: tokens [b, c, t], `labels` int32 [b], -1: none.

  Attributes:
    dropout_rate: of the pooled state.
  """

  dropout_rate: float = 0.1

  def setup(self):
    dtype = self.encoder.style.dtype
    self.pooler = Pooler(dtype)
    self.dropout = Dropout(self.dropout_rate)
    self.classifier = Linear(
      "be,ec->bc", (1,), ("embed", "classes"), dtype=dtype
    )

  @property
  def coefficients(self) -> dict[str, float]:
    return {"choice": 1.0}

  def weights(self, batch: Batch) -> Terms:
    return {"choice": _count(batch["labels"] >= 0)}

  def logits(self, batch: Batch, *, train: bool = False) -> Float[Array, "b c"]:
    """Score of every choice, float32."""
    b, c, t = batch["tokens"].shape
    rows = {k: v.reshape(b * c, t) for k, v in batch.items() if v.ndim == 3}
    return self.row_scores(rows, train=train).reshape(b, c)

  def row_scores(
    self, batch: Batch, *, train: bool = False
  ) -> Float[Array, "n 1"]:
    """Score of every row, float32."""
    pooled = self.pooler(self.encoder(batch, train=train).hidden)
    pooled = self.dropout(pooled, train=train)
    return self.classifier(pooled).astype(jnp.float32)

  def outputs(self, batch: Batch) -> dict[str, jax.Array]:
    return {"hidden": self.encode(batch), "logits": self.row_scores(batch)}

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    logits = self.logits(batch, train=train)
    loss, correct, count = cross_entropy(logits, batch["labels"])
    metrics = {"choice_loss": (loss, count), "accuracy": (correct, count)}
    return {"choice": loss}, metrics


# Builders: rows of `OBJECTIVES`.


def _check(
  num_classes: int, least: int, dropout_rate: float, labels: Sequence[str] = ()
) -> None:
  if labels and len(labels) != num_classes:
    raise ValueError(
      f"objective.num_classes={num_classes} differs from the {len(labels)}"
      f" objective.labels: {', '.join(labels)}."
    )
  if num_classes < least:
    raise ValueError(
      f"objective.num_classes={num_classes} must be at least {least}."
    )
  if not 0.0 <= dropout_rate < 1.0:
    raise ValueError(
      f"objective.dropout_rate={dropout_rate} must lie in [0, 1)."
    )


def classification(
  *,
  encoder: Encoder,
  num_classes: int,
  labels: Sequence[str] = (),
  multilabel: bool = False,
  dropout_rate: float = 0.1,
) -> Classification:
  """See `Classification`.

  Raises:
    ValueError: a number of classes or a rate out of range.
  """
  _check(num_classes, 1, dropout_rate, labels)
  return Classification(
    encoder, num_classes, tuple(labels), multilabel, dropout_rate
  )


def token_classification(
  *,
  encoder: Encoder,
  num_classes: int,
  labels: Sequence[str] = (),
  dropout_rate: float = 0.1,
) -> TokenClassification:
  """See `TokenClassification`.

  Raises:
    ValueError: a number of classes or a rate out of range.
  """
  _check(num_classes, 2, dropout_rate, labels)
  return TokenClassification(encoder, num_classes, tuple(labels), dropout_rate)


def span_qa(*, encoder: Encoder) -> SpanQA:
  """See `SpanQA`."""
  return SpanQA(encoder)


def multiple_choice(
  *, encoder: Encoder, dropout_rate: float = 0.1
) -> MultipleChoice:
  """See `MultipleChoice`.

  Raises:
    ValueError: a rate out of range.
  """
  _check(1, 1, dropout_rate)
  return MultipleChoice(encoder, dropout_rate)


FINE_TUNING = {
  "classification": classification,
  "token_classification": token_classification,
  "span_qa": span_qa,
  "multiple_choice": multiple_choice,
}
