"""Points of clouds that are dear to make, kept on disk.

Meshes are sampled, and clouds brought into the order of farthest point
sampling, once: the result is an array that is read by index from then on.
"""

import os
import pathlib
import tempfile

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
    kept, parts = np.empty((len(clouds), count, 3), np.float32), []
    for start in range(0, len(clouds), _BATCH):
      stop = min(start + _BATCH, len(clouds))
      batch = [clouds[i] for i in range(start, stop)]
      for number, cloud in enumerate(batch, start):
        if len(cloud.points) < count:
          raise ValueError(
            f"Cloud {number} has {len(cloud.points)} points, fewer than the"
            f" {count} that data.stored_points asks for."
          )
      index = [np.arange(count)] * len(batch)
      if farthest:
        index = _farthest([cloud.points for cloud in batch], count)
      for number, (cloud, chosen) in enumerate(zip(batch, index), start):
        kept[number] = cloud.points[chosen]
        if cloud.parts is not None:
          parts.append(cloud.parts[chosen])
    if parts:
      _save(self._path("parts"), np.stack(parts))
    _save(self._path("points"), kept)  # last: it says that all is there


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


def _save(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes a file that is whole at any moment."""
  with tempfile.NamedTemporaryFile(
    dir=path.parent, suffix=".partial", delete=False
  ) as file:
    np.save(file, array)
  os.replace(file.name, path)
