"""Readers of collections of point clouds that are published as HDF5 files.

Both need h5py: `pip install 'bertjax[points]'`.
"""

import pathlib

import numpy as np

from bertjax.data.shapes.files import Cloud, Clouds, check_finite, lines_of
from bertjax.registry import lookup

# Folder and ending of the files of ScanObjectNN's three variants.
SCAN_VARIANTS = {
  "objectonly": ("main_split_nobg", "objectdataset.h5"),
  "background": ("main_split", "objectdataset.h5"),
  "hardest": ("main_split", "objectdataset_augmentedrot_scale75.h5"),
}


class ClassedArrays(Clouds):
  """Clouds of files with `data` [n, points, 3] and `label` [n] or [n, 1]."""

  def __init__(self, paths: list[pathlib.Path], classes: tuple[str, ...]):
    """Args:
    paths: of the files, in order; all are read at once.
    classes: their names, by label.

    Raises:
      ValueError: a file that cannot be read, arrays of other shapes, points
        that are not finite, or a label of no class.
      FileNotFoundError: a file is missing.
    """
    parts = [_arrays(path) for path in paths]
    labels = np.concatenate([labels for _, labels in parts])
    outside = (labels < 0) | (labels >= len(classes))
    if outside.any():
      raise ValueError(
        f"{', '.join(map(str, paths))}: label {labels[outside][0]} is of none"
        f" of the {len(classes)} classes."
      )
    self._data = [row for data, _ in parts for row in data]
    files = [path for path, (data, _) in zip(paths, parts) for _ in data]
    super().__init__(files, labels.tolist())
    self.classes = classes

  def __getitem__(self, index: int) -> Cloud:
    return Cloud(self._data[index], self._labels[index])


class ScanObjectNN(ClassedArrays):
  """`main_split/training_objectdataset.h5` and the like, of 15 classes."""

  classes = (
    "bag",
    "bin",
    "box",
    "cabinet",
    "chair",
    "desk",
    "display",
    "door",
    "shelf",
    "table",
    "bed",
    "pillow",
    "sink",
    "sofa",
    "toilet",
  )

  def __init__(
    self,
    folder: str | pathlib.Path,
    split: str = "train",
    variant: str = "hardest",
  ):
    """Args:
    folder: that holds main_split and main_split_nobg.
    split: "train" or "test".
    variant: "objectonly" (OBJ_ONLY), "background" (OBJ_BG) or "hardest"
      (PB_T50_RS).

    Raises:
      ValueError: an unknown split or variant; see `ClassedArrays`.
      FileNotFoundError: the file is missing.
    """
    home, ending = lookup(SCAN_VARIANTS, variant, "variant")
    start = lookup({"train": "training", "test": "test"}, split, "split")
    path = pathlib.Path(folder) / home / f"{start}_{ending}"
    super().__init__([path], self.classes)


class ModelNet40HDF5(ClassedArrays):
  """`modelnet40_ply_hdf5_2048`: 2048 points each, in several files a split.

  `train_files.txt` and `test_files.txt` name them, of which only the last part
  counts; classes stand in `shape_names.txt`.
  """

  def __init__(self, folder: str | pathlib.Path, split: str = "train"):
    """Args:
    folder: of the collection.
    split: "train" or "test".

    Raises:
      ValueError: an unknown split; see `ClassedArrays`.
      FileNotFoundError: a list, or a file that it names, is missing.
    """
    folder = pathlib.Path(folder)
    part = lookup({"train": "train", "test": "test"}, split, "split")
    names = lines_of(folder, f"{part}_files.txt")
    if not names:
      raise ValueError(f"{folder / f'{part}_files.txt'} names no file.")
    super().__init__(
      [folder / pathlib.PurePosixPath(name).name for name in names],
      tuple(lines_of(folder, "shape_names.txt")),
    )


def _arrays(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Clouds, float32 [n, points, 3], and their labels, int [n]."""
  try:
    import h5py
  except ImportError as err:
    raise ValueError(
      f"{path} needs h5py: pip install 'bertjax[points]'."
    ) from err
  if not path.exists():
    raise FileNotFoundError(f"{path} is not there.")
  try:
    with h5py.File(path) as file:
      data, labels = file["data"][()], file["label"][()].reshape(-1)
  except KeyError as err:
    raise ValueError(f"{path} has no 'data' or no 'label'.") from err
  except OSError as err:  # not HDF5, or cut off
    raise ValueError(f"{path} cannot be read: {err}.") from err
  shaped = data.ndim == 3 and data.shape[1] > 0 and data.shape[2] == 3
  if not shaped or len(data) != len(labels):
    raise ValueError(
      f"{path}: data {data.shape} and label {labels.shape} should be"
      " [n, points, 3] and [n]."
    )
  check_finite(path, data)
  return data.astype(np.float32), labels.astype(np.int64)
