"""Shapes with classes and parts that need no download.

Each class is a family of solids whose proportions are drawn at random: single
solids, and compositions such as tables and mugs. A shape is a pure function of
(seed, index); every class has the same share of the indices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bertjax.data.shapes import solids
from bertjax.data.shapes.solids import Surface
from bertjax.registry import lookup

Parts = Mapping[str, Sequence[Surface]]
Draw = Callable[[np.random.Generator], Parts]


@dataclasses.dataclass(frozen=True)
class Shape:
  """One cloud.

  Attributes:
    points: [n, 3] float32, in the unit sphere around their centroid, z up.
    label: number of its class in `ProceduralShapes.classes`.
    parts: [n] int32, of each point the number in `ProceduralShapes.parts`.
  """

  points: np.ndarray
  label: int
  parts: np.ndarray


def frame(points: np.ndarray) -> tuple[np.ndarray, float]:
  """The centroid [3], and the largest distance from it, float64."""
  points = points.astype(np.float64)
  centre = points.mean(0)
  return centre, max(np.linalg.norm(points - centre, axis=1).max(), 1e-12)


def normalised(points: np.ndarray) -> np.ndarray:
  """Moved and scaled so that centroid and largest norm are 0 and 1."""
  centre, radius = frame(points)
  return (points - centre) / radius


def _sphere(rng) -> Parts:
  del rng  # all are alike, but for the scales below
  return {"surface": [solids.sphere(1)]}


def _box(rng) -> Parts:
  return solids.box(*rng.uniform(0.5, 1.5, 3))


def _cylinder(rng) -> Parts:
  radius, height = rng.uniform(0.3, 0.8), rng.uniform(0.8, 2)
  return {
    "side": [solids.tube(radius, height)],
    "top": [solids.disc(radius).moved((0, 0, height / 2))],
    "bottom": [solids.disc(radius).moved((0, 0, -height / 2))],
  }


def _cone(rng) -> Parts:
  radius, height = rng.uniform(0.5, 1), rng.uniform(0.8, 2)
  return {
    "side": [solids.tube(radius, height, 0)],
    "bottom": [solids.disc(radius).moved((0, 0, -height / 2))],
  }


def _torus(rng) -> Parts:
  return {"surface": [solids.torus(1, rng.uniform(0.15, 0.5))]}


def _plane(rng) -> Parts:
  return {"surface": [solids.rectangle(*rng.uniform(0.6, 1.4, 2))]}


def _legs(width, depth, height, radius) -> list[Surface]:
  """Four tubes under the corners of a board at z = 0."""
  x, y = width / 2 - radius, depth / 2 - radius
  leg = solids.tube(radius, height)
  return [
    leg.moved((sx * x, sy * y, -height / 2)) for sx in (-1, 1) for sy in (-1, 1)
  ]


def _board(width, depth, thickness) -> list[Surface]:
  return [
    s for part in solids.box(width, depth, thickness).values() for s in part
  ]


def _table(rng) -> Parts:
  width, depth = rng.uniform(1, 2), rng.uniform(0.7, 1.2)
  legs = _legs(width, depth, rng.uniform(0.6, 1), rng.uniform(0.03, 0.07))
  return {"board": _board(width, depth, 0.08), "leg": legs}


def _chair(rng) -> Parts:
  width, depth, height = rng.uniform(0.45, 0.6, 3)
  back = rng.uniform(0.5, 0.8)
  turned = solids.rotation(0, math.pi / 2)
  return {
    "board": _board(width, depth, 0.06),
    "leg": _legs(width, depth, height, 0.03),
    "back": [
      s.moved((0, depth / 2, back / 2), turned)
      for s in _board(width, back, 0.05)
    ],
  }


def _lamp(rng) -> Parts:
  height, shade = rng.uniform(0.8, 1.5), rng.uniform(0.3, 0.5)
  radius = rng.uniform(0.25, 0.4)
  low = -height / 2
  return {
    "shade": [solids.tube(radius, shade, radius / 2).moved((0, 0, height / 2))],
    "pole": [solids.tube(0.03, height)],
    "base": [
      solids.disc(radius).moved((0, 0, low)),
      solids.disc(radius).moved((0, 0, low - 0.06)),
      solids.tube(radius, 0.06).moved((0, 0, low - 0.03)),
    ],
  }


def _mug(rng) -> Parts:
  radius, height = rng.uniform(0.35, 0.5), rng.uniform(0.8, 1.1)
  ring = rng.uniform(0.2, 0.3)
  upright = solids.rotation(0, math.pi / 2)
  handle = solids.torus(ring, 0.05).moved((radius + ring / 2, 0, 0), upright)
  return {
    "body": [
      solids.tube(radius, height),
      solids.disc(radius).moved((0, 0, -height / 2)),
    ],
    "handle": [handle],
  }


def _dumbbell(rng) -> Parts:
  radius, length = rng.uniform(0.25, 0.45), rng.uniform(1, 1.6)
  ball = solids.sphere(radius)
  lying = solids.rotation(1, math.pi / 2)
  return {
    "ball": [ball.moved((s * length / 2, 0, 0)) for s in (-1, 1)],
    "bar": [solids.tube(0.07, length - 2 * radius).moved((0, 0, 0), lying)],
  }


def _bottle(rng) -> Parts:
  radius, height = rng.uniform(0.25, 0.4), rng.uniform(0.7, 1)
  neck, shoulder = rng.uniform(0.25, 0.4), 0.25
  narrow = radius / 3
  top = height / 2 + shoulder
  return {
    "body": [
      solids.tube(radius, height),
      solids.disc(radius).moved((0, 0, -height / 2)),
    ],
    "shoulder": [
      solids.tube(radius, shoulder, narrow).moved((0, 0, top - shoulder / 2))
    ],
    "neck": [solids.tube(narrow, neck).moved((0, 0, top + neck / 2))],
  }


SHAPES: dict[str, Draw] = {
  "sphere": _sphere,
  "box": _box,
  "cylinder": _cylinder,
  "cone": _cone,
  "torus": _torus,
  "plane": _plane,
  "table": _table,
  "chair": _chair,
  "lamp": _lamp,
  "mug": _mug,
  "dumbbell": _dumbbell,
  "bottle": _bottle,
}


@dataclasses.dataclass(frozen=True)
class ProceduralShapes:
  """As many shapes as one likes.

  Attributes:
    classes: names in `SHAPES`.
    num_points: of each cloud.
    seed: of all shapes.
    jitter: standard deviation of the noise of points, before they are scaled
      to the unit sphere.
    stretch: largest factor by which an axis is stretched or shrunk.

  Raises:
    ValueError: an unknown class, no point, a negative jitter, or a stretch
      below 1.
  """

  classes: tuple[str, ...] = tuple(SHAPES)
  num_points: int = 1024
  seed: int = 0
  jitter: float = 0.01
  stretch: float = 1.3

  def __post_init__(self):
    for name in self.classes:
      lookup(SHAPES, name, "classes")
    if not self.classes:
      raise ValueError(f"classes is empty; choose from {', '.join(SHAPES)}.")
    if self.num_points < 1 or self.stretch < 1:
      raise ValueError(
        f"num_points={self.num_points} and stretch={self.stretch} must be at"
        " least 1."
      )
    if self.jitter < 0:
      raise ValueError(f"jitter={self.jitter} must not be negative.")

  @functools.cached_property
  def parts(self) -> tuple[str, ...]:
    """Names of all parts as "class/part", class by class."""
    rng = np.random.default_rng(0)
    return tuple(
      f"{name}/{part}" for name in self.classes for part in SHAPES[name](rng)
    )

  def __getitem__(self, index: int) -> Shape:
    label = index % len(self.classes)
    rng = np.random.default_rng((self.seed, index))
    name = self.classes[label]
    drawn = SHAPES[name](rng)
    points, parts = solids.sample(list(drawn.values()), self.num_points, rng)
    log = math.log(self.stretch)
    points = points * np.exp(rng.uniform(-log, log, 3))
    points = points + rng.normal(scale=self.jitter, size=points.shape)
    first = self.parts.index(f"{name}/{next(iter(drawn))}")
    return Shape(
      normalised(points).astype(np.float32),
      label,
      (first + parts).astype(np.int32),
    )
