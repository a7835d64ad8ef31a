"""The right one of several endings."""

import dataclasses
from typing import Any

import numpy as np

from bertjax.tasks import metrics
from bertjax.tasks.kinds import base
from bertjax.tasks.kinds.base import Features, Field, Kind, Record


@dataclasses.dataclass(frozen=True)
class Choices(Kind):
  """Which of several endings goes with a text.

  Attributes:
    first: field (or fields, joined) of the text.
    endings: one field that holds a list, or a field for each ending.
    num_choices: how many endings there are.
    prefix: field put before every ending (SWAG's second sentence).
    label: field of the index of the right one.
  """

  first: Field
  endings: Field
  num_choices: int
  prefix: str | None = None
  label: str = "label"

  def __post_init__(self):
    if not isinstance(self.endings, str) and (
      len(self.endings) != self.num_choices
    ):
      raise ValueError(
        f"num_choices={self.num_choices} differs from the"
        f" {len(self.endings)} fields in endings."
      )

  @property
  def fields(self) -> tuple[str, ...]:
    return base.field_names((self.first, self.endings, self.prefix, self.label))

  @property
  def text_fields(self) -> tuple[str, ...]:
    return base.field_names((self.first, self.endings, self.prefix))

  @property
  def objective(self) -> dict[str, Any]:
    return {"name": "multiple_choice"}

  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    return {**base.row(seq_len, self.num_choices), "labels": ((), np.int32)}

  def texts(self, record: Record) -> list[str]:
    if isinstance(self.endings, str):
      endings = base.listed(record, self.endings)
    else:
      endings = [base.joined(record, name) for name in self.endings]
    if len(endings) != self.num_choices:
      raise ValueError(
        f"record {record.get('id')!r} has {len(endings)} endings, not"
        f" num_choices={self.num_choices}."
      )
    if self.prefix is not None:
      prefix = base.joined(record, self.prefix)
      endings = [f"{prefix} {e}" for e in endings]
    return [base.joined(record, self.first), *endings]

  def features(self, records, tokenizer, seq_len, style) -> Features:
    c = self.num_choices
    flat = tokenizer.encode_batch([t for r in records for t in self.texts(r)])
    texts = [
      (flat[i], flat[i + 1 + k])
      for i in range(0, len(flat), c + 1)
      for k in range(c)
    ]
    arrays, truncated = base.encoded(texts, tokenizer, seq_len, style)
    arrays = {k: v.reshape(-1, c, seq_len) for k, v in arrays.items()}
    names = [str(i) for i in range(c)]
    labels = [base.label_id(r[self.label], names, self.label) for r in records]
    arrays["labels"] = np.array(labels, np.int32)
    return Features(arrays, truncated.reshape(-1, c).any(1))

  def score(self, logits, features) -> dict[str, float]:
    labels, known = features.arrays["labels"], features.labelled
    base.refuse_unlabelled(known)
    guesses = logits.argmax(-1)
    return {"accuracy": metrics.accuracy(labels[known], guesses[known])}

  def predictions(self, logits, features) -> list[dict[str, Any]]:
    """The index of the best ending with all probabilities."""
    del features
    return [
      {"choice": int(row.argmax()), "probabilities": list(map(float, row))}
      for row in base.softmax(logits)
    ]

  def _counts(self, features: Features) -> np.ndarray:
    labels = features.arrays["labels"][features.labelled]
    return np.bincount(labels, minlength=self.num_choices)

  def class_shares(self, features) -> dict[str, float]:
    names = [str(i) for i in range(self.num_choices)]
    return base.shares(self._counts(features), names)

  def constant_logits(self, features) -> np.ndarray:
    return self._counts(features).astype(np.float32)
