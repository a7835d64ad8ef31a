"""Where clouds come from, by name."""

import abc
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bertjax.data.shapes import files, furniture, hdf5, meshes
from bertjax.data.shapes.files import Cloud, Clouds
from bertjax.data.shapes.procedural import SHAPES, ProceduralShapes
from bertjax.data.sources.base import fingerprint_of
from bertjax.registry import lookup


class About(NamedTuple):
  """What is known of a source before it is read.

  Attributes:
    num_classes: of clouds; None: only the data know.
    class_parts: see `Clouds`.
  """

  num_classes: int | None = None
  class_parts: tuple[tuple[int, ...], ...] = ()


class ShapeSource(abc.ABC):
  """Clouds by split.

  Attributes:
    kept: points of clouds that take long to make, and so are kept on disk; None
      reads clouds as they are.
  """

  kept: int | None = None

  @abc.abstractmethod
  def open(self, split: str) -> Clouds:
    """The clouds of a split.

    Raises:
      ValueError: an unknown split, or files that are not as they should be.
    """

  @abc.abstractmethod
  def about(self) -> About:
    """What holds for every split, without reading anything."""


class ProceduralClouds(Clouds):
  """Generated shapes; see `ProceduralShapes`."""

  def __init__(self, shapes: ProceduralShapes, count: int):
    self._shapes, self._count = shapes, count
    self.classes = shapes.classes
    self.class_parts = tuple(
      tuple(
        i for i, part in enumerate(shapes.parts) if part.startswith(f"{name}/")
      )
      for name in shapes.classes
    )

  def __len__(self) -> int:
    return self._count

  @property
  def labels(self) -> np.ndarray:
    numbers = np.arange(self._count, dtype=np.int32)
    return numbers % np.int32(len(self.classes))

  def __getitem__(self, index: int) -> Cloud:
    if not 0 <= index < self._count:
      raise IndexError(f"cloud {index} of {self._count}")
    shape = self._shapes[index]
    return Cloud(shape.points, shape.label, parts=shape.parts)

  def fingerprint(self) -> str:
    return fingerprint_of(dataclasses.asdict(self._shapes), self._count)


class Procedural(ShapeSource):
  """As many generated shapes as one likes, no file needed."""

  def __init__(
    self,
    *,
    sizes: Mapping[str, int] | None = None,
    classes: Sequence[str] = tuple(SHAPES),
    points: int = 2048,
    jitter: float = 0.01,
    stretch: float = 1.3,
    seed: int = 0,
  ):
    """Args:
    sizes: clouds by split; by default 2400, 240 and 480 of "train",
      "validation" and "test".
    classes: names in `SHAPES`.
    points: of a stored cloud.
    jitter: see `ProceduralShapes`.
    stretch: see `ProceduralShapes`.
    seed: of all shapes.

    Raises:
      ValueError: see `ProceduralShapes`, or a split without clouds.
    """
    self._sizes = dict(sizes or dict(train=2400, validation=240, test=480))
    for split, count in self._sizes.items():
      if count < 1:
        raise ValueError(
          f"data.source.sizes.{split}={count} must be at least 1."
        )
    self._shapes = ProceduralShapes(
      tuple(classes), points, seed, jitter, stretch
    )

  def open(self, split: str) -> Clouds:
    count = lookup(self._sizes, split, "data.source.sizes")
    number = list(self._sizes).index(split)
    # Seeds of a pair would be those of another seed's splits.
    seed = int(fingerprint_of(self._shapes.seed, number)[:8], 16)
    return ProceduralClouds(dataclasses.replace(self._shapes, seed=seed), count)

  def about(self) -> About:
    clouds = ProceduralClouds(self._shapes, 1)
    return About(len(clouds.classes), clouds.class_parts)


class OnDisk(ShapeSource):
  """A published collection."""

  def __init__(
    self, path: str, open_split: Callable[[str], Clouds], about: About
  ):
    """Args:
    path: of its folder.
    open_split: gives the clouds of a split.
    about: what is known without the files.
    """
    self._path, self._open_split, self._about = path, open_split, about

  def open(self, split: str) -> Clouds:
    if not pathlib.Path(self._path).exists():
      raise ValueError(f"data.source.path={self._path!r} is not there.")
    try:
      clouds = self._open_split(split)
    except FileNotFoundError as err:
      raise ValueError(f"data.source.path={self._path!r}: {err}") from err
    if not len(clouds):
      raise ValueError(
        f"data.source.path={self._path!r}: the split {split!r} is empty; its"
        " list names no cloud."
      )
    return clouds

  def about(self) -> About:
    return self._about


def shapenet55(*, path: str) -> OnDisk:
  """See `files.ShapeNet55`; split "all" is train and test together."""
  return OnDisk(path, lambda s: files.ShapeNet55(path, s), About(55))


def modelnet40(*, path: str) -> OnDisk:
  """See `files.ModelNet40`."""
  return OnDisk(path, lambda s: files.ModelNet40(path, s), About(40))


def modelnet40_cache(*, path: str, points: int = 8192) -> OnDisk:
  """Point-BERT's pickles `modelnet40_SPLIT_POINTSpts_fps.dat` of a folder."""

  def open_split(split: str) -> Clouds:
    name = f"modelnet40_{split}_{points}pts_fps.dat"
    return files.ModelNet40Cache(pathlib.Path(path) / name)

  return OnDisk(path, open_split, About(40))


