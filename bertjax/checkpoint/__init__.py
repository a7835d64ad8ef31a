"""Checkpoints: the whole state of a run, written so that a kill cannot hurt.

Orbax writes the arrays; this package adds what a run needs around them.
One checkpoint is one directory:

  WORKDIR/checkpoints/<step>/
    UNFINISHED     there while the directory is written or removed
    state/         the arrays (Orbax)
    meta.json      step, names and shapes of the arrays, iterator state, config
    manifest.json  size and CRC-32 of every file; written last: the commit

A directory counts once its manifest is there, so no rename is needed and an
object store works as well as a disk. Orbax does not notice every flipped or
missing byte; the manifest does, and `restore` then falls back to the previous
checkpoint, says so, and leaves the damaged one where it is.
"""

from bertjax.checkpoint.checkpointer import Checkpointer, Restored
from bertjax.checkpoint.disk import CheckpointError, DamagedError, verify
from bertjax.checkpoint.parameters import (
  BEST,
  LAST,
  link,
  load_params,
  load_variables,
  located,
  parts_with,
  selected_step,
)

__all__ = [
  "BEST",
  "LAST",
  "CheckpointError",
  "Checkpointer",
  "DamagedError",
  "Restored",
  "link",
  "load_params",
  "load_variables",
  "located",
  "parts_with",
  "selected_step",
  "verify",
]
