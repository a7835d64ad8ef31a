"""Saving and restoring the state of a run, by Orbax."""

import dataclasses
import errno
import json
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from bertjax.checkpoint import contents, disk

# (saved shapes by path name, wanted abstract state) -> the abstract state to
# read, and a function that makes the wanted state of it.
Adapt = Callable[
  [Mapping[str, tuple[int, ...]], Any], tuple[Any, Callable[[Any], Any]]
]

# Bytes of an array from which on its replicas write it together.
_WORTH_DIVIDING = 2**24


@dataclasses.dataclass(frozen=True)
class Restored:
  """What `Checkpointer.restore` found.

  Attributes:
    step: optimizer step the state belongs to.
    state: the tree, placed as the abstract state asked.
    iterator_state: position of the data iterator, as given to `save`.
    config: the resolved config of the run that saved.
    skipped: newer checkpoints that were passed over, as (step, reason).
  """

  step: int
  state: Any
  iterator_state: dict[str, Any]
  config: dict[str, Any]
  skipped: tuple[tuple[int, str], ...] = ()


class Checkpointer:
  """Saves and restores the state of one run under `workdir/checkpoints`.

  One process group writes into a workdir at a time; any number may read with
  `load_variables` meanwhile.

  Attributes:
    folder: where the checkpoints are.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    keep: int = 2,
    keep_every: int | None = None,
    best_metric: str | None = None,
    best_mode: str = "max",
    save_async: bool = True,
  ):
    """Prepares, without touching the disk.

    Args:
      workdir: the run's folder, a path or an object store URL.
      keep: how many of the newest checkpoints stay; at least 1. With 1 there
        is nothing to fall back to when the newest is damaged.
      keep_every: checkpoints at multiples of this many steps stay for good.
      best_metric: the checkpoint whose `metrics[best_metric]` is best stays,
        and is what a reader of the workdir gets by default.
      best_mode: "max" or "min".
      save_async: whether `save` returns once the state is in host memory.

    Raises:
      ValueError: an argument out of range.
    """
    if keep < 1:
      raise ValueError(f"keep={keep} must be at least 1.")
    if keep_every is not None and keep_every < 1:
      raise ValueError(f"keep_every={keep_every} must be at least 1, or None.")
    if best_mode not in ("max", "min"):
      raise ValueError(f"best_mode={best_mode!r} must be 'max' or 'min'.")
    self.folder = disk.absolute(workdir) / "checkpoints"
    self._keep = keep
    self._keep_every = keep_every
    self._best_metric = best_metric
    self._best_sign = 1.0 if best_mode == "max" else -1.0
    self._save_async = save_async
    self._damaged: set[int] = set()
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._last_saved: int | None = None
    self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

  # -- writing ---------------------------------------------------------------

  def save(
    self,
    step: int,
    state: Any,
    *,
    iterator_state: Mapping[str, Any],
    config: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Saves `state`; returns False when this step is saved and intact already.

    The state is copied to the host inside the call, so its buffers may be
    donated right after; files are written in the background. A damaged
    directory of the same step is renamed to `<step>.damaged`, never deleted.

    Args:
      step: optimizer step of `state`.
      state: pytree of arrays.
      iterator_state: what the data iterator needs to continue; JSON values.
      config: resolved config of the run; JSON values.
      metrics: evaluation values at this step, for `best_metric`.

    Raises:
      CheckpointError: this save, or the previous one in the background,
        failed (most often: the disk is full). Earlier checkpoints are intact
        and the object stays usable.
      ValueError: `iterator_state` or `config` is not JSON.
    """
    self.wait()
    step = int(step)
    meta = json.dumps(
      {
        "format": disk.FORMAT,
        "step": step,
        "arrays": contents.describe(state),
        "metrics": contents.jsonable(metrics or {}, "metrics"),
        "iterator_state": contents.jsonable(iterator_state, "iterator_state"),
        "config": contents.jsonable(config, "config"),
      }
    )
    target = self.folder / str(step)
    if step not in self._damaged and self._intact(step):
      return False
    # Every process must have looked before the first one changes anything.
    _barrier(f"bertjax_save_{step}")
    needed = sum(contents.nbytes(x) for x in jax.tree.leaves(state))
    if jax.process_index() == 0:
      try:
        self._make_room(step, needed)
        target.mkdir(parents=True, exist_ok=True)
        (target / disk.MARKER).write_text("being written\n")
      except OSError as err:
        raise self._failure(step, needed, err) from err
    try:
      self._orbax.save(
        target / disk.STATE,
        args=ocp.args.StandardSave(jax.tree.map(_one_replica, state)),
      )
    except Exception as err:
      self._discard(target)
      raise self._failure(step, needed, err) from err
    self._thread = threading.Thread(
      target=self._finish,
      args=(step, meta, needed),
      name=f"checkpoint_{step}",
    )
    self._thread.start()
    if not self._save_async:
      self.wait()
    return True

  def check(self) -> None:
    """Raises the error of a failed background save, without waiting."""
    if self._thread is not None and not self._thread.is_alive():
      self.wait()

  def wait(self) -> None:
    """Blocks until the save under way is committed.

    Raises:
      CheckpointError: it failed.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  def close(self) -> None:
    """Waits for the save under way and releases Orbax."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _finish(self, step: int, meta: str, needed: int) -> None:
    """Background half of `save`: commit, then remove what is not kept."""
    target = self.folder / str(step)
    try:
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        (target / disk.META).write_text(meta)
        disk.commit(target)
        (target / disk.MARKER).unlink(missing_ok=True)
    # Whatever went wrong in this thread is raised by `wait` in the main one.
    except BaseException as err:
      self._discard(target)
      self._error = self._failure(step, needed, err)
      self._error.__cause__ = err
      return
    self._damaged.discard(step)
    self._last_saved = step
    logging.info("Saved the checkpoint of step %d in %s", step, target)
    try:
      if jax.process_index() == 0:
        self._prune(step)
    except OSError as err:
      logging.warning("Could not remove an old checkpoint: %s", err)

  def _make_room(self, step: int, needed: int) -> None:
    """Clears a spoilt directory of `step`; refuses what cannot fit."""
    target = self.folder / str(step)
    if target.exists():
      if not disk.is_unfinished(target):
        aside = self.folder / f"{step}.damaged"
        count = 1
        while aside.exists():
          count += 1
          aside = self.folder / f"{step}.damaged{count}"
        target.rename(aside)
        logging.warning("Moved the damaged %s to %s", target, aside)
      else:
        disk.remove(target)
    free = self._free()
    if free is not None and free < needed:
      raise OSError(errno.ENOSPC, "No space left on device")

  def _prune(self, newest: int) -> None:
    for path in disk.step_folders(self.folder):
      if int(path.name) != newest and disk.is_unfinished(path):
        disk.remove(path)
    steps = [s for s in self.steps() if s not in self._damaged]
    kept = set(steps[-self._keep :]) | {newest}
    if self._keep_every:
      kept |= {s for s in steps if s % self._keep_every == 0}
    best = self._best_step()
    if best is not None:
      kept.add(best)
    for step in steps:
      if step not in kept:
        disk.remove(self.folder / str(step))

  def _discard(self, target: epath.Path) -> None:
    """Frees the space of a failed save; its error matters more than ours."""
    if jax.process_index() == 0 and target.exists():
      try:
        disk.remove(target)
      except OSError as err:
        logging.warning("Could not remove the unfinished %s: %s", target, err)

  def _failure(
    self, step: int, needed: int, err: BaseException
  ) -> disk.CheckpointError:
    free = self._free()
    space = "" if free is None else f", {free:,} bytes are free there"
    steps = [s for s in self.steps() if s not in self._damaged]
    previous = (
      f"the checkpoint of step {steps[-1]} is intact"
      if steps
      else "there is no earlier checkpoint"
    )
    first_line = (str(err) or type(err).__name__).splitlines()[0][:200]
    return disk.CheckpointError(
      f"The checkpoint of step {step} could not be written to {self.folder}:"
      f" it needs up to {needed:,} bytes{space}; {previous}. Free some space"
      f" or use another workdir, then run the same command again."
      f" ({first_line})"
    )

  def _free(self) -> int | None:
    """Free bytes of the disk under the workdir; None for object stores."""
    if "://" in str(self.folder):
      return None
    path = self.folder
    while not path.exists():
      path = path.parent
    return shutil.disk_usage(path).free

  # -- reading ---------------------------------------------------------------

  def steps(self) -> tuple[int, ...]:
    """Steps with a checkpoint that was not left unfinished, ascending.

    A damaged checkpoint is in the list: it must not look like a fresh start.
    """
    return disk.committed_steps(self.folder)

  def latest_step(self) -> int | None:
    """The newest of `steps()`, leaving out what `restore` found damaged."""
    steps = self.steps()
    intact = [s for s in steps if s not in self._damaged]
    return (intact or list(steps) or [None])[-1]

  def best_step(self) -> int | None:
    """The step whose saved `best_metric` is best; the later one of equals.

    Process 0 looks and tells the others: call it on all of them.
    """
    best = None
    if jax.process_index() == 0:
      best = self._best_step()
    return _told(best)

  def _best_step(self) -> int | None:
    return disk.best_step(self.folder, self._best_metric, self._best_sign)

  def restore(
    self,
    abstract_state: Any,
    step: int | None = None,
    *,
    adapt: Adapt | None = None,
  ) -> Restored:
    """Reads the newest intact checkpoint, onto any number of devices.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings, of the
        structure that was saved. A leaf without sharding goes to the default
        device.
      step: read this checkpoint and no other.
      adapt: for arrays whose shapes depend on the number of devices, such as
        `parallel.elastic.adapt`.

    Raises:
      FileNotFoundError: there is no checkpoint (of this step).
      CheckpointError: there are checkpoints and all are damaged.
      ValueError: the checkpoint belongs to another model; the message names
        the first parameter that differs.
    """
    self.wait()
    candidates = self.steps()[::-1] if step is None else (int(step),)
    if not candidates or not (self.folder / str(candidates[0])).exists():
      which = "" if step is None else f" of step {step}"
      raise FileNotFoundError(
        f"There is no checkpoint{which} in {self.folder}; there are steps"
        f" {list(self.steps())}."
      )
    chosen, skipped = self._choose(candidates)
    self._damaged.update(bad for bad, _ in skipped)
    disk.report(self.folder, chosen, skipped)
    path = self.folder / str(chosen)
    meta = disk.read_json(path / disk.META)
    finish = None
    if adapt is not None:
      shapes = {name: tuple(shape) for name, shape, _ in meta["arrays"]}
      abstract_state, finish = adapt(shapes, abstract_state)
    contents.refuse_foreign(
      meta["arrays"], contents.describe(abstract_state), path
    )
    state = self._orbax.restore(
      path / disk.STATE,
      args=ocp.args.StandardRestore(
        jax.tree.map(contents.placed, abstract_state)
      ),
    )
    if finish is not None:
      state = finish(state)
    return Restored(
      chosen, state, meta["iterator_state"], meta["config"], tuple(skipped)
    )

  def _choose(
    self, candidates: tuple[int, ...]
  ) -> tuple[int | None, list[tuple[int, str]]]:
    """The first intact candidate; process 0 looks and tells the others."""
    chosen, skipped = None, []
    if jax.process_index() == 0:
      chosen, skipped = disk.first_intact(self.folder, candidates)
    chosen = _told(chosen)
    if jax.process_index() > 0:
      passed = [c for c in candidates if chosen is None or c > chosen]
      skipped = [(c, "process 0 found it damaged") for c in passed]
    return chosen, skipped

  def _intact(self, step: int) -> bool:
    if step == self._last_saved and (self.folder / str(step)).exists():
      return True  # written by this object: no need to read it all again
    try:
      disk.verify(self.folder / str(step))
    except disk.DamagedError:
      return False
    return True


def _one_replica(x: Any) -> Any:
  """A small array as its first device has it, if this process has them all.

  Orbax lets each device write a slice, and each slice is a program to compile.
  """
  if not isinstance(x, jax.Array) or contents.nbytes(x) >= _WORTH_DIVIDING:
    return x
  if not (x.is_fully_replicated and x.is_fully_addressable):
    return x
  return x.addressable_data(0)


def _told(step: int | None) -> int | None:
  """Process 0's `step` on every process."""
  if jax.process_count() == 1:
    return step
  told = multihost_utils.broadcast_one_to_all(
    np.int64(-1 if step is None else step)
  )
  return None if told < 0 else int(told)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
