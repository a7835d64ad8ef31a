"""What a run needs of its data, whatever they are."""

import abc
import math
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from bertjax.data.dataset import RowDataset


class Data(abc.ABC):
  """Everything that a run reads, by split.

  Attributes:
    batch_size: rows of the global batch.
    train_split: the split that is trained on.
    evaluators: names of `EVALUATORS` that suit these data.
    evaluated_batches: how many of a split `bertjax.evaluate` reads by default;
      None: all.
  """

  batch_size: int
  train_split: str
  evaluators: ClassVar[tuple[str, ...]] = ("objective",)
  evaluated_batches: ClassVar[int | None] = None

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
    """What guessing without looking at a row achieves on a split.

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

  def model(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model`, completed by what the data know of it."""
    return dict(given)

  def check(self, objective: nn.Module) -> None:
    """Raises ValueError for a model or objective that cannot read the rows."""
    del objective

  def identity(self) -> dict[str, str]:
    """By name, what must be the same on all hosts."""
    return {"rows": self.dataset().fingerprint()}

  def save(self, workdir: pathlib.Path) -> None:
    """Writes what a user of the trained model needs besides its config."""
    del workdir

  def steps(self, epochs: float) -> int:
    """Steps after which so many epochs of the training split were read."""
    dataset, whole = self.dataset(), int(epochs)
    rows = sum(dataset.rows_per_epoch(epoch) for epoch in range(whole))
    if part := epochs - whole:
      rows += part * dataset.rows_per_epoch(whole)
    return max(1, math.ceil(rows / self.batch_size))
