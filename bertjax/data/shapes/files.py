"""Readers of the published collections of point clouds, as they lie on disk.

Each is a sequence of `Cloud`s, read when asked for: points as they are stored,
neither sampled nor scaled. Point-BERT (Yu et al. 2022) uses all of them, and
ScanObjectNN (`hdf5`).
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bertjax.data.sources.base import fingerprint_of
from bertjax.registry import lookup

# What readers of arrays and pickles raise at something else, or at half of it.
_BROKEN = (ValueError, TypeError, EOFError, IndexError, pickle.UnpicklingError)


@dataclasses.dataclass(frozen=True)
class Cloud:
  """A stored point cloud.

  Attributes:
    points: [n, 3] float32.
    label: number of its class; -1 without one.
    normals: [n, 3] float32, if they are stored.
    parts: [n] int32, the part of each point, if it is stored.
  """

  points: np.ndarray
  label: int = -1
  normals: np.ndarray | None = None
  parts: np.ndarray | None = None


class Clouds(Sequence[Cloud]):
  """A split of a collection.

  Attributes:
    classes: their names, by number.
    class_parts: of each class, the numbers of its parts; () without parts.
  """

  classes: tuple[str, ...] = ()
  class_parts: tuple[tuple[int, ...], ...] = ()

  def __init__(self, paths: Sequence[pathlib.Path], labels: Sequence[int]):
    """Args:
    paths: a file for each cloud.
    labels: its class.
    """
    self._paths, self._labels = list(paths), list(labels)

  def __len__(self) -> int:
    return len(self._paths)

  @property
  def labels(self) -> np.ndarray:
    """The class of each cloud, int32, without reading one."""
    return np.asarray(self._labels, np.int32)

  def fingerprint(self) -> str:
    """Changes whenever a cloud could: by names, sizes and times of files.

    A collection that is moved as a whole, with its times, stays the same.
    """
    files = []
    for path in dict.fromkeys(self._paths):
      stat = path.stat()
      files.append([path.name, stat.st_size, int(stat.st_mtime)])
    return fingerprint_of(type(self).__name__, files, self.labels.tolist())


class ShapeNet55(Clouds):
  """`shapenet_pc/SYNSET-MODEL.npy` [8192, 3], named in train.txt and test.txt.

  The list of a split may stand in `ShapeNet-55/` or in the folder itself.
  """

  def __init__(self, folder: str | pathlib.Path, split: str = "train"):
    """Args:
    folder: of the collection.
    split: "train", "test", or "all", which Point-BERT trains on.

    Raises:
      ValueError: an unknown split, or a name that is no SYNSET-MODEL.npy.
      FileNotFoundError: a list is missing.
    """
    folder = pathlib.Path(folder)
    splits = {"train": ["train"], "test": ["test"], "all": ["train", "test"]}
    names = [
      name
      for part in lookup(splits, split, "split")
      for name in lines_of(folder, f"{part}.txt", ("ShapeNet-55", "."))
    ]
    for name in names:
      if "-" not in name or not name.endswith(".npy"):
        raise ValueError(f"{folder}: {name!r} is no SYNSET-MODEL.npy.")
    synsets = [name.partition("-")[0] for name in names]
    every = _every_line(folder, splits["all"], "{}.txt", ("ShapeNet-55", "."))
    self.classes = tuple(sorted({name.partition("-")[0] for name in every}))
    numbers = {name: i for i, name in enumerate(self.classes)}
    clouds = folder / "shapenet_pc"
    home = clouds if clouds.is_dir() else folder
    super().__init__([home / n for n in names], [numbers[s] for s in synsets])

  def __getitem__(self, index: int) -> Cloud:
    points = _read(self._paths[index], np.load, 3)
    return Cloud(points, self._labels[index])


class ModelNet40(Clouds):
  """`CLASS/CLASS_0001.txt` of x,y,z,nx,ny,nz a line, with lists of names.

  Lists are `modelnet40_train.txt` and `modelnet40_test.txt`, classes stand in
  `modelnet40_shape_names.txt`, where there is one (any number of classes).
  """

  def __init__(self, folder: str | pathlib.Path, split: str = "train"):
    """Args:
    folder: of the collection.
    split: "train" or "test".

    Raises:
      ValueError: an unknown split, or a name without a class.
      FileNotFoundError: a list is missing.
    """
    folder = pathlib.Path(folder)
    part = lookup({"train": "train", "test": "test"}, split, "split")
    names = lines_of(folder, f"modelnet40_{part}.txt")
    kinds = [name.rpartition("_")[0] for name in names]
    listed = folder / "modelnet40_shape_names.txt"
    if listed.exists():
      every = listed.read_text().split()
    else:
      both = _every_line(folder, ("train", "test"), "modelnet40_{}.txt")
      every = sorted({name.rpartition("_")[0] for name in both})
    self.classes = tuple(every)
    numbers = {name: i for i, name in enumerate(every)}
    for name, kind in zip(names, kinds):
      if kind not in numbers:
        raise ValueError(
          f"{folder}: {name!r} is of none of the {len(every)} classes."
        )
    super().__init__(
      [folder / kind / f"{name}.txt" for name, kind in zip(names, kinds)],
      [numbers[kind] for kind in kinds],
    )

  def __getitem__(self, index: int) -> Cloud:
    path = self._paths[index]
    rows = _read(path, lambda p: np.loadtxt(p, delimiter=",", ndmin=2), 6)
    return Cloud(rows[:, :3], self._labels[index], normals=rows[:, 3:])


class ModelNet40Cache(Clouds):
  """Point-BERT's pickle of ModelNet40: ([[n, 6] ...], [[label] ...])."""

  def __init__(self, path: str | pathlib.Path):
    """Args:
    path: of the file, as modelnet40_train_8192pts_fps.dat.

    Raises:
      ValueError: it holds something else.
    """
    found = _unpickled(path)
    try:
      clouds, labels = found
      labels = [int(np.asarray(label).item()) for label in labels]
    except (TypeError, ValueError) as err:
      raise ValueError(f"{path} is no list of clouds and labels.") from err
    if len(clouds) != len(labels):
      raise ValueError(
        f"{path} has {len(clouds)} clouds but {len(labels)} labels."
      )
    self._rows = [_array(path, rows, 6) for rows in clouds]
    super().__init__([pathlib.Path(path)] * len(clouds), labels)
    self.classes = tuple(map(str, range(max(labels, default=-1) + 1)))

  def __getitem__(self, index: int) -> Cloud:
    rows = self._rows[index]
    return Cloud(rows[:, :3], self._labels[index], normals=rows[:, 3:])


