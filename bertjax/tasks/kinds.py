"""Kinds of tasks: from records to rows, and from logits to scores.

A kind knows which fields of a record it reads, makes `Features` of records,
names the objective that learns them, and scores what the model says.
"""

import abc
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.data.tokenizers import Tokenizer
from bertjax.registry import lookup
from bertjax.tasks import inputs, metrics, squad
from bertjax.tasks.inputs import PairStyle

Record = Mapping[str, Any]
Field = str | tuple[str, ...]  # several fields are joined by a space


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """Rows of a split.

  Attributes:
    arrays: what a batch is made of, leading axis n.
    facts: what scoring needs beyond the arrays, as the kind likes.
  """

  arrays: dict[str, np.ndarray]
  facts: Any = None

  @property
  def labelled(self) -> np.ndarray:
    """Which entries of `labels` are known; bool, same shape."""
    labels = self.arrays["labels"]
    return ~np.isnan(labels) if labels.dtype.kind == "f" else labels >= 0


class Kind(abc.ABC):
  """What is common to tasks that share a head."""

  @property
  @abc.abstractmethod
  def fields(self) -> tuple[str, ...]:
    """Fields of a record that are read."""

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


def _joined(record: Record, field: Field) -> str:
  names = (field,) if isinstance(field, str) else field
  return " ".join(str(record[name]) for name in names)


def _names(fields: Sequence[Field | None]) -> tuple[str, ...]:
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
  if not -1 <= int(value) < len(labels):
    raise ValueError(
      f"{field}={value!r} is outside -1..{len(labels) - 1}; the labels are"
      f" {', '.join(labels)}."
    )
  return int(value)


def _row(seq_len: int, *lead: int) -> dict[str, tuple[tuple, type]]:
  names = ("tokens", "segment_ids", "positions", "type_ids")
  return {name: ((*lead, seq_len), np.int32) for name in names}


def _refuse_other_size(found: int, labels: Sequence[str]) -> None:
  if found != len(labels):
    raise ValueError(
      f"objective.num_classes={found}, but the task has {len(labels)} labels:"
      f" {', '.join(labels)}."
    )


