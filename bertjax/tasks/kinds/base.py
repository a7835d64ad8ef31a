"""What all kinds of tasks have in common."""

import abc
import dataclasses
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.data.tokenizers import Tokenizer
from bertjax.registry import lookup
from bertjax.tasks import inputs, metrics
from bertjax.tasks.inputs import Ids, PairStyle

Record = Mapping[str, Any]
Field = str | tuple[str, ...]  # several fields are joined by a space


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """Rows of a split.

  Attributes:
    arrays: what a batch is made of, leading axis n.
    truncated: bool [n], which rows had to leave something out.
    facts: what scoring needs beyond the arrays, as the kind likes.
  """

  arrays: dict[str, np.ndarray]
  truncated: np.ndarray
  facts: Any = None

  @property
  def labelled(self) -> np.ndarray:
    """Which entries of `labels` are known; bool, same shape."""
    labels = self.arrays["labels"]
    return ~np.isnan(labels) if labels.dtype.kind == "f" else labels >= 0


class Kind(abc.ABC):
  """What is common to tasks that share a head.

  A kind knows which fields of a record it reads, makes `Features` of records,
  names the objective that learns them, and says what the logits mean.
  """

  @property
  @abc.abstractmethod
  def fields(self) -> tuple[str, ...]:
    """Fields of a record that are read."""

  @property
  @abc.abstractmethod
  def text_fields(self) -> tuple[str, ...]:
    """Those of them that hold texts, or lists of texts."""

  def prepared(
    self, record: Record, function: Callable[[str], str]
  ) -> dict[str, Any]:
    """The record with its texts gone through a function.

    Raises:
      ValueError: the labels would lose their places.
    """
    changed = {k: record[k] for k in self.text_fields if k in record}
    return {**record, **{k: _each(v, function) for k, v in changed.items()}}

  @property
  @abc.abstractmethod
  def objective(self) -> dict[str, Any]:
    """The `config.objective` that fits."""

  @abc.abstractmethod
  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    """Shape and dtype of every array of one row."""

  @abc.abstractmethod
  def texts(self, record: Record) -> list[str]:
    """The record's texts, for training a vocabulary."""

  @abc.abstractmethod
  def features(
    self,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    seq_len: int,
    style: PairStyle,
  ) -> Features:
    """Rows of records."""

  @abc.abstractmethod
  def score(self, logits: np.ndarray, features: Features) -> dict[str, float]:
    """Metrics of the logits of all rows, in the order of the features."""

  @abc.abstractmethod
  def predictions(
    self, logits: np.ndarray, features: Features
  ) -> list[dict[str, Any]]:
    """What the logits say of every record, as plain values for JSON."""

  @abc.abstractmethod
  def class_shares(self, features: Features) -> dict[str, float]:
    """Share of every label among the known ones; {} for a number."""

  @abc.abstractmethod
  def constant_logits(self, features: Features) -> np.ndarray:
    """Logits of one row that give the commonest answer of these features."""

  def cut(self, features: Features, seq_len: int) -> tuple[np.ndarray, str]:
    """Records that had to leave something out, and what there is room for."""
    return np.flatnonzero(features.truncated), f"{seq_len} tokens"


def _each(value: Any, function: Callable[[str], str]) -> Any:
  """A text, or each of a list of them, gone through a function."""
  if isinstance(value, str):
    return function(value)
  if is_list(value):
    return [_each(item, function) for item in value]
  return value  # `as_text` knows what else it may be


def as_text(value: Any, record: Record, field: str) -> str:
  """What stands in a field of a record, or in a list there, as a text.

  Raises:
    ValueError: it is neither a string nor a number.
  """
  if isinstance(value, str):
    return value
  if isinstance(value, numbers.Real) and not isinstance(value, bool):
    return str(value)
  raise ValueError(
    f"record {record.get('id')!r}: {field} holds {reprlib.repr(value)}, which"
    " is no text; write a string there."
  )


def joined(record: Record, field: Field) -> str:
  """The text of one field, or of several."""
  names = (field,) if isinstance(field, str) else field
  return " ".join(as_text(record[name], record, name) for name in names)


