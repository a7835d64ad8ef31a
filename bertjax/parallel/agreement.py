"""Processes that must agree before they train: on what, and on where."""

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

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
