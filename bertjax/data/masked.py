"""What masked text has in common, however it was masked."""

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np

from bertjax.data import audit
from bertjax.data.masking import Masking
from bertjax.data.textual import TextualData
from bertjax.data.unigram import unigram_baseline
from bertjax.objectives.fine_tuning import FINE_TUNING

_AUDITED_BATCHES = 32


class MaskedData(TextualData):
  """Rows with masked tokens to guess.

  Attributes:
    masking: how training rows are masked; None if they come masked.
  """

  evaluators = ("objective", "pseudo_perplexity")
  evaluated_batches = 50  # splits of a corpus can be very long
  masking: Masking | None

  @abc.abstractmethod
  def token_counts(self, split: str | None = None) -> np.ndarray:
    """How often each id occurs in a split, the training one by default.

    0 for ids that are never masked, which nobody has to guess.
    """

  def objective(self, given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("name") in FINE_TUNING:
      raise ValueError(
        f"objective.name={given['name']!r} learns from labelled examples; use"
        " data.name='task'."
      )
    return super().objective(given)

  def baseline(
    self, split: str, num_batches: int | None = None
  ) -> dict[str, float]:
    """Accuracy and loss of guessing by the training frequencies."""
    batches = self.dataset(split).evaluation_batches(
      self.batch_size, num_batches
    )
    return unigram_baseline(self.token_counts(), batches)

  def health(self) -> dict[str, Any]:
    dataset = self.dataset()
    rows = min(dataset.rows_per_epoch(0), _AUDITED_BATCHES * self.batch_size)
    size = min(rows, self.batch_size)
    found = audit.audit(
      (dataset.batch(i, size) for i in range(rows // size)), self.tokenizer
    )
    health = self.facts() | {
      "masking_rate": found["masked_rate"],
      "mask_share": found["mask_share"],
      "random_share": found["random_share"],
      "keep_share": found["kept_share"],
      "selected": found["labels_per_batch"] * found["batches"],
      "label_weight_min": found["labels_per_batch_min"],
      "label_weight_mean": found["labels_per_batch"],
      "fill": found["fill"],
      "row_tokens": found["fill"] * self.seq_len,
      "vocab_size": self.tokenizer.vocab_size,
      "initial_loss": float(np.log(self.tokenizer.vocab_size)),
    }
    if (masking := self.masking) is not None:
      health |= {
        "masking_unit": masking.unit,
        "expected_masking_rate": masking.rate,
        "expected_mask_share": masking.mask_share,
        "expected_random_share": masking.random_share,
        "expected_keep_share": 1 - masking.mask_share - masking.random_share,
      }
    return health
