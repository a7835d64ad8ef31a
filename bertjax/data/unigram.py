"""What guessing by token frequency alone achieves on masked tokens."""

from collections.abc import Iterable, Mapping

import numpy as np


def unigram_baseline(
  counts: np.ndarray, batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, float]:
  """Accuracy and loss of the training frequencies on masked tokens.

  Args:
    counts: occurrences of each id in the training split; add-one smoothed.
    batches: evaluation batches, of which only `labels` are read.

  Returns:
    `unigram_accuracy`, always guessing the most frequent id, and
    `unigram_loss` in nats per masked token.
  """
  log_probs = np.log((counts + 1) / (counts.sum() + len(counts)))
  best = int(counts.argmax())
  correct = total = 0
  loss = 0.0
  for batch in batches:
    labels = batch["labels"][batch["labels"] >= 0]
    correct += int((labels == best).sum())
    loss -= float(log_probs[labels].sum())
    total += len(labels)
  return {
    "unigram_accuracy": correct / max(total, 1),
    "unigram_loss": loss / max(total, 1),
  }
