"""A tokenizer's folder: its files and a manifest that says what they are."""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


def sha256(content: bytes) -> str:
  """Hex digest of `content`."""
  return hashlib.sha256(content).hexdigest()


def as_json(value: Any) -> bytes:
  """One fixed JSON text for one value, so that equal content hashes equal."""
  text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
  return (text + "\n").encode()


def write(
  folder: str | os.PathLike,
  files: Mapping[str, bytes],
  manifest: Mapping[str, Any],
) -> None:
  """Writes files and manifest; all of them or nothing.

  Args:
    folder: a new or empty folder, or one that this wrote, which is replaced.
    files: contents by name.
    manifest: facts about them, JSON values.

  Raises:
    ValueError: the folder holds something else.
  """
  folder = pathlib.Path(folder)
  present = {p.name for p in folder.iterdir()} if folder.exists() else set()
  if present and MANIFEST not in present:
    raise ValueError(
      f"{folder} holds other files ({sorted(present)[0]}, ...); save the"
      " tokenizer into a folder of its own."
    )
  folder.parent.mkdir(parents=True, exist_ok=True)
  described = as_json({**manifest, "format": FORMAT})
  with tempfile.TemporaryDirectory(
    dir=folder.parent, prefix=f".{folder.name}-"
  ) as scratch:
    new = pathlib.Path(scratch) / "new"
    new.mkdir()
    for name, content in {**files, MANIFEST: described}.items():
      with open(new / name, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if folder.exists():
      os.rename(folder, pathlib.Path(scratch) / "old")
    os.rename(new, folder)