def modelnet40_hdf5(*, path: str) -> OnDisk:
  """See `hdf5.ModelNet40HDF5`."""
  return OnDisk(path, lambda s: hdf5.ModelNet40HDF5(path, s), About(40))


def modelnet40_few_shot(
  *, path: str, ways: int, shots: int, fold: int = 0
) -> OnDisk:
  """Point-BERT's pickles of few-shot tasks; see `files.FewShotPickle`."""

  def open_split(split: str) -> Clouds:
    return files.FewShotPickle(path, split, ways, shots, fold)

  return OnDisk(path, open_split, About(ways))


def scanobjectnn(*, path: str, variant: str = "hardest") -> OnDisk:
  """See `hdf5.ScanObjectNN`."""
  return OnDisk(path, lambda s: hdf5.ScanObjectNN(path, s, variant), About(15))


def shapenetpart(*, path: str) -> OnDisk:
  """See `files.ShapeNetPart`; split "trainval" is what the paper trains on."""
  return OnDisk(
    path,
    lambda s: files.ShapeNetPart(path, s),
    About(16, files.ShapeNetPart.class_parts),
  )


class Divided(ShapeSource):
  """Meshes that are sampled once and divided into splits here."""

  def __init__(
    self, path: str, points: int, fractions: Mapping[str, float] | None
  ):
    """Args:
    path: of the folder.
    points: sampled from each surface, once.
    fractions: share of each split; by default 0.8, 0.1 and 0.1 of "train",
      "validation" and "test".

    Raises:
      ValueError: no point, or shares that are negative or do not add up to 1.
    """
    if points < 1:
      raise ValueError(f"data.source.points={points} must be positive.")
    self._path, self.kept = path, points
    self._fractions = dict(
      fractions or dict(train=0.8, validation=0.1, test=0.1)
    )
    shares = self._fractions.values()
    if min(shares) < 0 or not math.isclose(sum(shares), 1):
      raise ValueError(
        f"data.source.fractions={self._fractions}: shares must not be negative"
        " and add up to 1."
      )

  @abc.abstractmethod
  def _open(self, folder: pathlib.Path, split: str) -> Clouds:
    """The clouds of a known split."""

  def open(self, split: str) -> Clouds:
    lookup(self._fractions, split, "data.source.fractions")
    folder = pathlib.Path(self._path)
    if not folder.is_dir():
      raise ValueError(f"data.source.path={self._path!r} is not a folder.")
    clouds = self._open(folder, split)
    if not len(clouds):
      raise ValueError(
        f"data.source.path={self._path!r}: none of its meshes is in the split"
        f" {split!r}."
      )
    return clouds

  def about(self) -> About:
    return About()


class MeshFolder(Divided):
  """Mesh files (OBJ, OFF, STL, PLY, GLB) in a folder for each class.

  A folder named as a split, at any depth, holds its files; the others are
  divided by a hash of their names.
  """

  def __init__(
    self,
    *,
    path: str,
    points: int = 8192,
    fractions: Mapping[str, float] | None = None,
  ):
    """See `Divided`."""
    super().__init__(path, points, fractions)

  def _open(self, folder: pathlib.Path, split: str) -> Clouds:
    paths = meshes.found_in(folder)
    names = [meshes.class_of(p, folder, self._fractions) for p in paths]
    chosen = [
      (path, name)
      for path, name in zip(paths, names)
      if meshes.split_of(path, folder, self._fractions) == split
    ]
    return meshes.Meshes(
      [path for path, _ in chosen],
      [name for _, name in chosen],
      sorted(set(names)),
      self.kept,
    )


class FurnitureFolder(Divided):
  """Libraries of Sweet Home 3D; see `bertjax.data.shapes.furniture`."""

  def __init__(
    self,
    *,
    path: str,
    points: int = 8192,
    fractions: Mapping[str, float] | None = None,
    categories: Sequence[str] | None = None,
  ):
    """See `Divided`; the folder holds *.sh3f files.

    Args:
      path: see `Divided`.
      points: see `Divided`.
      fractions: see `Divided`.
      categories: of the catalogues, those that are kept; None: all of them.
    """
    super().__init__(path, points, fractions)
    self._categories = categories

  def _open(self, folder: pathlib.Path, split: str) -> Clouds:
    libraries = sorted(folder.glob("*.sh3f"))
    if not libraries:
      raise ValueError(
        f"data.source.path={self._path!r} holds no library (*.sh3f)."
      )
    models = [m for library in libraries for m in furniture.catalogue(library)]
    if self._categories is not None:
      known = dict.fromkeys(sorted({m.category for m in models}))
      for name in self._categories:
        lookup(known, name, "data.source.categories")
      models = [m for m in models if m.category in self._categories]
    return furniture.Furniture(
      [
        m
        for m in models
        if meshes.split_by_hash(m.member, self._fractions) == split
      ],
      sorted({m.category for m in models}),
      self.kept,
    )


SHAPE_SOURCES: dict[str, Callable[..., ShapeSource]] = {
  "furniture": FurnitureFolder,
  "meshes": MeshFolder,
  "modelnet40": modelnet40,
  "modelnet40_cache": modelnet40_cache,
  "modelnet40_few_shot": modelnet40_few_shot,
  "modelnet40_hdf5": modelnet40_hdf5,
  "procedural": Procedural,
  "scanobjectnn": scanobjectnn,
  "shapenet55": shapenet55,
  "shapenetpart": shapenetpart,
}
