"""Processes that must agree: on what they train, on where, and until when."""

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from bertjax.parallel import hosts

# Of an answer that only waits for others to get there; heartbeats bound it.
_LONG_MS = 24 * 3600 * 1000
_SHARED_S = 60.0  # NFS may hide a new file for as long

# So many were reached: every process asks in the same order.
_agreements = 0


def agree(what: str, facts: Mapping[str, Any]) -> None:
  """Refuses to go on where a process has other facts than process 0.

  Args:
    what: is compared, for the message.
    facts: JSON values by name; called by every process, in the same order.

  Raises:
    ValueError: naming what differs, on the process where it does.
  """
  global _agreements
  client = hosts.client()
  if client is None or jax.process_count() == 1:
    return
  _agreements += 1
  key = f"bertjax/agreed/{_agreements}"
  mine = json.loads(json.dumps(facts))
  if jax.process_index() == 0:
    client.key_value_set(key, json.dumps(mine))
    return
  theirs = json.loads(client.blocking_key_value_get(key, _LONG_MS))
  different = [
    f"{name}: {mine.get(name)!r} here, {theirs.get(name)!r} on process 0"
    for name in sorted({*mine, *theirs})
    if mine.get(name) != theirs.get(name)
  ]
  if different:
    raise ValueError(
      f"{what}: process {jax.process_index()} differs from process 0"
      f" ({'; '.join(different[:3])}). Run the same command with the same files"
      " on every host."
    )


def check_shared(folder: pathlib.Path) -> None:
  """Makes `folder`, and refuses one that not every process sees.

  Raises:
    ValueError: on a process that does not see what process 0 wrote.
  """
  global _agreements
  client = hosts.client()
  if client is None or jax.process_count() == 1:
    return
  _agreements += 1
  key = f"bertjax/shared/{_agreements}"
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    sign = folder / f".shared-{os.getpid()}-{time.time_ns()}"
    sign.touch()
    client.key_value_set(key, sign.name)
  name = client.blocking_key_value_get(key, _LONG_MS)
  deadline = time.monotonic() + _SHARED_S
  while not (folder / name).exists():
    if time.monotonic() > deadline:
      raise ValueError(
        f"workdir={folder}: process {jax.process_index()} does not see what"
        " process 0 wrote there. Name a folder on a file system that all hosts"
        " share."
      )
    time.sleep(0.1)
  client.wait_at_barrier(f"{key}/seen", _LONG_MS)
  if jax.process_index() == 0:
    sign.unlink()


def wait_for_all() -> None:
  """Until every process is here, and with it what process 0 writes to disk."""
  global _agreements
  client = hosts.client()
  if client is not None and jax.process_count() > 1:
    _agreements += 1
    client.wait_at_barrier(f"bertjax/all/{_agreements}", _LONG_MS)


def told(value: int) -> int:
  """Process 0's `value` on every process; waits for the devices."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class Alarm:
  """Whether time is up by the clock of process 0, asked before every step.

  Being told waits for the devices, as a step need not. So with each answer
  process 0 tells after how many steps it wants to be asked again: half as many
  as the time that is left will last, `_MOST` at most.
  """

  _MOST = 32

  def __init__(self):
    self._next = 0
    self._asked: tuple[int, float] | None = None

  def __call__(self, step: int, left_s: float) -> bool:
    """The same on all processes.

    Args:
      step: that comes next; every process asks before the same ones.
      left_s: seconds that are left by this process's clock.
    """
    if jax.process_count() == 1:
      return left_s <= 0
    if step < self._next:
      return False
    steps = told(self._steps(step, left_s))
    self._next = step + steps
    return steps == 0

  def _steps(self, step: int, left_s: float) -> int:
    """Until the next ask; 0: time is up."""
    if left_s <= 0:
      return 0
    before, self._asked = self._asked, (step, left_s)
    if before is None or before[1] <= left_s:
      return 1
    each_s = (before[1] - left_s) / (step - before[0])
    return min(max(1, int(left_s / each_s / 2)), self._MOST)
