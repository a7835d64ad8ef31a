"""What a run needs of its data, whatever they are."""

import abc
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax

from bertjax.data.dataset import RowDataset
from bertjax.data.tokenizers import Tokenizer, build_tokenizer


class Data(abc.ABC):
  """Everything that a run reads, by split.

  Attributes:
    tokenizer: trained, loaded or given.
    batch_size: rows of the global batch.
    seq_len: length of a row.
    train_split: the split that is trained on.
    evaluators: names of `EVALUATORS` that suit these data.
    vocabulary_slots: positions of a row for which the whole vocabulary is
      scored; they count in the FLOPs of a step.
  """

  tokenizer: Tokenizer
  batch_size: int
  seq_len: int
  train_split: str
  evaluators: ClassVar[tuple[str, ...]] = ("objective",)
  vocabulary_slots: int = 0

  def __init__(
    self,
    tokenizer: Mapping[str, Any] | Tokenizer,
    *,
    batch_size: int,
    train_split: str,
    cache_dir: pathlib.Path,
    fingerprint: str,
  ):
    """Builds the tokenizer, if need be from the texts of the training split.

    Args:
      tokenizer: a name of `TOKENIZERS` and its options, or a tokenizer.
      batch_size: rows of the global batch.
      train_split: the split that is trained on.
      cache_dir: where a trained vocabulary lives.
      fingerprint: of the source, under which it is found again.
    """
    self.batch_size, self.train_split = batch_size, train_split
    if not isinstance(tokenizer, Tokenizer):
      tokenizer = build_tokenizer(tokenizer, self.texts, cache_dir, fingerprint)
    self.tokenizer = tokenizer

  @abc.abstractmethod
  def texts(self) -> Iterator[str]:
    """Texts of the training split, from which a vocabulary can be trained."""

  @abc.abstractmethod
  def dataset(self, split: str | None = None) -> RowDataset:
    """The rows of a split, the training one by default."""

  @abc.abstractmethod
  def facts(self) -> dict[str, Any]:
    """What the health report says of the training split as a whole."""

  @abc.abstractmethod
  def baseline(
    self, split: str, num_batches: int | None = None
  ) -> dict[str, float]:
    """What guessing without looking at the text achieves on a split.

    Args:
      split: of the source.
      num_batches: evaluation batches to read; None reads them all.
    """

  def health(self) -> dict[str, Any]:
    """`facts`, and statistics of the first training rows as they are read."""
    return self.facts()

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global batch."""
    return self.dataset().batch_spec(batch_size)

  def objective(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """`config.objective`, completed by what the data know of it."""
    return dict(given)

  def steps(self, epochs: float) -> int:
    """Steps after which so many epochs of the training split were read."""
    dataset, whole = self.dataset(), int(epochs)
    rows = sum(dataset.rows_per_epoch(epoch) for epoch in range(whole))
    if part := epochs - whole:
      rows += part * dataset.rows_per_epoch(whole)
    return max(1, math.ceil(rows / self.batch_size))
