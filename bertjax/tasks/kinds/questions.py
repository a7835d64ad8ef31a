"""Answers as spans of a context."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from bertjax.tasks import squad
from bertjax.tasks.kinds import base
from bertjax.tasks.kinds.base import Features, Kind, Record


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
  def text_fields(self) -> tuple[str, ...]:
    return self.question, self.context

  def prepared(
    self, record: Record, function: Callable[[str], str]
  ) -> dict[str, Any]:
    raise ValueError(
      "data.preprocess would move the characters at which the answers of"
      " 'questions' begin; prepare the file instead."
    )

  @property
  def objective(self) -> dict[str, Any]:
    return {"name": "span_qa"}

  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    return {**base.row(seq_len), "labels": ((2,), np.int32)}

  def texts(self, record: Record) -> list[str]:
    fields = (self.question, self.context)
    return [base.joined(record, field) for field in fields]

  def features(self, records, tokenizer, seq_len, style) -> Features:
    asked = [self.texts(record) for record in records]
    questions = tokenizer.encode_batch([question for question, _ in asked])
    texts, labels, windows, found, misplaced = [], [], [], [], 0
    tokenized: dict[str, squad.Pieces] = {}  # contexts serve many questions
    for i, (record, question) in enumerate(zip(records, questions)):
      context = asked[i][1]
      question = question[: self.max_question_tokens]
      offset = 1 + len(question) + style.separators  # behind [CLS] q [SEP]
      room = seq_len - offset - 1
      if room < 1:
        raise ValueError(
          f"data.seq_len={seq_len} leaves no room for a context after"
          f" {len(question)} tokens of question; raise it or lower"
          " max_question_tokens."
        )
      if context not in tokenized:
        tokenized[context] = squad.tokenize(context, tokenizer)
      pieces = tokenized[context]
      found.append(pieces)
      span = self._span(record, context, pieces)
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
    # Contexts go on in further windows; only questions are ever cut.
    arrays, _ = base.encoded(texts, tokenizer, seq_len, style)
    arrays["labels"] = np.array(labels, np.int32)
    cut = np.array([len(q) > self.max_question_tokens for q in questions])
    truncated = cut[[w.example for w in windows]]
    return Features(arrays, truncated, (list(records), found, windows))

  def _span(
    self, record: Record, context: str, pieces: squad.Pieces
  ) -> tuple[int, int]:
    """Tokens `first:stop` of the first answer; (0, 0): none; -1: unknown."""
    answers = record[self.answers]
    if answers is None:
      return -1, -1
    if not len(answers["text"]):
      return 0, 0
    text, start = answers["text"][0], int(answers["answer_start"][0])
    if context[start : start + len(text)] != text:
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
        base.joined(record, self.context),
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
    base.refuse_unlabelled(known)
    answers = self.answer(logits, features)
    pairs = [
      (a, r[self.answers]["text"])
      for a, r, keep in zip(answers, records, known)
      if keep
    ]
    return squad.score(*zip(*pairs), null=self.null)

  def predictions(self, logits, features) -> list[dict[str, Any]]:
    """The best span, and how it scores against "no answer"."""
    return [
      {
        "answer": "" if self.null and a.null_score > a.score else a.text,
        "score": a.score if np.isfinite(a.score) else None,  # no span
        "null_score": a.null_score,
      }
      for a in self.answer(logits, features)
    ]

  def class_shares(self, features) -> dict[str, float]:
    answers = [r[self.answers] for r in features.facts[0]]
    known = [bool(len(a["text"])) for a in answers if a is not None]
    counts = np.array([sum(known), len(known) - sum(known)])
    return base.shares(counts, ("answer", "no answer"))

  def constant_logits(self, features) -> np.ndarray:
    """Of "no answer"."""
    logits = np.zeros((features.arrays["tokens"].shape[1], 2), np.float32)
    logits[0] = 1.0
    return logits

  def cut(self, features, seq_len) -> tuple[np.ndarray, str]:
    """Questions, of whose windows each knows."""
    windows = features.facts[-1]
    rows = np.flatnonzero(features.truncated)
    room = f"{self.max_question_tokens} tokens of question"
    return np.unique([windows[row].example for row in rows]), room
