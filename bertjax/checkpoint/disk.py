"""One checkpoint on disk: is it whole, is it finished, how does it go away.

The manifest holds the size and the CRC-32 of every other file and is written
last. Orbax and TensorStore do not notice every flipped or missing byte.
"""

import json
import math
import os
import zlib
from collections.abc import Sequence
from typing import Any

from absl import logging
from etils import epath

FORMAT = 1
MARKER = "UNFINISHED"
MANIFEST = "manifest.json"
_PARTIAL = f"{MANIFEST}.partial"
META = "meta.json"
STATE = "state"


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or none of them could be read."""


class DamagedError(CheckpointError):
  """One checkpoint directory does not hold what its manifest promises."""


def absolute(path: epath.PathLike) -> epath.Path:
  """Orbax refuses relative paths; a URL stays as it is."""
  url = "://" in os.fspath(path)
  return epath.Path(path) if url else epath.Path(path).absolute()


def verify(path: epath.PathLike) -> None:
  """Compares every file of one checkpoint with its manifest.

  Raises:
    DamagedError: naming the first file that differs.
  """
  path = epath.Path(path)
  manifest = read_json(path / MANIFEST)
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    raise DamagedError(f"{MANIFEST} is not a manifest of format {FORMAT}")
  files = manifest.get("files")
  if not isinstance(files, dict) or META not in files:
    raise DamagedError(f"{MANIFEST} lists no files")
  for name, expected in sorted(files.items()):
    try:
      found = _checksum(path / name)
    except FileNotFoundError as err:
      raise DamagedError(f"{name} is missing") from err
    except OSError as err:
      raise DamagedError(f"{name} cannot be read ({err})") from err
    if found != expected:
      raise DamagedError(
        f"{name} has changed: {found} instead of {expected} (bytes, CRC-32)"
      )


def first_intact(
  folder: epath.Path, candidates: Sequence[int]
) -> tuple[int | None, list[tuple[int, str]]]:
  """The first intact step, and those before it with what is wrong."""
  skipped = []
  for step in candidates:
    try:
      verify(folder / str(step))
    except DamagedError as err:
      skipped.append((step, str(err)))
    else:
      return step, skipped
  return None, skipped


def report(
  folder: epath.Path, chosen: int | None, skipped: list[tuple[int, str]]
) -> None:
  """Says what is damaged; raises when nothing is left."""
  if chosen is None:
    raise CheckpointError(
      f"No checkpoint in {folder} can be read: "
      + "; ".join(f"step {step}: {reason}" for step, reason in skipped)
      + ". Nothing was changed. Restore the folder from a copy, or start"
      " again in an empty workdir."
    )
  for step, reason in skipped:
    logging.warning(
      "The checkpoint of step %d in %s is damaged (%s); falling back to"
      " step %d.",
      step,
      folder,
      reason,
      chosen,
    )


def step_folders(folder: epath.Path) -> list[epath.Path]:
  if not folder.exists():
    return []
  return [path for path in folder.iterdir() if path.name.isdecimal()]


def committed_steps(folder: epath.Path) -> tuple[int, ...]:
  return tuple(
    sorted(int(p.name) for p in step_folders(folder) if not is_unfinished(p))
  )


def best_step(
  folder: epath.Path, metric: str | None, sign: float
) -> int | None:
  """The step whose saved metric is best; the later one of equals."""
  if metric is None:
    return None
  scores = {}
  for step in committed_steps(folder):
    try:
      metrics = read_json(folder / str(step) / META)["metrics"]
    except DamagedError:
      continue
    value = metrics.get(metric, math.nan)
    if not math.isnan(value):
      scores[step] = sign * value
  return max(scores, key=lambda s: (scores[s], s)) if scores else None


def manifest_of(path: epath.Path) -> dict[str, Any]:
  files = {
    name: _checksum(path / name)
    for name in _files(path)
    if name not in (MARKER, MANIFEST, _PARTIAL)
  }
  return {"format": FORMAT, "files": files}


def commit(path: epath.Path) -> None:
  """Makes a directory count by its manifest, which is whole or not there."""
  partial = path / _PARTIAL
  partial.write_text(json.dumps(manifest_of(path)))
  partial.replace(path / MANIFEST)


def _files(path: epath.Path, prefix: str = "") -> list[str]:
  names = []
  for child in sorted(path.iterdir()):
    if child.is_dir():
      names += _files(child, f"{prefix}{child.name}/")
    else:
      names.append(prefix + child.name)
  return names


def _checksum(path: epath.Path) -> list[int]:
  """Size in bytes and CRC-32; a list, as JSON gives it back."""
  size = crc = 0
  with path.open("rb") as f:
    while block := f.read(1 << 22):
      size += len(block)
      crc = zlib.crc32(block, crc)
  return [size, crc]


def read_json(path: epath.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as err:
    raise DamagedError(f"{path.name} is missing") from err
  except OSError as err:
    raise DamagedError(f"{path.name} cannot be read ({err})") from err
  except ValueError as err:  # not UTF-8, or not JSON
    raise DamagedError(f"{path.name} is not JSON") from err


def is_unfinished(path: epath.Path) -> bool:
  """Whether a kill interrupted the writing or removing of this directory."""
  if not path.is_dir() or (path / MANIFEST).exists():
    return False
  try:
    return (path / MARKER).exists() or not any(path.iterdir())
  except FileNotFoundError:  # it is removed right now
    return True


def remove(path: epath.Path) -> None:
  """Removes a checkpoint so that a kill on the way leaves it unfinished."""
  if not path.is_dir():
    path.unlink()
    return
  (path / MARKER).write_text("being removed\n")
  (path / MANIFEST).unlink(missing_ok=True)
  for child in path.iterdir():
    if child.is_dir():
      child.rmtree()
    elif child.name != MARKER:
      child.unlink()
  path.rmtree()
