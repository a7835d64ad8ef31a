"""`config.data` for point clouds: a source, points of it, labels."""

import dataclasses
import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from bertjax import registry
from bertjax.data.abstract import AbstractData
from bertjax.data.base import Data
from bertjax.data.shapes.dataset import PointDataset, Reading
from bertjax.data.shapes.files import Clouds
from bertjax.data.shapes.sources import SHAPE_SOURCES, About, ShapeSource
from bertjax.data.shapes.stored import Stored
from bertjax.data.shapes.subsets import FewShot, fraction_of
from bertjax.objectives import OBJECTIVES


class PointData(Data):
  """Clouds of points, with the class of each and maybe the part of a point."""

  def __init__(
    self,
    *,
    source: Mapping[str, Any],
    num_points: int,
    batch_size: int,
    draw: str = "subset",
    draw_eval: str | None = None,
    stored_points: int | None = None,
    farthest: bool = False,
    unit_sphere: bool = True,
    augment: Sequence[Mapping[str, Any]] = (),
    parts: bool = False,
    few_shot: Mapping[str, Any] | None = None,
    label_fraction: float = 1.0,
    subset_seed: int = 0,
    train_split: str = "train",
    seed: int,
    cache_dir: pathlib.Path,
  ):
    """Checks the options; a split is opened when it is asked for.

    Fine-tuning on ModelNet40 draws 1024 of 1200 farthest points, and takes the
    first 1024 of them for evaluation: `num_points=1024, stored_points=1200,
    farthest=True, draw="subset", draw_eval="first"`.

    Args:
      source: a name of `SHAPE_SOURCES` and its options.
      num_points: of a row.
      batch_size: rows of the global batch.
      draw: key of `DRAWS`: which of a cloud's points a training row takes.
      draw_eval: the same for evaluation; `draw` by default.
      stored_points: keep so many points of each cloud on disk and read those;
        None: all that the source has.
      farthest: keep those that farthest point sampling finds, in its order.
      unit_sphere: see `Reading`.
      augment: see `Reading`.
      parts: rows also have `category` and `parts`.
      few_shot: arguments of `FewShot`.
      label_fraction: share of the training clouds of each class.
      subset_seed: of which clouds these are.
      train_split: the split that is trained on.
      seed: of the order of rows, and of what is drawn.
      cache_dir: where sampled points lie.

    Raises:
      ValueError: names the field that does not fit.
    """
    self.batch_size, self.train_split = batch_size, train_split
    self.source: ShapeSource = registry.build(
      SHAPE_SOURCES, source, "data.source"
    )
    self.reading = Reading(
      num_points=num_points,
      draw=draw,
      draw_eval=draw if draw_eval is None else draw_eval,
      unit_sphere=unit_sphere,
      augment=tuple(augment),
      parts=parts,
    )
    if stored_points is not None and stored_points < 1:
      raise ValueError(f"data.stored_points={stored_points} must be positive.")
    if farthest and stored_points is None:
      raise ValueError(
        "data.farthest=True: how many farthest points are kept is left to"
        " data.stored_points, which is missing."
      )
    self._few_shot = None
    if few_shot:
      self._few_shot = registry.call(FewShot, few_shot, "data.few_shot")
    self._keep = stored_points, farthest
    self._fraction = label_fraction, subset_seed
    self._seed, self._cache_dir = seed, cache_dir
    self._datasets: dict[str, PointDataset] = {}

  def clouds(self, split: str | None = None) -> Clouds:
    """The stored clouds of a split, the training one by default."""
    split = split or self.train_split
    clouds, train = self.source.open(split), split == self.train_split
    if self._few_shot is not None:
      clouds = self._few_shot.of(clouds, train=train)
    if train:
      clouds = fraction_of(clouds, *self._fraction)
    count, farthest = self._keep
    count = self.source.kept if count is None else count
    if count is not None:
      clouds = Stored(clouds, count, self._cache_dir, farthest=farthest)
    return clouds

  def dataset(self, split: str | None = None) -> PointDataset:
    split = split or self.train_split
    if split not in self._datasets:
      self._datasets[split] = PointDataset(
        self.clouds(split), self.reading, self._seed
      )
    return self._datasets[split]

  @property
  def about(self) -> About:
    """Classes and parts of the training split."""
    clouds = self.dataset().clouds
    return About(len(clouds.classes), clouds.class_parts)

  def objective(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """`config.objective` with the classes and parts that it asks for."""
    if not asks_for_classes(given):
      return dict(given)  # and no cloud needs to be there
    return with_classes(given, self.about, self.dataset().clouds.classes)

  def check(self, objective: nn.Module) -> None:
    check_points(objective, self.reading.num_points)

  def facts(self) -> dict[str, Any]:
    clouds = self.dataset().clouds
    counts = np.bincount(clouds.labels, minlength=len(clouds.classes))
    return {
      "rows": len(clouds),
      "class_shares": {
        name: float(count / len(clouds))
        for name, count in zip(clouds.classes, counts)
      },
    }

  def baseline(
    self, split: str, num_batches: int | None = None
  ) -> dict[str, float]:
    """None: what guessing means the objective knows."""
    del split, num_batches
    return {}


_KNOWN = ("num_classes", "labels", "class_parts")


def asks_for_classes(given: Mapping[str, Any]) -> bool:
  """Whether an objective's builder takes something that the data know."""
  builder = OBJECTIVES.get(given.get("name"))
  return builder is not None and not set(_KNOWN).isdisjoint(
    inspect.signature(builder).parameters
  )


def with_classes(
  given: Mapping[str, Any], about: About, labels: Sequence[str] = ()
) -> dict[str, Any]:
  """`config.objective` with what its builder asks for and the data know.

  Args:
    given: `config.objective`.
    about: the source.
    labels: names of the classes, if they are known.

  Raises:
    ValueError: it says something else.
  """
  values = about.num_classes, tuple(labels), about.class_parts
  known = dict(zip(_KNOWN, values, strict=True))
  found, builder = dict(given), OBJECTIVES.get(given.get("name"))
  if builder is None:
    return found
  for key in inspect.signature(builder).parameters:
    if not (value := known.get(key)):
      continue
    if key in found and _plain(found[key]) != _plain(value):
      raise ValueError(
        f"objective.{key}={found[key]!r} does not fit data.source, which has"
        f" {value!r}; leave it out."
      )
    found[key] = value
  return found


def _plain(value: Any) -> Any:
  """Tuples as lists, as JSON has them."""
  return [*map(_plain, value)] if isinstance(value, (list, tuple)) else value


def check_points(objective: nn.Module, num_points: int) -> None:
  """Refuses clouds that an objective would need more points of.

  Raises:
    ValueError: too few points, or a model that reads no points.
  """
  if not hasattr(objective, "least_points"):
    raise ValueError(
      f"model: {type(objective.encoder).__name__} reads no points, which is"
      " what data has; choose a model and an objective of point clouds."
    )
  if num_points < objective.least_points:
    raise ValueError(
      f"data.num_points={num_points} is too few for model.patches,"
      " model.patch_size and the objective.levels of part segmentation, which"
      f" need {objective.least_points}."
    )


@dataclasses.dataclass(frozen=True)
class AbstractPoints(AbstractData):
  """What `bertjax.experiment.build` asks of `PointData`, and nothing to read.

  Attributes:
    reading: how rows are made.
    about: what the source tells of itself.
  """

  reading: Reading
  about: About
  unit = PointDataset.unit

  def objective(self, given: Mapping[str, Any]) -> dict[str, Any]:
    return with_classes(given, self.about)

  def check(self, objective: nn.Module) -> None:
    check_points(objective, self.reading.num_points)

  def tokens_per_batch(self, batch_size: int) -> int:
    return batch_size * self.reading.num_points


def abstract_points(
  spec: Mapping[str, Any], vocab_size: int | None = None
) -> AbstractPoints:
  """The batches of `config.data` of points.

  Args:
    spec: arguments of `PointData`.
    vocab_size: must be None, for points have no vocabulary.

  Raises:
    ValueError: an option that does not fit.
  """
  if vocab_size is not None:
    raise ValueError(
      f"vocab_size={vocab_size} is for data of text; data.name='points' has"
      " none, leave it out."
    )
  options = {k: v for k, v in spec.items() if k != "name"}
  data = registry.call(
    PointData, options, "data", seed=0, cache_dir=pathlib.Path()
  )
  about = data.source.about()
  if few_shot := spec.get("few_shot"):
    about = About(few_shot["ways"])
  return AbstractPoints(
    batch_size=data.batch_size,
    row_spec=data.reading.row_spec(),
    reading=data.reading,
    about=about,
  )
