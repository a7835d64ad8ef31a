"""Reads published weight files as numpy arrays, without torch.

safetensors, whole or in shards, and PyTorch's zip format. A pickle can run any
code, so only what rebuilds a dense tensor is admitted.
"""

import collections
import json
import math
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

Tensors = dict[str, np.ndarray]

# Where training scripts put the state dict among what else they save.
_STATE_DICTS = ("state_dict", "base_model", "model_state_dict")
# What numbers of NumPy are made of, in 1 and 2; a script's metrics often are.
_NUMBERS = (
  ("numpy.core.multiarray", "scalar"),
  ("numpy._core.multiarray", "scalar"),
  ("numpy", "dtype"),
  ("_codecs", "encode"),
)

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}


def _read_safetensors(path: pathlib.Path) -> Tensors:
  try:
    return dict(safetensors.numpy.load_file(path))
  except safetensors.SafetensorError as err:
    raise ValueError(f"{path} is not a whole safetensors file: {err}") from err


class _Number:
  """Stands for a number of NumPy, which is not read: nobody asks for it."""

  def __init__(self, *parts: Any):
    del parts

  def __setstate__(self, state: Any):
    del state


class _TensorUnpickler(pickle.Unpickler):
  """Admits tensors in plain containers, skips numbers, refuses the rest."""

  def __init__(self, file: Any, load: Callable[..., np.ndarray], where: str):
    super().__init__(file)
    self._load, self._where = load, where

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return self._rebuild
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda data, requires_grad, hooks: data
    if module == "torch" and name in _STORAGES:
      return _STORAGES[name]
    if (module, name) in _NUMBERS:
      return _Number
    raise ValueError(
      f"{self._where} wants to run {module}.{name}, which is no tensor; it is"
      " not opened. Save the state dict alone, or as safetensors."
    )

  def persistent_load(self, pid: Any) -> np.ndarray:
    kind, dtype, key, _, count = pid
    if kind != "storage":
      raise ValueError(f"{self._where} refers to {kind!r}, not to a storage.")
    return self._load(str(key), np.dtype(dtype), int(count))

  def _rebuild(self, storage, offset, shape, strides, *_) -> np.ndarray:
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    bad = len(shape) != len(strides) or any(x < 0 for x in (*shape, *strides))
    if bad or offset < 0 or (math.prod(shape) and last >= storage.size):
      raise ValueError(
        f"{self._where} is damaged: a tensor of shape {tuple(shape)} reaches"
        f" beyond its storage of {storage.size} values."
      )
    view = np.lib.stride_tricks.as_strided(
      storage[offset:], shape, [s * storage.itemsize for s in strides]
    )
    return view.copy()


# What zip and pickle make of a file that is cut or altered.
_DAMAGE = (
  zipfile.BadZipFile,
  zlib.error,
  pickle.UnpicklingError,
  AttributeError,
  EOFError,
  IndexError,
  KeyError,
  NotImplementedError,
  TypeError,
  UnicodeDecodeError,
)


def read_torch_file(path: pathlib.Path) -> Tensors:
  """Tensors of a `torch.save`d state dict by name.

  Raises:
    ValueError: the format before PyTorch 1.6, a damaged file, or a pickle that
      holds more than tensors.
  """
  with path.open("rb") as file:
    is_zip = file.read(2) == b"PK"
  if not is_zip:
    raise ValueError(
      f"{path} is not in PyTorch's zip format (PyTorch 1.6 and later); load and"
      " save it again with a newer PyTorch, best as safetensors."
    )
  try:
    with zipfile.ZipFile(path) as archive:
      found = _unpickled(archive, path)
  except _DAMAGE as err:
    raise ValueError(f"{path} is damaged: {err!r}; fetch it again.") from err
  for key in _STATE_DICTS:
    if isinstance(found, Mapping) and key in found:
      found = found[key]
  if not isinstance(found, Mapping) or not all(
    isinstance(v, np.ndarray) for v in found.values()
  ):
    raise ValueError(f"{path} does not hold a state dict of named tensors.")
  return dict(found)


def _unpickled(archive: zipfile.ZipFile, path: pathlib.Path) -> Any:
  """What was saved, tensors as arrays."""
  pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise ValueError(f"{path} is a zip file, but not one of torch.save.")
  root = pickles[0].removesuffix("data.pkl")
  order = f"{root}byteorder"
  if order in archive.namelist() and archive.read(order) != b"little":
    raise ValueError(f"{path} is big-endian; save it as safetensors.")

  storages: Tensors = {}

  def load(key: str, dtype: np.dtype, count: int) -> np.ndarray:
    if key not in storages:
      storages[key] = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
    if storages[key].size != count or storages[key].dtype != dtype:
      raise ValueError(f"{path} is damaged: storage {key} has another size.")
    return storages[key]

  with archive.open(pickles[0]) as file:
    return _TensorUnpickler(file, load, str(path)).load()


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  """Files of tensors by name."""
  try:
    listed = json.loads(index.read_bytes())["weight_map"]
    return {str(name): str(file) for name, file in listed.items()}
  except (AttributeError, KeyError, TypeError, ValueError) as err:
    raise ValueError(
      f'{index} is no JSON of {{"weight_map": {{TENSOR: FILE}}}}: {err!r}.'
    ) from err


def _read_shards(index: pathlib.Path, read: Callable) -> Tensors:
  listed = _weight_map(index)
  tensors: Tensors = {}
  for name in sorted(set(listed.values())):
    if pathlib.PurePath(name).name != name:
      raise ValueError(f"{index} names {name!r}, which is outside the folder.")
    if not (index.parent / name).exists():
      raise ValueError(
        f"{index.parent / name} is missing; {index.name} needs it."
      )
    tensors |= read(index.parent / name)
  if absent := set(listed) - set(tensors):
    raise ValueError(
      f"{index} lists {sorted(absent)[0]}, which its file does not hold."
    )
  return tensors


# In the order of preference when a folder has several.
WEIGHT_FILES: dict[str, Callable[[pathlib.Path], Tensors]] = {
  "model.safetensors": _read_safetensors,
  "model.safetensors.index.json": lambda p: _read_shards(p, _read_safetensors),
  "pytorch_model.bin": read_torch_file,
  "pytorch_model.bin.index.json": lambda p: _read_shards(p, read_torch_file),
}


def read_weights(folder: pathlib.Path) -> Tensors:
  """All tensors of a published folder by name, in their own dtypes.

  Raises:
    ValueError: no weight file, or one that cannot be read.
  """
  for name, read in WEIGHT_FILES.items():
    if (folder / name).exists():
      return read(folder / name)
  raise ValueError(
    f"{folder} holds no weights; it needs one of {', '.join(WEIGHT_FILES)}."
  )


def write_safetensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path):
  """Writes a file that `transformers` takes for one of PyTorch's."""
  path.touch()
  mode = path.stat().st_mode  # save_file lets nobody else read what it writes
  safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
  path.chmod(mode)
