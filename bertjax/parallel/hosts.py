"""Many processes train as one: they start, stop and fail together.

  with hosts.connected(hosts.place()):   # before anything else of JAX
    train(config, workdir)

Every process runs the same command. Process 0 writes what a person reads; all
of them write their parts of a checkpoint. Should one of them fail, the others
end within seconds and say why; should one vanish, within `heartbeat_timeout_s`.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from bertjax.parallel import launchers, rendezvous
from bertjax.parallel.launchers import Place

_FAILED = "bertjax/failed/"  # + process -> why, in the coordinator's store
_WATCH_S = 1.0
_NOTE_S = 30.0  # silence after which a person wonders

# Errors whose message says it all; None outside of `connected`.
_expected: tuple[type[Exception], ...] | None = None


def place(**given: Any) -> Place | None:
  """Where this process stands; see `launchers.detect`."""
  on_tpu = launchers.on_tpu_machine(os.environ)
  return launchers.detect(os.environ, on_tpu=on_tpu, **given)


@contextlib.contextmanager
def connected(
  where: Place | None,
  *,
  connect_timeout_s: int = 300,
  heartbeat_timeout_s: int = 100,
  expected: tuple[type[Exception], ...] = (ValueError,),
) -> Iterator[None]:
  """Inside, `jax.devices()` are those of all processes.

  An exception inside ends this process, and through it the others, with status
  1: what remains of the job could only wait.

  Args:
    where: this process's place; None: it is the only one, nothing happens.
    connect_timeout_s: seconds to wait for the other processes.
    heartbeat_timeout_s: seconds after which a silent process counts as dead.
    expected: errors that are shown without their traceback.

  Raises:
    RendezvousError: the processes did not come together.
  """
  for name, value in (
    ("connect_timeout_s", connect_timeout_s),
    ("heartbeat_timeout_s", heartbeat_timeout_s),
  ):
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1.")
  if where is None or not _connect(
    where, connect_timeout_s, heartbeat_timeout_s
  ):
    yield
    return
  global _expected
  _expected = expected
  done = threading.Event()
  watcher = threading.Thread(target=_watch, args=(done,), daemon=True)
  watcher.start()
  try:
    with failing_together():
      yield
  finally:
    _expected = None
    done.set()
    watcher.join()
  jax.distributed.shutdown()


def _connect(
  where: Place, connect_timeout_s: int, heartbeat_timeout_s: int
) -> bool:
  """Meets the others; False if there turn out to be none."""
  with _told_if_slow(where):
    if where.coordinator_address is not None:
      rendezvous.meet(
        where.coordinator_address,
        where.num_processes,
        where.process_id,
        connect_timeout_s,
      )
    if not _initialize(where, connect_timeout_s, heartbeat_timeout_s):
      return False
  print(
    f"Process {jax.process_index()} of {jax.process_count()} on"
    f" {socket.gethostname()}: {jax.local_device_count()} of"
    f" {jax.device_count()} devices.",
    file=sys.stderr,
    flush=True,
  )
  return True


def _initialize(
  where: Place, connect_timeout_s: int, heartbeat_timeout_s: int
) -> bool:
  """Connects; False on a TPU machine that knows nothing of other hosts."""
  on_platform = where.coordinator_address is None
  try:
    jax.distributed.initialize(
      coordinator_address=where.coordinator_address,
      num_processes=where.num_processes,
      process_id=where.process_id,
      local_device_ids=where.local_device_ids,
      # What `launchers` found is complete; JAX would show one GPU to a task.
      cluster_detection_method=None if on_platform else "deactivate",
      initialization_timeout=connect_timeout_s,
      heartbeat_timeout_seconds=heartbeat_timeout_s,
    )
  except (ValueError, OSError) as err:
    # Neither GKE's variables nor Google's metadata server, as in notebooks.
    if not on_platform:
      raise
    first_line = str(err).splitlines()[0][:200]
    print(
      f"This machine's TPU names no other host ({first_line}); it is taken for"
      " the only one.",
      file=sys.stderr,
    )
    return False
  return True


@contextlib.contextmanager
def _told_if_slow(where: Place) -> Iterator[None]:
  """Says what is waited for, once the wait is longer than a start takes."""
  if where.coordinator_address is None:
    what = "the other hosts of this TPU; was the command started on all?"
  else:
    what = (
      f"{where.num_processes} processes at {where.coordinator_address}"
      f" (this is {where.process_id}, says {where.source})."
    )

  def say():
    print(f"Waiting for {what}", file=sys.stderr, flush=True)

  timer = threading.Timer(_NOTE_S, say)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


# -- failing -----------------------------------------------------------------


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """An exception inside is told to all processes and ends this one.

  At once: closing what is open would wait for processes that do not come.
  Outside of `connected` it changes nothing.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as err:
    if _expected is None:
      raise
    _end(err, _expected)


def _end(err: BaseException, expected: tuple[type[Exception], ...]) -> None:
  store, me, reason = client(), jax.process_index(), _reason(err)
  if isinstance(err, expected) or _lost_contact(str(err)):
    logging.debug("Traceback:", exc_info=True)
  else:
    traceback.print_exception(err)
  print(f"Error on process {me}: {reason}", file=sys.stderr, flush=True)
  # The coordinator may be what is gone.
  with contextlib.suppress(Exception):
    store.key_value_set(f"{_FAILED}{me}", reason)
    if me == 0:
      time.sleep(2 * _WATCH_S)  # its end would hide the reason from the others
  _leave()


def _reason(err: BaseException) -> str:
  text = str(err).strip()
  if not _lost_contact(text):
    return text or type(err).__name__
  return (
    f"a collective failed, so another process is gone"
    f" ({text.splitlines()[0][:200]}). If nobody says why, it was killed or its"
    " machine is down. Start the same command on every host again: the run"
    " goes on from its newest checkpoint."
  )


def _lost_contact(text: str) -> bool:
  return any(
    sign in text
    for sign in ("Gloo", "NCCL", "heartbeat", "UNAVAILABLE", "Socket closed")
  )


def _watch(done: threading.Event) -> None:
  """Ends this process when another one has said that it failed."""
  while not done.wait(_WATCH_S):
    store = client()
    if store is None:
      return
    try:
      failed = store.key_value_dir_get(_FAILED)
    except Exception:  # JAX itself ends a process that lost the coordinator
      continue
    others = [
      (name.rpartition("/")[2], reason)
      for name, reason in failed
      if name.rpartition("/")[2] != str(jax.process_index())
    ]
    if others and not done.is_set():
      number, reason = others[0]
      print(
        f"Error: process {number} failed, so process {jax.process_index()}"
        f" ends too: {reason}",
        file=sys.stderr,
        flush=True,
      )
      if jax.process_index() == 0:
        time.sleep(2 * _WATCH_S)
      _leave()


def _leave() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def client() -> Any:
  """The coordinator's key-value store, barriers included; None: no peers.

  JAX has no public name for it; Orbax takes it from here as well.
  """
  from jax._src import distributed

  return distributed.global_state.client


# -- what one process does for all -------------------------------------------


def is_first() -> bool:
  """Whether this process writes files and talks to people for all of them."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """A line on standard error, once for all processes."""
  if is_first():
    print(text, file=sys.stderr, flush=True)


def whole(tree: Any) -> Any:
  """Arrays as any process can read them: on the host, without their shards.

  Every process must ask, for parts may be elsewhere. With one process the
  arrays stay as they are.
  """
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(
    lambda x: (
      x
      if isinstance(x, np.ndarray)
      else multihost_utils.process_allgather(x, tiled=True)
    ),
    tree,
  )
