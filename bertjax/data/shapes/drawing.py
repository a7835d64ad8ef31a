"""Which of a stored cloud's points are read, and what is done to them.

Names become functions of (points, generator) here; all are NumPy.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bertjax import registry

# (stored points, wanted, generator) -> their indices.
Draw = Callable[[int, int, np.random.Generator], np.ndarray]
# (points [n, 3], generator) -> points [n, 3].
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def subset(stored: int, count: int, rng: np.random.Generator) -> np.ndarray:
  """Different points in random order; all again while there are too few."""
  again, rest = divmod(count - 1, stored)
  sizes = [stored] * again + [rest + 1]
  return np.concatenate([rng.choice(stored, n, replace=False) for n in sizes])


def replacement(
  stored: int, count: int, rng: np.random.Generator
) -> np.ndarray:
  """Each point drawn on its own, as for part segmentation."""
  return rng.choice(stored, count)


def first(stored: int, count: int, rng: np.random.Generator) -> np.ndarray:
  """The first points: of points in the order of sampling, the farthest."""
  del rng
  return np.arange(count) % stored


DRAWS: dict[str, Draw] = {
  "subset": subset,
  "replacement": replacement,
  "first": first,
}


def scale_shift(
  low: float = 2 / 3, high: float = 3 / 2, shift: float = 0.2
) -> Augment:
  """Every axis scaled by U(low, high), then shifted by U(-shift, shift).

  Raises:
    ValueError: not 0 < low <= high, or a negative shift.
  """
  if not 0 < low <= high or shift < 0:
    raise ValueError(
      f"data.augment: low={low}, high={high}, shift={shift}; they must satisfy"
      " 0 < low <= high and shift >= 0."
    )

  def apply(points, rng):
    scale, move = rng.uniform(low, high, 3), rng.uniform(-shift, shift, 3)
    return points * scale + move

  return apply


def rotate(axis: str = "z") -> Augment:
  """A turn by any angle about the axis that points up."""
  number = registry.lookup({"x": 0, "y": 1, "z": 2}, axis, "data.augment.axis")
  i, j = (k for k in range(3) if k != number)

  def apply(points, rng):
    angle = rng.uniform(0, 2 * np.pi)
    turned = points.copy()
    turned[:, i] = np.cos(angle) * points[:, i] - np.sin(angle) * points[:, j]
    turned[:, j] = np.sin(angle) * points[:, i] + np.cos(angle) * points[:, j]
    return turned

  return apply


def jitter(deviation: float = 0.01, clip: float = 0.05) -> Augment:
  """Normal noise on every coordinate, cut off at `clip`.

  Raises:
    ValueError: a negative deviation, or nothing left of it.
  """
  if deviation < 0 or clip <= 0:
    raise ValueError(
      f"data.augment: deviation={deviation} and clip={clip} must be positive."
    )

  def apply(points, rng):
    noise = rng.normal(scale=deviation, size=points.shape)
    return points + np.clip(noise, -clip, clip)

  return apply


AUGMENTATIONS: dict[str, Callable[..., Augment]] = {
  "jitter": jitter,
  "rotate": rotate,
  "scale_shift": scale_shift,
}


def augmentation(specs: Sequence[Mapping[str, Any]]) -> Augment:
  """`config.data.augment`: names of `AUGMENTATIONS` with options, in order."""
  steps = [registry.build(AUGMENTATIONS, s, "data.augment") for s in specs]

  def apply(points, rng):
    return functools.reduce(lambda x, step: step(x, rng), steps, points)

  return apply
