"""Parts of a collection of clouds: fewer labels, fewer classes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bertjax.data.shapes.files import Cloud, Clouds
from bertjax.data.sources.base import fingerprint_of


class Subset(Clouds):
  """Some clouds of another collection, maybe under other labels."""

  def __init__(
    self,
    clouds: Clouds,
    index: Sequence[int],
    classes: Sequence[int] | None = None,
  ):
    """Args:
    clouds: the whole.
    index: which of them.
    classes: numbers of the classes that are left, in their new order; None
      leaves labels as they are.
    """
    self._clouds, self._index = clouds, [int(i) for i in index]
    labels = clouds.labels[self._index]
    self.classes, self.class_parts = clouds.classes, clouds.class_parts
    if classes is not None:
      new = {int(old): number for number, old in enumerate(classes)}
      labels = np.array([new[int(label)] for label in labels], np.int32)
      self.classes = tuple(clouds.classes[i] for i in new)
      self.class_parts = tuple(
        clouds.class_parts[i] for i in new if clouds.class_parts
      )
    self._labels = labels.tolist()

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> Cloud:
    cloud = self._clouds[self._index[index]]
    return dataclasses.replace(cloud, label=self._labels[index])

  def fingerprint(self) -> str:
    return fingerprint_of(self._clouds.fingerprint(), self._index, self._labels)


def fraction_of(clouds: Clouds, fraction: float, seed: int) -> Clouds:
  """The same share of every class, at least one cloud of each.

  Raises:
    ValueError: a fraction outside (0, 1].
  """
  if not 0 < fraction <= 1:
    raise ValueError(
      f"data.label_fraction={fraction} must lie in (0, 1]: the share of the"
      " training clouds of each class that is kept."
    )
  if fraction == 1:
    return clouds
  rng, labels, kept = np.random.default_rng(seed), clouds.labels, []
  for label in np.unique(labels):
    mine = rng.permutation(np.flatnonzero(labels == label))
    kept += mine[: max(1, round(fraction * len(mine)))].tolist()
  return Subset(clouds, sorted(kept))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot:
  """`config.data.few_shot`: few classes, few clouds of each (section 4.2).

  Attributes:
    ways: classes that are drawn.
    shots: training clouds of each.
    fold: number of the draw; the paper averages over 10.
    tests: clouds of each class in every other split.
  """

  ways: int
  shots: int
  fold: int = 0
  tests: int = 20

  def __post_init__(self):
    for name in ("ways", "shots", "tests"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"data.few_shot.{name}={getattr(self, name)} must be at least 1."
        )
    if self.fold < 0:
      raise ValueError(f"data.few_shot.fold={self.fold} must not be negative.")

  def of(self, clouds: Clouds, *, train: bool) -> Clouds:
    """The clouds of a split that take part.

    Classes depend on the fold alone, so those of all splits are the same.

    Args:
      clouds: of the split.
      train: whether it is the training split.

    Raises:
      ValueError: too few classes, or too few clouds of one.
    """
    if self.ways > len(clouds.classes):
      raise ValueError(
        f"data.few_shot.ways={self.ways}: there are only"
        f" {len(clouds.classes)} classes."
      )
    rng = np.random.default_rng([self.fold, self.ways])
    chosen = rng.permutation(len(clouds.classes))[: self.ways]
    count, field = (self.shots, "shots") if train else (self.tests, "tests")
    rng, kept = np.random.default_rng([self.fold, self.ways, train]), []
    for label in chosen:
      mine = np.flatnonzero(clouds.labels == label)
      if len(mine) < count:
        raise ValueError(
          f"data.few_shot.{field}={count}: class {clouds.classes[label]!r} has"
          f" only {len(mine)} clouds."
        )
      kept += rng.permutation(mine)[:count].tolist()
    return Subset(clouds, kept, chosen.tolist())
