"""What guessing by token frequency alone achieves on masked tokens."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def token_counts(
  cache: Any, vocab_size: int, max_documents: int = 20_000
) -> np.ndarray:
  """How often each id occurs in (evenly spaced) documents of a token cache.

  Args:
    cache: a `TokenCache`.
    vocab_size: length of the result.
    max_documents: bounds the reading on large corpora.

  Returns:
    int64 [vocab_size].
  """
  count = len(cache.document_lengths)
  chosen = np.unique(
    np.linspace(0, count - 1, min(count, max_documents)).astype(np.int64)
  )
  totals = np.zeros(vocab_size, np.int64)
  for start in range(0, len(chosen), 256):
    documents = cache.documents(chosen[start : start + 256])
    tokens = np.concatenate([d.tokens for d in documents])
    totals += np.bincount(tokens, minlength=vocab_size)[:vocab_size]
  return totals


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
