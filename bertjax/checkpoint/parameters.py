"""The parameters in a checkpoint, for who has neither its model nor a mesh."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from bertjax.checkpoint import disk

# Links that a run of several leaves: to its best one, and to its last stage.
BEST, LAST = "best", "last"
_EXTRA = "extra"  # the field of `TrainState` with all other collections


def load_params(
  path: epath.PathLike, step: int | None = None
) -> tuple[Any, dict[str, Any]]:
  """Parameters and the config they had; see `load_variables`."""
  variables, config = load_variables(path, step)
  return variables["params"], config


def load_variables(
  path: epath.PathLike, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """All of a model's variables, and the config that it had.

  Needs neither a mesh nor a model, and reads no optimizer state. Of a run that
  removes checkpoints while they are read, those that it has then are read.

  Args:
    path: a workdir, its `checkpoints` folder, or one checkpoint in it. Of a
      grid the best run counts, of stages the last that came to its end.
    step: which checkpoint; by default the best by the run's own
      `keep.best_metric`, or else the newest intact one.

  Returns:
    By collection, "params" among them, nested dicts of numpy arrays; and the
    config.

  Raises:
    FileNotFoundError: there is no checkpoint.
    CheckpointError: all of them, or the best, are damaged.
  """
  path = disk.absolute(path)
  if (path / disk.MANIFEST).exists() and path.name.isdecimal():
    path, step = path.parent, int(path.name)
  workdir = located(path.parent if path.name == "checkpoints" else path)
  folder = workdir / "checkpoints"
  while True:
    steps = disk.committed_steps(folder)
    wanted = selected_step(workdir) if step is None else step
    try:
      return _read(folder, steps, wanted)
    # Orbax has several errors for files that vanish; none of them is hidden.
    except Exception:
      if disk.committed_steps(folder) == steps:
        raise
    logging.warning("%s changed while it was read; reading it again.", folder)


def _read(
  folder: epath.Path, steps: Sequence[int], step: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Variables and config of one of these steps; raises as `load_variables`."""
  candidates = [s for s in steps[::-1] if step in (None, s)]
  if not candidates:
    which = "" if step is None else f" of step {step}"
    raise FileNotFoundError(f"There is no checkpoint{which} in {folder}.")
  chosen, skipped = disk.first_intact(folder, candidates)
  if gone := {s for s, _ in skipped} - {*disk.committed_steps(folder)}:
    raise disk.CheckpointError(f"Removed from {folder}: {sorted(gone)}.")
  disk.report(folder, chosen, skipped)
  meta = disk.read_json(folder / str(chosen) / disk.META)
  item: dict[str, Any] = {}
  for name, shape, dtype in meta["arrays"]:
    if name.startswith(("params/", f"{_EXTRA}/")):
      *parents, leaf = name.split("/")
      node = item
      for parent in parents:
        node = node.setdefault(parent, {})
      node[leaf] = jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype))
  as_numpy = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
    tree = orbax.restore(
      folder / str(chosen) / disk.STATE,
      args=ocp.args.PyTreeRestore(
        item=item, restore_args=as_numpy, partial_restore=True
      ),
    )
  return {"params": tree["params"], **tree.get(_EXTRA, {})}, meta["config"]


def link(path: pathlib.Path, folder: str) -> None:
  """Makes `path` a link to a folder beside it, whole at any moment."""
  partial = path.with_name(f"{path.name}.partial")
  partial.unlink(missing_ok=True)
  partial.symlink_to(folder, target_is_directory=True)
  partial.replace(path)


def located(workdir: epath.PathLike) -> epath.Path:
  """Where the checkpoints of a run are: its best run's, its last stage's."""
  workdir = epath.Path(workdir)
  if not (workdir / "checkpoints").exists():
    for name in (BEST, LAST):
      # A published folder may have one of this name, too.
      if (workdir / name).exists():
        found = located(workdir / name)
        if (found / "checkpoints").exists():
          return found
  return workdir


def parts_with(workdir: epath.PathLike, name: str) -> set[str]:
  """Sub-folders that hold a file of a run: stages, and runs of a grid."""
  workdir = epath.Path(workdir)
  return {
    str(path.parent.relative_to(workdir))
    for level in ("*", "*/*")  # stages; and those of a grid's runs
    for path in workdir.glob(f"{level}/{name}")
  }


def selected_step(workdir: epath.PathLike) -> int | None:
  """The best step by `keep.best_metric` in the newest readable checkpoint.

  None if that run did not select, or has no checkpoint.
  """
  folder = located(disk.absolute(workdir)) / "checkpoints"
  for step in disk.committed_steps(folder)[::-1]:
    try:
      meta = disk.read_json(folder / str(step) / disk.META)
    except disk.DamagedError:
      continue
    keep = meta["config"].get("keep", {})
    sign = -1.0 if keep.get("best_mode") == "min" else 1.0
    return disk.best_step(folder, keep.get("best_metric"), sign)
  return None
