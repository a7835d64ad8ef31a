"""Clouds sampled from the surfaces of mesh files, by trimesh."""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from bertjax.data.shapes.files import Cloud, Clouds
from bertjax.data.sources.base import fingerprint_of

ENDINGS = (".obj", ".off", ".stl", ".ply", ".glb")


class Meshes(Clouds):
  """A mesh a file, its class the folder that it lies in."""

  def __init__(
    self,
    paths: Sequence[pathlib.Path],
    names: Sequence[str],
    classes: Sequence[str],
    num_points: int,
  ):
    """Args:
    paths: of the split.
    names: the class of each.
    classes: all of them, those of other splits too.
    num_points: of each cloud.
    """
    numbers = {name: i for i, name in enumerate(classes)}
    super().__init__(paths, [numbers[name] for name in names])
    self.classes, self._num_points = tuple(classes), num_points

  def __getitem__(self, index: int) -> Cloud:
    points = sampled(self._paths[index], self._num_points)
    return Cloud(points.astype(np.float32), self._labels[index])

  def fingerprint(self) -> str:
    return fingerprint_of(super().fingerprint(), self._num_points)


def class_of(
  path: pathlib.Path, folder: pathlib.Path, splits: Collection[str]
) -> str:
  """The innermost folder below `folder` that is not named as a split."""
  names = path.relative_to(folder).parts[:-1]
  return next((n for n in reversed(names) if n not in splits), "mesh")


def found_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """All mesh files below a folder, in order.

  Raises:
    ValueError: there is none.
  """
  paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
  if not paths:
    raise ValueError(
      f"data.source.path={str(folder)!r} holds no mesh ({', '.join(ENDINGS)})."
    )
  return paths


def split_of(
  path: pathlib.Path, folder: pathlib.Path, fractions: Mapping[str, float]
) -> str:
  """A folder named as a split that it lies in, or by a hash of its name."""
  inside = path.relative_to(folder)
  for name in inside.parts[:-1]:
    if name in fractions:
      return name
  return split_by_hash(str(inside), fractions)


def split_by_hash(name: str, fractions: Mapping[str, float]) -> str:
  """A split, drawn with these probabilities by a hash of a name."""
  place = int(fingerprint_of(name)[:13], 16) / 16**13
  bounds = np.cumsum(list(fractions.values()))
  return list(fractions)[int(np.searchsorted(bounds, place * bounds[-1]))]


def sampled(
  path: pathlib.Path,
  num_points: int,
  file: BinaryIO | None = None,
  *,
  or_vertices: bool = False,
) -> np.ndarray:
  """Points on the surface of a mesh, uniform by area, float64 [n, 3].

  A file of the same name gives the same points every time.

  Args:
    path: of the mesh; its ending says what it is.
    num_points: how many.
    file: what is read in its place, as out of an archive.
    or_vertices: of a file without faces, the vertices instead, all of them.

  Raises:
    ValueError: it cannot be read, or holds nothing of the kind.
  """
  trimesh = _trimesh()
  mesh = _loaded(path, file, force="mesh")
  has_faces = len(getattr(mesh, "faces", ())) > 0
  if has_faces and mesh.area > 0:
    seed = int(fingerprint_of(path.name)[:8], 16)
    found, _ = trimesh.sample.sample_surface(mesh, num_points, seed=seed)
    return np.asarray(found, np.float64)
  if or_vertices and not has_faces:
    # Without `force`, which makes an empty mesh of them.
    found = getattr(_loaded(path, file), "vertices", ())
    if len(found):
      return np.asarray(found, np.float64)
  raise ValueError(f"{path} holds no surface to draw points from.")


def _trimesh() -> Any:
  try:
    import trimesh
  except ImportError as err:
    raise ValueError(
      "Meshes need trimesh: pip install 'bertjax[points]'."
    ) from err
  return trimesh


def _loaded(path: pathlib.Path, file: BinaryIO | None, **options: Any) -> Any:
  """What trimesh makes of a file."""
  load = _trimesh().load
  try:
    return load(
      path if file is None else file,
      file_type=path.suffix.lower().removeprefix("."),
      process=False,
      skip_materials=True,
      **options,
    )
  except Exception as err:  # whatever breaks in the reader of a format
    raise ValueError(f"{path} cannot be read: {err!r}.") from err
