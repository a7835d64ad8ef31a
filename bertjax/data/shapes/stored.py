"""Points of clouds that are dear to make, kept on disk.

Meshes are sampled, and clouds brought into the order of farthest point
sampling, once: the result is an array that is read by index from then on.
"""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from bertjax import points
from bertjax.data.shapes.files import Cloud, Clouds
from bertjax.data.sources.base import fingerprint_of

_BATCH = 16  # clouds whose farthest points are looked for together


class Stored(Clouds):
  """The same clouds with `count` points each, from a file."""

  def __init__(
    self,
    clouds: Clouds,
    count: int,
    folder: pathlib.Path,
    *,
    farthest: bool = False,
  ):
    """Makes the files unless they are there.

    Args:
      clouds: what is kept.
      count: points of each.
      folder: where files lie.
      farthest: the points that farthest point sampling finds, in its order;
        else the first of the cloud.

    Raises:
      ValueError: a cloud with fewer points.
    """
    self.classes, self.class_parts = clouds.classes, clouds.class_parts
    self._labels = clouds.labels.tolist()
    self._name = fingerprint_of(clouds.fingerprint(), count, farthest)
    self._folder = folder / "points"
    if not self._path("points").exists():
      self._write(clouds, count, farthest)
    self._points = np.load(self._path("points"), mmap_mode="r")
    self._parts = None
    if self._path("parts").exists():
      self._parts = np.load(self._path("parts"), mmap_mode="r")

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Cloud:
    parts = None if self._parts is None else np.array(self._parts[index])
    return Cloud(
      np.array(self._points[index]), self._labels[index], parts=parts
    )

  def fingerprint(self) -> str:
    return self._name

  def _path(self, what: str) -> pathlib.Path:
    return self._folder / f"{self._name}.{what}.npy"

  def _write(self, clouds: Clouds, count: int, farthest: bool) -> None:
    self._folder.mkdir(parents=True, exist_ok=True)
    kept = {"points": ((3,), np.float32)}
    if clouds.class_parts:
      kept["parts"] = (), np.int32
    with contextlib.ExitStack() as stack:
      # What is opened first is closed last: points say that all is there.
      arrays = {
        what: stack.enter_context(
          _written(self._path(what), (len(clouds), count, *shape), dtype)
        )
        for what, (shape, dtype) in kept.items()
      }
      for start in range(0, len(clouds), _BATCH):
        numbers = range(start, min(start + _BATCH, len(clouds)))
        batch = [_checked(clouds[i], i, count) for i in numbers]
        index = [np.arange(count)] * len(batch)
        if farthest:
          index = _farthest([cloud.points for cloud in batch], count)
        for number, cloud, chosen in zip(numbers, batch, index):
          for what, array in arrays.items():
            array[number] = getattr(cloud, what)[chosen]


def _checked(cloud: Cloud, number: int, count: int) -> Cloud:
  if len(cloud.points) < count:
    raise ValueError(
      f"Cloud {number} has {len(cloud.points)} points, fewer than the {count}"
      " that data.stored_points asks for."
    )
  return cloud


def _farthest(clouds: list[np.ndarray], count: int) -> np.ndarray:
  """Indices [b, count]; clouds of fewer points repeat their first one."""
  most = max(map(len, clouds))
  padded = np.stack(
    [
      np.concatenate([x, np.repeat(x[:1], most - len(x), axis=0)])
      for x in clouds
    ]
  )
  # A copy of the first point has distance 0 from the chosen: it comes last.
  found = np.asarray(points.farthest_point_sampling(padded, count))
  return np.where(found < np.array([[len(x)] for x in clouds]), found, 0)


@contextlib.contextmanager
def _written(
  path: pathlib.Path, shape: tuple[int, ...], dtype: Any
) -> Iterator[np.ndarray]:
  """An array on disk to be filled; the file is whole at any moment."""
  # Not `tempfile`, whose files only their owner may read.
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  try:
    array = np.lib.format.open_memmap(
      partial, mode="w+", dtype=dtype, shape=shape
    )
    yield array
    array.flush()
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
