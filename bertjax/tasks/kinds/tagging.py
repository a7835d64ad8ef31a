"""A label for every word."""

import dataclasses
from typing import Any

import numpy as np

from bertjax.tasks import inputs, metrics
from bertjax.tasks.kinds import base
from bertjax.tasks.kinds.base import Features, Kind, Record


@dataclasses.dataclass(frozen=True)
class Tagging(Kind):
  """A label for every word; the word's first piece carries it.

  Words that no longer fit into a row count as tagged with the first label.

  Attributes:
    words: field of the list of words.
    tags: field of the list of labels, names or indices.
    labels: their names, "O" (or what is most common) first.
    entity: IOB labels (O, B-TYPE, I-TYPE), scored by whole entities besides
      accuracy.
  """

  words: str = "words"
  tags: str = "labels"
  labels: tuple[str, ...] = ()
  entity: bool = True

  def __post_init__(self):
    if len(self.labels) < 2:
      raise ValueError(f"labels={self.labels!r} must name two or more.")
    base.check_labels(self.labels)
    others = [label for label in self.labels if not metrics.is_iob(label)]
    if self.entity and others:
      raise ValueError(
        f"labels hold {others[0]!r}, which is not IOB (O, B-TYPE, I-TYPE);"
        " rename them, or set entity=False for accuracy alone."
      )

  @property
  def fields(self) -> tuple[str, ...]:
    return self.words, self.tags

  @property
  def text_fields(self) -> tuple[str, ...]:
    return (self.words,)  # each word alone: it keeps its label

  @property
  def objective(self) -> dict[str, Any]:
    return {
      "name": "token_classification",
      "num_classes": len(self.labels),
      "labels": self.labels,
    }

  def row_shapes(self, seq_len: int) -> dict[str, tuple[tuple, type]]:
    return {**base.row(seq_len), "labels": ((seq_len,), np.int32)}

  def texts(self, record: Record) -> list[str]:
    return [" ".join(base.listed(record, self.words))]

  def features(self, records, tokenizer, seq_len, style) -> Features:
    texts, places, gold = [], [], []
    sentences = [base.listed(record, self.words) for record in records]
    labels = np.full((len(records), seq_len), -1, np.int32)
    for i, (record, words) in enumerate(zip(records, sentences)):
      tags = record[self.tags]
      if tags is None:
        tags = [None] * len(words)
      if len(words) != len(tags):
        raise ValueError(
          f"record {record.get('id', i)!r} has {len(words)} {self.words} but"
          f" {len(tags)} {self.tags}."
        )
      ids, first = inputs.encode_words(words, tokenizer)
      first = first[first < seq_len - 2] + 1  # behind the [CLS]
      known = [base.label_id(tag, self.labels, self.tags) for tag in tags]
      labels[i, first] = known[: len(first)]
      texts.append((ids,))
      places.append(first)
      gold.append(np.array(known, np.int32))
    arrays, truncated = base.encoded(texts, tokenizer, seq_len, style)
    return Features(
      {**arrays, "labels": labels}, truncated, (places, gold, sentences)
    )

  def _guesses(self, logits, features) -> list[np.ndarray]:
    """The class of every word of every record."""
    base.refuse_other_size(logits.shape[-1], self.labels)
    places, gold, _ = features.facts
    guesses = []
    for scores, place, known in zip(logits, places, gold):
      guess = np.zeros(len(known), np.int32)
      guess[: len(place)] = scores[place].argmax(-1)
      guesses.append(guess)
    return guesses

  def score(self, logits, features) -> dict[str, float]:
    _, gold, _ = features.facts
    guesses = self._guesses(logits, features)
    labelled = [(known >= 0).all() for known in gold]
    base.refuse_unlabelled(labelled)
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

  def predictions(self, logits, features) -> list[dict[str, Any]]:
    """A label for every word, and the entities if labels are IOB."""
    said = []
    for words, guess in zip(features.facts[2], self._guesses(logits, features)):
      tags = [self.labels[i] for i in guess]
      answer: dict[str, Any] = {"words": words, "labels": tags}
      if self.entity:
        answer["entities"] = [
          {"type": kind, "first": a, "last": b,
           "text": " ".join(words[a : b + 1])}
          for kind, a, b in sorted(metrics.entities(tags), key=lambda e: e[1:])
        ]  # fmt: skip
      said.append(answer)
    return said

  def _counts(self, features: Features) -> np.ndarray:
    known = np.concatenate(features.facts[1])
    return np.bincount(known[known >= 0], minlength=len(self.labels))

  def class_shares(self, features) -> dict[str, float]:
    return base.shares(self._counts(features), self.labels)

  def constant_logits(self, features) -> np.ndarray:
    counts = self._counts(features).astype(np.float32)
    seq_len = features.arrays["tokens"].shape[1]
    return np.broadcast_to(counts, (seq_len, len(counts)))
