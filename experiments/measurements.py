"""Results of functions, computed once per workdir: kill, repeat, continue."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_ROOT = pathlib.Path(__file__).parents[1]
# All that the compiled step of a config may be made of.
LIBRARY = tuple(_ROOT / name for name in ("bertjax", "configs", "kernels"))
# What makes programs of them, for CPUs, TPUs and GPUs.
_COMPILERS = ("jax", "libtpu", "nvidia-cuda-nvcc")


def _version(package: str) -> str:
  """Of an installed package; "" of another."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def fingerprint(sources: Iterable[str | os.PathLike]) -> str:
  """A hash of Python files, all those of a folder, and of the compilers."""
  versions = [_version(package) for package in _COMPILERS]
  digest = hashlib.sha256(json.dumps(versions).encode())
  for source in map(pathlib.Path, sources):
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    for path in files:
      digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


class Measurements:
  """Remembers what functions returned, by name, arguments and version."""

  def __init__(self, workdir: str | os.PathLike, version: str = ""):
    """Args:
    workdir: created if needed.
    version: of what is measured; another one is measured anew.
    """
    self.workdir = pathlib.Path(workdir)
    self.version = version

  def get(
    self, function: Callable[..., Mapping[str, Any]], **arguments: Any
  ) -> dict[str, Any]:
    """What `function(**arguments)` returns, and the `seconds` it took.

    Args:
      function: of a module; returns names and values that JSON can hold.
      **arguments: that JSON can hold.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    known = json.dumps([name, self.version, arguments], sort_keys=True)
    key = hashlib.sha256(known.encode()).hexdigest()[:20]
    record = self.workdir / f"{key}.json"
    if not record.exists():
      start = time.monotonic()
      found = dict(function(**arguments))
      found["seconds"] = time.monotonic() - start
      self.workdir.mkdir(parents=True, exist_ok=True)
      partial = record.with_suffix(".partial")
      partial.write_text(json.dumps({"of": known, "found": found}, indent=2))
      partial.replace(record)
    return json.loads(record.read_text(encoding="utf-8"))["found"]