def listed(record: Record, field: str) -> list[str]:
  """The texts of a field that holds a list of them.

  Raises:
    ValueError: it does not.
  """
  values = record[field]
  if not is_list(values):
    raise ValueError(
      f"record {record.get('id')!r}: {field} holds {reprlib.repr(values)},"
      " which is no list; write one of strings there."
    )
  return [as_text(value, record, field) for value in values]


def is_list(value: Any) -> bool:
  """A string is none, though one can walk its characters."""
  return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def field_names(fields: Sequence[Field | None]) -> tuple[str, ...]:
  """All names in some fields, each once."""
  flat = []
  for field in fields:
    flat += [field] if isinstance(field, str) else list(field or ())
  return tuple(dict.fromkeys(flat))


def label_id(value: Any, labels: Sequence[str], field: str) -> int:
  """The class of a label: a name, an index, or None and -1 for unknown.

  Raises:
    ValueError: neither.
  """
  if value is None or value == "":
    return -1
  if isinstance(value, str):
    if value not in labels:
      raise ValueError(
        f"{field}={value!r} is no label; choose from {', '.join(labels)}."
      )
    return list(labels).index(value)
  if not (isinstance(value, numbers.Real) and float(value).is_integer()):
    raise ValueError(
      f"{field}={value!r} is no class; write one of {', '.join(labels)}, or its"
      " index."
    )
  if not -1 <= int(value) < len(labels):
    raise ValueError(
      f"{field}={value!r} is outside -1..{len(labels) - 1}; the labels are"
      f" {', '.join(labels)}."
    )
  return int(value)


def encoded(
  texts: Sequence[tuple[Ids, ...]],
  tokenizer: Tokenizer,
  seq_len: int,
  style: PairStyle,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Arrays of rows, and which of the rows were cut."""
  arrays = inputs.encode_rows(texts, tokenizer, seq_len, style)
  lengths = [inputs.row_length(parts, style) for parts in texts]
  return arrays, np.array(lengths, np.int64) > seq_len


def shares(counts: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
  """Counts of classes as shares by name."""
  total = max(float(counts.sum()), 1.0)
  return {name: float(n) / total for name, n in zip(labels, counts)}


def softmax(logits: np.ndarray) -> np.ndarray:
  """Probabilities over the last axis."""
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def likeliest(
  logits: np.ndarray, labels: Sequence[str]
) -> list[dict[str, Any]]:
  """For each row `label`, `probability`, and `probabilities` by label.

  Args:
    logits: [n, c].
    labels: names of the classes.
  """
  said = []
  for chances in softmax(logits):
    named = {k: float(p) for k, p in zip(labels, chances, strict=True)}
    best = labels[int(chances.argmax())]
    said.append(
      {"label": best, "probability": named[best], "probabilities": named}
    )
  return said


def row(seq_len: int, *lead: int) -> dict[str, tuple[tuple, type]]:
  """Shapes and dtypes of what an encoder reads."""
  names = ("tokens", "segment_ids", "positions", "type_ids")
  return {name: ((*lead, seq_len), np.int32) for name in names}


def refuse_other_size(found: int, labels: Sequence[str]) -> None:
  """Raises ValueError unless there are as many logits as labels."""
  if found != len(labels):
    raise ValueError(
      f"objective.num_classes={found}, but the task has {len(labels)} labels:"
      f" {', '.join(labels)}."
    )


def check_labels(labels: Sequence[str]) -> None:
  """Raises ValueError unless the names of classes are different strings."""
  if not all(isinstance(label, str) for label in labels):
    raise ValueError(
      f"labels={labels!r} must be strings, as {tuple(map(str, labels))!r}."
    )
  if twice := [label for label in labels if labels.count(label) > 1]:
    raise ValueError(f"labels={labels!r} name {twice[0]!r} twice.")


def check_metrics(names: Sequence[str], target: str) -> None:
  """Raises ValueError for a name that is no metric of such a target."""
  for name in names:
    if target not in lookup(metrics.METRICS, name, "metrics").targets:
      fit = [k for k, m in metrics.METRICS.items() if target in m.targets]
      raise ValueError(
        f"metrics={name!r} is not for {target} targets, which the task has;"
        f" choose from {', '.join(sorted(fit))}."
      )


def refuse_unlabelled(known: Any) -> None:
  """Raises ValueError if nothing is known."""
  if not np.any(known):
    raise ValueError(
      "This split has no labels to score against; choose another split."
    )
