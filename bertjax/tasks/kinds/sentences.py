"""Classes, labels or a number for one text or two."""

import dataclasses
from typing import Any

import numpy as np

from bertjax.tasks import metrics
from bertjax.tasks.kinds import base
from bertjax.tasks.kinds.base import Features, Field, Kind, Record


@dataclasses.dataclass(frozen=True)
class Sentences(Kind):
  """A class, several labels or a number for one text or two.

  Attributes:
    first: field (or fields, joined) of the first text.
    second: of the second; None: there is one.
    label: field of the label: a name, an index, a number, or a list of names
      or indices if `multilabel`.
    labels: names of the classes; () means a number.
    multilabel: whether a text has any number of labels.
    metrics: keys of `METRICS` that are for such labels.
    unlabelled: a number that says that there is no label, besides None and "".
  """

  first: Field
  second: Field | None = None
  label: str = "label"
  labels: tuple[str, ...] = ()
  multilabel: bool = False
  metrics: tuple[str, ...] = ("accuracy",)
  unlabelled: float | None = None

  def __post_init__(self):
    if len(self.labels) == (0 if self.multilabel else 1):
      raise ValueError(
        f"labels={self.labels!r} must name two classes or more, or none for"
        " regression; with multilabel=True one or more."
      )
    base.check_labels(self.labels)
    base.check_metrics(self.metrics, self._target)

  @property
  def _target(self) -> str:
    """As `Metric` names it."""
    if self.multilabel:
      return "multilabel"
    if not self.labels:
      return "continuous"
    return "binary" if len(self.labels) == 2 else "multiclass"

  @property
  def fields(self) -> tuple[str, ...]:
    return base.field_names((self.first, self.second, self.label))

  @property
  def text_fields(self) -> tuple[str, ...]:
    return base.field_names((self.first, self.second))

  @property
  def objective(self) -> dict[str, Any]:
    spec = {"name": "classification", "num_classes": len(self.labels) or 1}
    spec |= {"labels": self.labels} if self.labels else {}
    return spec | {"multilabel": self.multilabel}

  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    shape = (len(self.labels),) if self.multilabel else ()
    dtype = np.int32 if self.labels else np.float32
    return {**base.row(seq_len), "labels": (shape, dtype)}

  def texts(self, record: Record) -> list[str]:
    fields = [f for f in (self.first, self.second) if f is not None]
    return [base.joined(record, f) for f in fields]

  def _label(self, record: Record):
    value = record[self.label]
    if self.multilabel:
      if value is not None and not base.is_list(value):
        raise ValueError(
          f"{self.label}={value!r} must be a list of labels, for"
          " multilabel=True; write null if nothing is known."
        )
      row = np.full(len(self.labels), -1 if value is None else 0, np.int32)
      for chosen in value or ():
        number = base.label_id(chosen, self.labels, self.label)
        if number < 0:
          raise ValueError(
            f"{self.label}={value!r} holds {chosen!r}; leave out what no label"
            " is, or write null if nothing is known."
          )
        row[number] = 1
      return row
    if self.labels:
      return base.label_id(value, self.labels, self.label)
    return np.nan if value in (None, "", self.unlabelled) else float(value)

  def features(self, records, tokenizer, seq_len, style) -> Features:
    parts = [self.texts(r) for r in records]
    flat = tokenizer.encode_batch([t for texts in parts for t in texts])
    size = len(parts[0])
    texts = [tuple(flat[i : i + size]) for i in range(0, len(flat), size)]
    arrays, truncated = base.encoded(texts, tokenizer, seq_len, style)
    dtype = self.row_shapes(seq_len)["labels"][1]
    arrays["labels"] = np.array([self._label(r) for r in records], dtype)
    return Features(arrays, truncated)

  def score(self, logits, features) -> dict[str, float]:
    labels, known = features.arrays["labels"], features.labelled
    if not self.labels:
      guesses = logits[:, 0]
    else:
      base.refuse_other_size(logits.shape[-1], self.labels)
      guesses = (logits > 0).astype(np.int32)
      if self.multilabel:
        known = known.all(-1)
      else:
        guesses = logits.argmax(-1)
    base.refuse_unlabelled(known)
    return {
      name: metrics.METRICS[name].score(labels[known], guesses[known])
      for name in self.metrics
    }

  def predictions(self, logits, features) -> list[dict[str, Any]]:
    """The label with all probabilities, the likely labels, or the value."""
    del features
    if not self.labels:
      return [{"value": float(x)} for x in logits[:, 0]]
    base.refuse_other_size(logits.shape[-1], self.labels)
    if not self.multilabel:
      return base.likeliest(logits, self.labels)
    said = []
    for row in 1 / (1 + np.exp(-logits.astype(np.float64))):
      named = {k: float(p) for k, p in zip(self.labels, row)}
      likely = [k for k, p in named.items() if p > 0.5]
      said.append({"labels": likely, "probabilities": named})
    return said

  def _counts(self, features: Features) -> np.ndarray:
    labels, known = features.arrays["labels"], features.labelled
    if self.multilabel:
      return (labels > 0).sum(0)
    return np.bincount(labels[known], minlength=len(self.labels))

  def class_shares(self, features) -> dict[str, float]:
    if not self.labels:
      return {}
    if self.multilabel:
      known = np.maximum(features.labelled.sum(0), 1)
      return dict(zip(self.labels, map(float, self._counts(features) / known)))
    return base.shares(self._counts(features), self.labels)

  def constant_logits(self, features) -> np.ndarray:
    if not self.labels:
      return np.nanmean(features.arrays["labels"], keepdims=True)
    if self.multilabel:
      return self._counts(features) - features.labelled.sum(0) / 2
    return self._counts(features).astype(np.float32)
