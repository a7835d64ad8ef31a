"""Runs that write down which rows they read, and what their workers owe."""

import hashlib
import pathlib
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bertjax import loop
from bertjax.parallel import elastic, hosts
from bertjax.parallel.error_feedback import ErrorFeedback


def rows(batch):
  """Digests of the rows that this process holds, by row of the batch."""
  found = {}
  for name in sorted(batch):
    held = {
      shard.index[0].start or 0: np.asarray(shard.data)
      for shard in batch[name].addressable_shards
    }
    for start in sorted(held):
      for i, row in enumerate(held[start], start):
        found.setdefault(i, hashlib.sha256()).update(row.tobytes())
  return {i: digest.hexdigest() for i, digest in found.items()}


def _debts(state):
  """What the workers of a compressed optimizer owe each other; else None."""

  def is_error(x):
    return isinstance(x, ErrorFeedback)

  for node in jax.tree.leaves(state.opt_state, is_leaf=is_error):
    if is_error(node):
      mesh = jax.tree.leaves(node)[0].sharding.mesh
      owed = jax.jit(
        lambda node: jax.tree.map(
          lambda e, d: e.mean(0) + elastic.joined_servers(d, e.shape[1:]),
          node.worker.tree,
          node.server,
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
      )
      return [np.asarray(x) for x in jax.tree.leaves(owed(node))]
  return None


def noting(workdir: pathlib.Path):
  """A context in which `bertjax.loop.fit` takes notes in `workdir`.

  rows-<process>.txt has a line `step row digest` for each row of a batch,
  debts-from-<step>.npz and debts-to-<step>.npz what was owed at either end.
  """
  real = loop.fit

  def note_debts(name, state):
    owed = _debts(state)
    if owed is not None and hosts.is_first():
      np.savez(workdir / f"debts-{name}.npz", *owed)

  def fit(state, batches, step, **options):
    def noted():
      for number, batch in enumerate(batches, options["start"]):
        held = rows(batch)
        with open(workdir / f"rows-{jax.process_index()}.txt", "a") as file:
          file.writelines(f"{number} {i} {d}\n" for i, d in held.items())
        yield batch

    note_debts(f"from-{options['start']}", state)
    state, end, why = real(state, noted(), step, **options)
    note_debts(f"to-{end}", state)
    return state, end, why

  return mock.patch.object(loop, "fit", fit)


def expected_rows(data, steps):
  """(step, row, digest) of the stream, whoever reads it."""
  found = []
  for step in range(steps):
    batch = data.dataset().batch(step, data.batch_size)
    for i in range(data.batch_size):
      row = b"".join(batch[name][i].tobytes() for name in sorted(batch))
      found.append((step, i, hashlib.sha256(row).hexdigest()))
  return found


def debts(workdir, step):
  """What was owed at `step`, before and after it was restored."""
  return tuple(
    list(np.load(workdir / f"debts-{end}-{step}.npz").values())
    for end in ("to", "from")
  )
