"""Metrics of predictions against labels, by name.

Conventions where a definition leaves a gap: a correlation with constant
predictions is 0, and so is an F1 without any positive.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np


def _sklearn() -> ModuleType:
  try:
    import sklearn.metrics
  except ImportError as err:
    raise ImportError(
      "F1 and Matthews need scikit-learn: pip install scikit-learn"
    ) from err
  return sklearn.metrics


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
  """Share of equal entries."""
  return float(np.mean(labels == predictions))


def binary_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
  """F1 of class 1."""
  f1 = _sklearn().f1_score(labels, predictions, zero_division=0.0)
  return float(f1)


def micro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
  """F1 of all decisions together."""
  f1 = _sklearn().f1_score(
    labels, predictions, average="micro", zero_division=0.0
  )
  return float(f1)


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
  """Mean of the classes' F1."""
  f1 = _sklearn().f1_score(
    labels, predictions, average="macro", zero_division=0.0
  )
  return float(f1)


def weighted_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
  """Mean of the classes' F1, weighted by how often they occur."""
  f1 = _sklearn().f1_score(
    labels, predictions, average="weighted", zero_division=0.0
  )
  return float(f1)


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
  """Matthews correlation."""
  return float(_sklearn().matthews_corrcoef(labels, predictions))


def _correlation(name: str, labels, predictions) -> float:
  try:
    from scipy import stats
  except ImportError as err:
    raise ImportError("correlations need SciPy: pip install scipy") from err
  if len(labels) < 2 or np.ptp(labels) == 0 or np.ptp(predictions) == 0:
    return 0.0
  return float(getattr(stats, name)(labels, predictions).statistic)


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
  """Correlation of values."""
  return _correlation("pearsonr", labels, predictions)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
  """Correlation of ranks."""
  return _correlation("spearmanr", labels, predictions)


class Metric(NamedTuple):
  """A metric, and what it can be asked of.

  Attributes:
    score: of labels and predictions.
    targets: some of "binary", "multiclass" (one class of three or more),
      "multilabel" (0 or 1 for each class) and "continuous" (a number).
  """

  score: Callable[[np.ndarray, np.ndarray], float]
  targets: tuple[str, ...]


_CLASS = ("binary", "multiclass")
_CLASSES = (*_CLASS, "multilabel")

METRICS: dict[str, Metric] = {
  "accuracy": Metric(accuracy, _CLASSES),
  "f1": Metric(binary_f1, ("binary",)),
  "micro_f1": Metric(micro_f1, _CLASSES),
  "macro_f1": Metric(macro_f1, _CLASSES),
  "weighted_f1": Metric(weighted_f1, _CLASSES),
  "matthews": Metric(matthews, _CLASS),
  "pearson": Metric(pearson, ("continuous",)),
  "spearman": Metric(spearman, ("continuous",)),
}


def is_iob(label: str) -> bool:
  """Whether `entities` understands a label."""
  return label == "O" or label.partition("-")[0] in ("B", "I")


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
  """(type, first word, last word) of the entities of IOB tags.

  Lenient as CoNLL's own script: an I- that continues nothing begins an entity,
  so IOB1 and IOB2 read alike.
  """
  found, start, kind = set(), 0, None
  for i, tag in enumerate([*tags, "O"]):
    prefix, _, label = tag.partition("-")
    if kind is not None and (prefix != "I" or label != kind):
      found.add((kind, start, i - 1))
      kind = None
    if prefix in ("B", "I") and kind is None:
      start, kind = i, label
  return found


def entity_scores(
  labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, float]:
  """Precision, recall and F1 of whole entities over all sentences."""
  right = guessed = true = 0
  for gold, guess in zip(labels, predictions, strict=True):
    gold, guess = entities(gold), entities(guess)
    right += len(gold & guess)
    guessed, true = guessed + len(guess), true + len(gold)
  return {
    "entity_precision": right / max(guessed, 1),
    "entity_recall": right / max(true, 1),
    "entity_f1": 2 * right / max(guessed + true, 1),
  }
