"""Writes what `torch.load` reads, without torch.

A zip archive of a pickle that names tensors and of their bytes, as PyTorch 1.6
and later write it. `tensors.read_torch_file` is the reader.
"""

import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

_STORAGES = {"float32": "FloatStorage", "int64": "LongStorage"}


def write_torch_file(
  tensors: Mapping[str, np.ndarray], path: pathlib.Path, key: str
) -> None:
  """Writes `{key: {name: tensor}}`.

  Args:
    tensors: float32 or int64 arrays by name.
    path: of the file.
    key: under which a training script looks for its state dict.

  Raises:
    ValueError: another dtype.
  """
  arrays = {k: np.asarray(x, order="C") for k, x in tensors.items()}
  for name, x in arrays.items():
    if x.dtype.name not in _STORAGES:
      raise ValueError(
        f"{name} is {x.dtype}; {', '.join(_STORAGES)} can be written."
      )
  root = path.stem
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr(f"{root}/data.pkl", _pickled(arrays, key))
    archive.writestr(f"{root}/byteorder", "little")
    for number, x in enumerate(arrays.values()):
      data = x.astype(x.dtype.newbyteorder("<")).tobytes()
      archive.writestr(f"{root}/data/{number}", data)
    archive.writestr(f"{root}/version", "3\n")


def _pickled(arrays: Mapping[str, np.ndarray], key: str) -> bytes:
  """The pickle of a dict in a dict, which refers to storages by number."""
  entries = [
    _text(name) + _tensor(number, x) + pickle.SETITEM
    for number, (name, x) in enumerate(arrays.items())
  ]
  inner = pickle.EMPTY_DICT + b"".join(entries)
  whole = pickle.EMPTY_DICT + _text(key) + inner + pickle.SETITEM
  return pickle.PROTO + b"\x02" + whole + pickle.STOP


def _tensor(number: int, x: np.ndarray) -> bytes:
  """A call of torch._utils._rebuild_tensor_v2."""
  storage = _tuple(
    _text("storage"),
    _global("torch", _STORAGES[x.dtype.name]),
    _text(str(number)),
    _text("cpu"),
    _int(x.size),
  )
  hooks = _global("collections", "OrderedDict") + _tuple() + pickle.REDUCE
  strides = [stride // x.itemsize for stride in x.strides]
  arguments = _tuple(
    storage + pickle.BINPERSID,
    _int(0),  # where in its storage it begins
    _tuple(*map(_int, x.shape)),
    _tuple(*map(_int, strides)),
    pickle.NEWFALSE,  # requires no gradient
    hooks,
  )
  return (
    _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE
  )


def _text(value: str) -> bytes:
  data = value.encode("utf-8")
  return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
  return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _global(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def _tuple(*items: bytes) -> bytes:
  return pickle.MARK + b"".join(items) + pickle.TUPLE
