"""Surfaces of parametric solids, sampled uniformly by area.

A surface draws points from a numpy generator: `draw(count, rng) -> [count, 3]`,
float64, around the origin with z up. Lengths are in the units of the arguments.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Draw = Callable[[int, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Surface:
  """A piece of surface.

  Attributes:
    area: of it.
    draw: points on it, uniform by area.
  """

  area: float
  draw: Draw

  def moved(
    self, shift: Sequence[float], turn: np.ndarray | None = None
  ) -> "Surface":
    """Turned by a rotation matrix, then shifted; the area stays."""

    def draw(count, rng):
      points = self.draw(count, rng)
      if turn is not None:
        points = points @ turn.T
      return points + np.asarray(shift, float)

    return Surface(self.area, draw)


def rotation(axis: int, angle: float) -> np.ndarray:
  """The matrix of a turn by `angle` radians about a coordinate axis."""
  i, j = (k for k in range(3) if k != axis)
  matrix = np.eye(3)
  sign = -1 if axis == 1 else 1
  matrix[i, i] = matrix[j, j] = math.cos(angle)
  matrix[j, i], matrix[i, j] = sign * math.sin(angle), -sign * math.sin(angle)
  return matrix


def rectangle(width: float, depth: float) -> Surface:
  """In the plane z = 0."""
  size = np.array([width, depth, 0.0])

  def draw(count, rng):
    return (rng.random((count, 3)) - 0.5) * size

  return Surface(width * depth, draw)


def disc(radius: float, hole: float = 0.0) -> Surface:
  """In the plane z = 0, without what is nearer than `hole` to its middle."""

  def draw(count, rng):
    r = np.sqrt(rng.uniform(hole**2, radius**2, count))
    return _around(r, np.zeros(count), rng)

  return Surface(math.pi * (radius**2 - hole**2), draw)


def sphere(radius: float) -> Surface:
  """All of it."""

  def draw(count, rng):
    direction = rng.normal(size=(count, 3))
    return radius * direction / np.linalg.norm(direction, axis=1, keepdims=True)

  return Surface(4 * math.pi * radius**2, draw)


def tube(radius: float, height: float, top: float | None = None) -> Surface:
  """The side of a cylinder, or of a cone that ends with radius `top`."""
  top = radius if top is None else top
  slant = math.hypot(height, radius - top)

  def draw(count, rng):
    # Circles count by their circumference.
    u = rng.random(count)
    if math.isclose(radius, top):
      share = u
    else:
      r = np.sqrt(radius**2 + u * (top**2 - radius**2))
      share = (r - radius) / (top - radius)
    r = radius + share * (top - radius)
    return _around(r, (share - 0.5) * height, rng)

  return Surface(math.pi * (radius + top) * slant, draw)


def torus(ring: float, thickness: float) -> Surface:
  """Circles of radius `thickness` around one of radius `ring` in z = 0.

  Raises:
    ValueError: the torus would cut itself.
  """
  if not 0 < thickness <= ring:
    raise ValueError(f"thickness={thickness} must be in 0..{ring}, the ring.")

  def draw(count, rng):
    found = np.empty(0)
    while len(found) < count:  # the outer half is the larger one
      angle = rng.uniform(0, 2 * math.pi, 2 * count)
      weight = (ring + thickness * np.cos(angle)) / (ring + thickness)
      found = np.concatenate([found, angle[rng.random(2 * count) < weight]])
    angle = found[:count]
    r = ring + thickness * np.cos(angle)
    return _around(r, thickness * np.sin(angle), rng)

  return Surface(4 * math.pi**2 * ring * thickness, draw)


def box(width: float, depth: float, height: float) -> dict[str, list[Surface]]:
  """Its faces: "top", "bottom" and "side"."""
  flat = rectangle(width, depth)
  x, y = rotation(1, math.pi / 2), rotation(0, math.pi / 2)
  front, flank = rectangle(width, height), rectangle(height, depth)
  return {
    "top": [flat.moved((0, 0, height / 2))],
    "bottom": [flat.moved((0, 0, -height / 2))],
    "side": [
      *(front.moved((0, s * depth / 2, 0), y) for s in (-1, 1)),
      *(flank.moved((s * width / 2, 0, 0), x) for s in (-1, 1)),
    ],
  }


def _around(
  r: np.ndarray, z: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Points at distances `r` from the axis and heights `z`, anywhere around."""
  angle = rng.uniform(0, 2 * math.pi, len(r))
  return np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1)


def sample(
  parts: Sequence[Sequence[Surface]], count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Points on several parts together, uniform by area, in random order.

  Args:
    parts: surfaces of each part.
    count: how many points.
    rng: what is drawn from.

  Returns:
    Points [count, 3] and the number of the part of each [count].

  Raises:
    ValueError: nothing to draw from.
  """
  surfaces = [(i, s) for i, part in enumerate(parts) for s in part]
  areas = np.array([surface.area for _, surface in surfaces])
  if not areas.sum() > 0:
    raise ValueError("parts have no area to draw points from.")
  counts = rng.multinomial(count, areas / areas.sum())
  points = [s.draw(n, rng) for (_, s), n in zip(surfaces, counts)]
  labels = np.repeat([i for i, _ in surfaces], counts)
  order = rng.permutation(count)
  return np.concatenate(points)[order], labels[order]