class FewShotPickle(Clouds):
  """Point-BERT's pickle of a few-shot task, `5way10shot/0.pkl` of ModelNet40.

  It holds {"train": [(points, new label, old label) ...], "test": ...}; the
  folder may also be called `5way_10shot`.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    split: str,
    ways: int,
    shots: int,
    fold: int = 0,
  ):
    """Args:
    folder: that holds the folders of tasks.
    split: "train" or "test".
    ways: classes.
    shots: training clouds of each.
    fold: number of the task, from 0.

    Raises:
      ValueError: an unknown split, or a file that holds something else.
      FileNotFoundError: it is missing.
    """
    spellings = (f"{ways}way{shots}shot", f"{ways}way_{shots}shot")
    paths = [pathlib.Path(folder) / s / f"{fold}.pkl" for s in spellings]
    path = next((p for p in paths if p.exists()), None)
    if path is None:
      raise FileNotFoundError(
        f"there is no {fold}.pkl in {' or '.join(spellings)}."
      )
    lookup(dict.fromkeys(("train", "test")), split, "split")
    found = _unpickled(path)
    try:
      rows = [
        (cloud, int(np.asarray(new).item()), int(np.asarray(old).item()))
        for cloud, new, old in found[split]
      ]
    except (KeyError, TypeError, ValueError) as err:
      raise ValueError(
        f"{path} is no few-shot task of (points, new label, old label)."
      ) from err
    names = {new: str(old) for _, new, old in rows}
    if sorted(names) != list(range(ways)):
      raise ValueError(
        f"{path}, {split!r}, has the labels {sorted(names)}; they should be"
        f" 0..{ways - 1}."
      )
    self._rows = [_array(path, cloud, 3) for cloud, _, _ in rows]
    super().__init__([path] * len(rows), [new for _, new, _ in rows])
    self.classes = tuple(names[i] for i in range(ways))

  def __getitem__(self, index: int) -> Cloud:
    return Cloud(self._rows[index], self._labels[index])


class _Arrays(pickle.Unpickler):
  """Reads arrays; a pickle may ask for any function otherwise."""

  def find_class(self, module: str, name: str) -> Any:
    """Of numpy alone.

    Raises:
      ValueError: something else is asked for.
    """
    if module.partition(".")[0] == "numpy" and name in _ARRAY_PARTS:
      return super().find_class(module, name)
    raise ValueError(f"the pickle holds {module}.{name}, not arrays alone.")


_ARRAY_PARTS = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")


def _unpickled(path: str | pathlib.Path) -> Any:
  """What a pickle of arrays holds.

  Raises:
    ValueError: it cannot be read, or holds more than arrays.
  """
  try:
    with open(path, "rb") as file:
      return _Arrays(file).load()
  except _BROKEN as err:
    raise ValueError(f"{path} cannot be read: {err}.") from err


class ShapeNetPart(Clouds):
  """`SYNSET/MODEL.txt` of "x y z nx ny nz part" a line, lists in JSON.

  `synsetoffset2category.txt` names the categories,
  `train_test_split/shuffled_*_file_list.json` the models of a split. Parts are
  numbered category by category.
  """

  classes = (
    "Airplane", "Bag", "Cap", "Car", "Chair", "Earphone", "Guitar", "Knife",
    "Lamp", "Laptop", "Motorbike", "Mug", "Pistol", "Rocket", "Skateboard",
    "Table",
  )  # fmt: skip
  class_parts = tuple(
    tuple(range(first, stop))
    for first, stop in itertools.pairwise(
      (0, 4, 6, 8, 12, 16, 19, 22, 24, 28, 30, 36, 38, 41, 44, 47, 50)
    )
  )

  def __init__(self, folder: str | pathlib.Path, split: str = "trainval"):
    """Args:
    folder: of the collection.
    split: "train", "val", "test", or "trainval", which Point-BERT trains on.

    Raises:
      ValueError: an unknown split, or a model of an unknown category.
      FileNotFoundError: a list is missing.
    """
    folder = pathlib.Path(folder)
    splits = {name: [name] for name in ("train", "val", "test")}
    splits["trainval"] = ["train", "val"]
    listed = "synsetoffset2category.txt"
    pairs = [line.split() for line in lines_of(folder, listed)]
    if not all(len(pair) == 2 for pair in pairs):
      raise ValueError(f"{folder / listed} should hold NAME SYNSET a line.")
    self.classes = tuple(name for name, _ in pairs)
    parts = dict(zip(ShapeNetPart.classes, ShapeNetPart.class_parts))
    self.class_parts = tuple(
      lookup(parts, name, f"{listed}, category") for name in self.classes
    )
    numbers = {synset: i for i, (_, synset) in enumerate(pairs)}
    paths, labels = [], []
    for part in lookup(splits, split, "split"):
      file = folder / "train_test_split" / f"shuffled_{part}_file_list.json"
      for name in json.loads(file.read_text()):
        synset, model = pathlib.PurePosixPath(name).parts[-2:]
        if synset not in numbers:
          raise ValueError(f"{file}: {name!r} is of no known category.")
        paths.append(folder / synset / f"{model}.txt")
        labels.append(numbers[synset])
    super().__init__(paths, labels)

  def __getitem__(self, index: int) -> Cloud:
    path = self._paths[index]
    rows = _read(path, lambda p: np.loadtxt(p, ndmin=2), 7)
    return Cloud(
      rows[:, :3],
      self._labels[index],
      normals=rows[:, 3:6],
      parts=rows[:, 6].astype(np.int32),
    )


def lines_of(
  folder: pathlib.Path, name: str, homes: Sequence[str] = (".",)
) -> list[str]:
  """The lines of a list, without empty ones.

  Args:
    folder: of the collection.
    name: of the list.
    homes: folders in it, the first of which that has the list counts.

  Raises:
    FileNotFoundError: none has it.
  """
  for home in homes:
    path = folder / home / name
    if path.exists():
      return [
        line.strip() for line in path.read_text().splitlines() if line.strip()
      ]
  raise FileNotFoundError(
    f"{folder} has no {name}; looked in {', '.join(homes)}."
  )


def _every_line(
  folder: pathlib.Path,
  splits: Sequence[str],
  name: str,
  homes: Sequence[str] = (".",),
) -> list[str]:
  """Of the lists of all splits that are there, `name` with {} for a split.

  Classes are numbered by them, so that a number means one class in every split.
  """
  found = []
  for split in splits:
    with contextlib.suppress(FileNotFoundError):
      found += lines_of(folder, name.format(split), homes)
  return found


def _read(
  path: pathlib.Path, load: Callable[[pathlib.Path], Any], columns: int
) -> np.ndarray:
  """The rows of a file.

  Raises:
    ValueError: it cannot be read, or see `_array`.
  """
  try:
    rows = np.asarray(load(path), np.float32)
  except _BROKEN as err:
    raise ValueError(f"{path} holds no points: {err}.") from err
  return _array(path, rows, columns)


def _array(path: Any, rows: Any, columns: int) -> np.ndarray:
  """Rows as float32, at least so many columns.

  Raises:
    ValueError: there are fewer, or no row, or a coordinate is not finite.
  """
  rows = np.asarray(rows, np.float32)
  if rows.ndim != 2 or rows.shape[1] < columns or not len(rows):
    raise ValueError(
      f"{path} holds an array of shape {rows.shape}; it should be"
      f" [points, {columns}]."
    )
  check_finite(path, rows[:, :3])
  return rows[:, :columns]


def check_finite(path: Any, points: np.ndarray) -> None:
  """Raises ValueError for coordinates of a file that are no numbers."""
  if not np.isfinite(points).all():
    raise ValueError(f"{path} holds coordinates that are not finite.")