def _check_metrics(names: Sequence[str]) -> None:
  for name in names:
    lookup(metrics.METRICS, name, "metrics")


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
    metrics: keys of `METRICS`.
  """

  first: Field
  second: Field | None = None
  label: str = "label"
  labels: tuple[str, ...] = ()
  multilabel: bool = False
  metrics: tuple[str, ...] = ("accuracy",)

  def __post_init__(self):
    _check_metrics(self.metrics)
    if len(self.labels) == 1 or (self.multilabel and not self.labels):
      raise ValueError(
        f"labels={self.labels!r} must name two classes or more, or none for"
        " regression."
      )

  @property
  def fields(self) -> tuple[str, ...]:
    return _names((self.first, self.second, self.label))

  @property
  def objective(self) -> dict[str, Any]:
    spec = {"name": "classification", "num_classes": len(self.labels) or 1}
    return spec | ({"multilabel": True} if self.multilabel else {})

  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    shape = (len(self.labels),) if self.multilabel else ()
    dtype = np.int32 if self.labels else np.float32
    return {**_row(seq_len), "labels": (shape, dtype)}

  def texts(self, record: Record) -> list[str]:
    fields = [f for f in (self.first, self.second) if f is not None]
    return [_joined(record, f) for f in fields]

  def _label(self, record: Record):
    value = record[self.label]
    if self.multilabel:
      row = np.full(len(self.labels), -1 if value is None else 0, np.int32)
      chosen = value or ()
      row[[label_id(v, self.labels, self.label) for v in chosen]] = 1
      return row
    if self.labels:
      return label_id(value, self.labels, self.label)
    return np.nan if value in (None, "") else float(value)

  def features(self, records, tokenizer, seq_len, style) -> Features:
    parts = [self.texts(r) for r in records]
    flat = tokenizer.encode_batch([t for texts in parts for t in texts])
    size = len(parts[0])
    texts = [tuple(flat[i : i + size]) for i in range(0, len(flat), size)]
    arrays = inputs.encode_rows(texts, tokenizer, seq_len, style)
    dtype = self.row_shapes(seq_len)["labels"][1]
    arrays["labels"] = np.array([self._label(r) for r in records], dtype)
    return Features(arrays)

  def score(self, logits, features) -> dict[str, float]:
    labels, known = features.arrays["labels"], features.labelled
    if not self.labels:
      guesses = logits[:, 0]
    else:
      _refuse_other_size(logits.shape[-1], self.labels)
      guesses = (logits > 0).astype(np.int32)
      if self.multilabel:
        known = known.all(-1)
      else:
        guesses = logits.argmax(-1)
    _refuse_unlabelled(known)
    return {
      name: metrics.METRICS[name](labels[known], guesses[known])
      for name in self.metrics
    }


@dataclasses.dataclass(frozen=True)
class Tagging(Kind):
  """A label for every word; the word's first piece carries it.

  Words that no longer fit into a row count as tagged with the first label.

  Attributes:
    words: field of the list of words.
    tags: field of the list of labels, names or indices.
    labels: their names, "O" (or what is most common) first.
    entity: IOB labels, scored by whole entities besides accuracy.
  """

  words: str = "words"
  tags: str = "labels"
  labels: tuple[str, ...] = ()
  entity: bool = True

  def __post_init__(self):
    if len(self.labels) < 2:
      raise ValueError(f"labels={self.labels!r} must name two or more.")

  @property
  def fields(self) -> tuple[str, ...]:
    return self.words, self.tags

  @property
  def objective(self) -> dict[str, Any]:
    return {
      "name": "token_classification",
      "num_classes": len(self.labels),
    }

  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    return {**_row(seq_len), "labels": ((seq_len,), np.int32)}

  def texts(self, record: Record) -> list[str]:
    return [" ".join(record[self.words])]

  def features(self, records, tokenizer, seq_len, style) -> Features:
    texts, places, gold = [], [], []
    labels = np.full((len(records), seq_len), -1, np.int32)
    for i, record in enumerate(records):
      words, tags = record[self.words], record[self.tags]
      if tags is None:
        tags = [None] * len(words)
      if len(words) != len(tags):
        raise ValueError(
          f"record {record.get('id', i)!r} has {len(words)} {self.words} but"
          f" {len(tags)} {self.tags}."
        )
      ids, first = inputs.encode_words(words, tokenizer)
      first = first[first < seq_len - 2] + 1  # behind the [CLS]
      known = [label_id(tag, self.labels, self.tags) for tag in tags]
      labels[i, first] = known[: len(first)]
      texts.append((ids,))
      places.append(first)
      gold.append(np.array(known, np.int32))
    arrays = inputs.encode_rows(texts, tokenizer, seq_len, style)
    return Features({**arrays, "labels": labels}, (places, gold))

  def score(self, logits, features) -> dict[str, float]:
    _refuse_other_size(logits.shape[-1], self.labels)
    places, gold = features.facts
    guesses = []
    for scores, place, known in zip(logits, places, gold):
      guess = np.zeros(len(known), np.int32)
      guess[: len(place)] = scores[place].argmax(-1)
      guesses.append(guess)
    labelled = [(known >= 0).all() for known in gold]
    _refuse_unlabelled(labelled)
    gold = [g for g, keep in zip(gold, labelled) if keep]
    guesses = [g for g, keep in zip(guesses, labelled) if keep]
    out = {
      "accuracy": metrics.accuracy(
        np.concatenate(gold), np.concatenate(guesses)
      )
    }
    if self.entity:
      named = [
        [[self.labels[i] for i in sentence] for sentence in side]
        for side in (gold, guesses)
      ]
      out |= metrics.entity_scores(*named)
    return out


@dataclasses.dataclass(frozen=True)
class Questions(Kind):
  """The span of a context that answers a question.

  `answers` holds lists `text` and `answer_start` (in characters), empty where
  there is no answer; None means not labelled.

  Attributes:
    null: some questions have no answer (SQuAD 2.0).
    stride: tokens between the starts of a context's windows.
    max_question_tokens: longer questions are cut.
    num_best: first and last tokens that are combined.
    max_answer_tokens: longest answer that is given.
  """

  question: str = "question"
  context: str = "context"
  answers: str = "answers"
  null: bool = False
  stride: int = 128
  max_question_tokens: int = 64
  num_best: int = 20
  max_answer_tokens: int = 30

  def __post_init__(self):
    names = ("stride", "max_question_tokens", "num_best", "max_answer_tokens")
    for name in names:
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be positive.")

  @property
  def fields(self) -> tuple[str, ...]:
    return self.question, self.context, self.answers

  @property
  def objective(self) -> dict[str, Any]:
    return {"name": "span_qa"}

  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    return {**_row(seq_len), "labels": ((2,), np.int32)}

  def texts(self, record: Record) -> list[str]:
    return [record[self.question], record[self.context]]

  def features(self, records, tokenizer, seq_len, style) -> Features:
    questions = tokenizer.encode_batch([r[self.question] for r in records])
    texts, labels, windows, found, misplaced = [], [], [], [], 0
    tokenized: dict[str, squad.Pieces] = {}  # contexts serve many questions
    for i, (record, question) in enumerate(zip(records, questions)):
      question = question[: self.max_question_tokens]
      offset = 1 + len(question) + style.separators  # behind [CLS] q [SEP]
      room = seq_len - offset - 1
      if room < 1:
        raise ValueError(
          f"data.seq_len={seq_len} leaves no room for a context after"
          f" {len(question)} tokens of question; raise it or lower"
          " max_question_tokens."
        )
      context = record[self.context]
      if context not in tokenized:
        tokenized[context] = squad.tokenize(context, tokenizer)
      pieces = tokenized[context]
      found.append(pieces)
      span = self._span(record, pieces)
      misplaced += span == (-1, -1) and bool(record[self.answers])
      ranges = squad.window_ranges(len(pieces.ids), room, self.stride)
      for first, stop in ranges:
        texts.append((question, pieces.ids[first:stop]))
        windows.append(squad.Window(i, offset, first, stop))
        if span[0] < 0:
          labels.append((-1, -1))
        elif span[1] and first <= span[0] and span[1] <= stop:
          labels.append(
            (span[0] - first + offset, span[1] - 1 - first + offset)
          )
        else:
          labels.append((0, 0))
    if misplaced:
      logging.warning(
        "%d of %d answers are not at their place in the context; those"
        " questions are not trained on.",
        misplaced,
        len(records),
      )
    arrays = inputs.encode_rows(texts, tokenizer, seq_len, style)
    arrays["labels"] = np.array(labels, np.int32)
    return Features(arrays, (list(records), found, windows))

  def _span(self, record: Record, pieces: squad.Pieces) -> tuple[int, int]:
    """Tokens `first:stop` of the first answer; (0, 0): none; -1: unknown."""
    answers = record[self.answers]
    if answers is None:
      return -1, -1
    if not len(answers["text"]):
      return 0, 0
    text, start = answers["text"][0], int(answers["answer_start"][0])
    if record[self.context][start : start + len(text)] != text:
      return -1, -1
    first, last = pieces.span(start, start + len(text))
    return (first, last + 1) if first <= last else (-1, -1)

  def answer(
    self, logits: np.ndarray, features: Features
  ) -> list[squad.Answer]:
    """An answer to every question of the records."""
    records, pieces, windows = features.facts
    rows: list[list[int]] = [[] for _ in records]
    for row, window in enumerate(windows):
      rows[window.example].append(row)
    return [
      squad.decode(
        record[self.context],
        tokens,
        [windows[row] for row in own],
        logits[own],
        num_best=self.num_best,
        max_answer_tokens=self.max_answer_tokens,
      )
      for record, tokens, own in zip(records, pieces, rows)
    ]

  def score(self, logits, features) -> dict[str, float]:
    records = features.facts[0]
    known = [r[self.answers] is not None for r in records]
    _refuse_unlabelled(known)
    answers = self.answer(logits, features)
    pairs = [
      (a, r[self.answers]["text"])
      for a, r, keep in zip(answers, records, known)
      if keep
    ]
    return squad.score(*zip(*pairs), null=self.null)


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
    return _names((self.first, self.endings, self.prefix, self.label))

  @property
  def objective(self) -> dict[str, Any]:
    return {"name": "multiple_choice"}

  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    return {**_row(seq_len, self.num_choices), "labels": ((), np.int32)}

  def texts(self, record: Record) -> list[str]:
    if isinstance(self.endings, str):
      endings = list(record[self.endings])
    else:
      endings = [record[name] for name in self.endings]
    if len(endings) != self.num_choices:
      raise ValueError(
        f"record {record.get('id')!r} has {len(endings)} endings, not"
        f" num_choices={self.num_choices}."
      )
    if self.prefix is not None:
      endings = [f"{record[self.prefix]} {e}" for e in endings]
    return [_joined(record, self.first), *endings]

  def features(self, records, tokenizer, seq_len, style) -> Features:
    c = self.num_choices
    flat = tokenizer.encode_batch([t for r in records for t in self.texts(r)])
    texts = [
      (flat[i], flat[i + 1 + k])
      for i in range(0, len(flat), c + 1)
      for k in range(c)
    ]
    arrays = inputs.encode_rows(texts, tokenizer, seq_len, style)
    arrays = {k: v.reshape(-1, c, seq_len) for k, v in arrays.items()}
    names = [str(i) for i in range(c)]
    labels = [label_id(r[self.label], names, self.label) for r in records]
    arrays["labels"] = np.array(labels, np.int32)
    return Features(arrays)

  def score(self, logits, features) -> dict[str, float]:
    labels, known = features.arrays["labels"], features.labelled
    _refuse_unlabelled(known)
    guesses = logits.argmax(-1)
    return {"accuracy": metrics.accuracy(labels[known], guesses[known])}


def _refuse_unlabelled(known: Any) -> None:
  if not np.any(known):
    raise ValueError(
      "This split has no labels to score against; choose another split."
    )
