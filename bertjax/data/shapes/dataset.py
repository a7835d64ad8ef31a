"""Rows of points: drawn anew from stored clouds in every epoch."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bertjax.data.dataset import RowDataset
from bertjax.data.orders import Orders
from bertjax.data.shapes import drawing
from bertjax.data.shapes.files import Clouds
from bertjax.data.shapes.procedural import normalised
from bertjax.data.sources.base import fingerprint_of
from bertjax.registry import lookup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """How a row is made of a stored cloud.

  Attributes:
    num_points: of a row.
    draw: key of `DRAWS`: which points a training row takes.
    draw_eval: the same for evaluation.
    unit_sphere: rows are moved and scaled so that centroid and largest norm
      are 0 and 1, before they are augmented.
    augment: names of `AUGMENTATIONS` with options; training rows only.
    parts: rows also tell the part of every point.
  """

  num_points: int
  draw: str = "subset"
  draw_eval: str = "subset"
  unit_sphere: bool = True
  augment: Sequence[Mapping[str, Any]] = ()
  parts: bool = False

  def __post_init__(self):
    if self.num_points < 1:
      raise ValueError(f"data.num_points={self.num_points} must be positive.")
    lookup(drawing.DRAWS, self.draw, "data.draw")
    lookup(drawing.DRAWS, self.draw_eval, "data.draw_eval")
    drawing.augmentation(self.augment)

  @functools.cached_property
  def _augmented(self) -> drawing.Augment:
    return drawing.augmentation(self.augment)

  def still(self) -> "Reading":
    """The same for evaluation: its draw, and nothing augmented."""
    return dataclasses.replace(self, draw=self.draw_eval, augment=())

  def drawn(
    self, points: np.ndarray, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray]:
    """Points of a row, float64 [num_points, 3], and which of a cloud's.

    Args:
      points: of the cloud [n, 3].
      rng: chooses and augments.
    """
    chosen = drawing.DRAWS[self.draw](len(points), self.num_points, rng)
    row = points[chosen].astype(np.float64)
    if self.unit_sphere:
      row = normalised(row)
    return self._augmented(row, rng), chosen

  def row_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a row."""
    shapes = {"points": ((self.num_points, 3), np.float32)}
    shapes |= {name: ((), np.int32) for name in ("labels", "index")}
    if self.parts:
      shapes |= {"category": ((), np.int32)}
      shapes |= {"parts": ((self.num_points,), np.int32)}
    return {k: jax.ShapeDtypeStruct(*v) for k, v in shapes.items()}

  def facts(self) -> dict[str, Any]:
    """All that a row depends on, as JSON values."""
    found = dataclasses.asdict(self)
    return found | {"augment": [dict(step) for step in self.augment]}


class PointDataset(RowDataset):
  """Clouds in another order every epoch, other points of each.

  A row is a pure function of the seed, the epoch and the cloud. A batch has
  `points` [b, n, 3], `labels` [b] and `index` [b], the number of the cloud;
  with parts also `category` [b], the same as `labels`, and `parts` [b, n].
  Rows that fill the last batch of an evaluation have -1 for all of these.
  """

  unit = "points"

  def __init__(
    self, clouds: Clouds, reading: Reading, seed: int = 0, view: int = 0
  ):
    """Args:
    clouds: of a split.
    reading: how rows are made of them.
    seed: of their order, and of what is drawn.
    view: what is drawn is that of so many epochs later; the order is not.

    Raises:
      ValueError: no cloud, or clouds without the parts that are asked for.
    """
    if not len(clouds):
      raise ValueError("data.source has no cloud in this split.")
    if reading.parts and not clouds.class_parts:
      raise ValueError(
        "data.parts=True: these clouds do not tell the parts of their points;"
        " leave it out."
      )
    self.clouds, self.reading = clouds, reading
    self.seed, self.view = seed, view
    self._orders = Orders(len(clouds), seed)

  @property
  def row_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    return self.reading.row_spec()

  def rows_per_epoch(self, epoch: int) -> int:
    return len(self.clouds)

  def epoch_of(self, row: int) -> tuple[int, int]:
    return divmod(row, len(self.clouds))

  def tokens_per_batch(self, batch_size: int) -> int:
    """Points of a batch."""
    return batch_size * self.reading.num_points

  def rows(self, first: int, stop: int) -> dict[str, np.ndarray]:
    epochs, index = self._orders.find(first, stop)
    rows = [self._row(int(e), int(i)) for e, i in zip(epochs, index)]
    return {
      name: np.array([row[name] for row in rows], spec.dtype).reshape(
        len(rows), *spec.shape
      )
      for name, spec in self.row_spec.items()
    }

  def _row(self, epoch: int, index: int) -> dict[str, Any]:
    rng = np.random.default_rng([self.seed, epoch + self.view, index])
    cloud = self.clouds[index]
    points, chosen = self.reading.drawn(cloud.points, rng)
    row = {"points": points, "labels": cloud.label, "index": index}
    if self.reading.parts:
      row |= {"category": cloud.label, "parts": cloud.parts[chosen]}
    return row

  def evaluation_batches(self, *args, **options):
    """As of `RowDataset`: points as for evaluation, nothing augmented."""
    plain = PointDataset(self.clouds, self.reading.still(), self.seed)
    return RowDataset.evaluation_batches(plain, *args, **options)

  def views(
    self, count: int, reading: Reading, *args, **options
  ) -> Iterator[list[dict[str, np.ndarray]]]:
    """Evaluation batches `count` times over: other points of the same clouds.

    Args:
      count: of views.
      reading: how their rows are drawn and augmented.
      *args: those of `evaluation_batches`.
      **options: the same.
    """
    streams = [
      RowDataset.evaluation_batches(
        PointDataset(self.clouds, reading, self.seed, view), *args, **options
      )
      for view in range(count)
    ]
    return map(list, zip(*streams, strict=True))

  def empty_rows(self, count: int) -> dict[str, np.ndarray]:
    """Rows of points at the origin, without a label."""
    return {
      k: np.full((count, *v.shape), 0 if k == "points" else -1, v.dtype)
      for k, v in self.row_spec.items()
    }

  def fingerprint(self) -> str:
    return fingerprint_of(
      self.clouds.fingerprint(),
      self.reading.facts(),
      self.seed,
      *([self.view] if self.view else []),
    )

  def reseeded(self, seed: int) -> "PointDataset":
    return PointDataset(self.clouds, self.reading, seed, self.view)
