"""Runs in processes of their own, to be killed, and what they wrote."""

import csv
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

# What a run's row may differ in: the machine's speed.
TIMES = ("step_time_s", "tokens_per_s", "slots_per_s", "mfu")

# Runs the config it reads from standard input, with batches written down, and
# what the workers of a compressed optimizer owe each other.
_PROGRAM = """
import hashlib, json, os, pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from bertjax import loop, train
from bertjax.parallel import elastic, hosts
from bertjax.parallel.error_feedback import ErrorFeedback
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
workdir = pathlib.Path(sys.argv[1])
real = loop.fit
def rows(batch):
  found = {}
  for name in sorted(batch):
    held = {shard.index[0].start or 0: np.asarray(shard.data)
            for shard in batch[name].addressable_shards}
    for start in sorted(held):
      for i, row in enumerate(held[start], start):
        found.setdefault(i, hashlib.sha256()).update(row.tobytes())
  return {i: digest.hexdigest() for i, digest in found.items()}
def debts(state):
  is_error = lambda x: isinstance(x, ErrorFeedback)
  for node in jax.tree.leaves(state.opt_state, is_leaf=is_error):
    if is_error(node):
      mesh = jax.tree.leaves(node)[0].sharding.mesh
      owed = jax.jit(
        lambda node: jax.tree.map(
          lambda e, d: e.mean(0) + elastic.joined_servers(d, e.shape[1:]),
          node.worker.tree, node.server),
        out_shardings=NamedSharding(mesh, PartitionSpec()))
      return [np.asarray(x) for x in jax.tree.leaves(owed(node))]
def note_debts(name, state):
  owed = debts(state)
  if owed is not None and hosts.is_first():
    np.savez(workdir / f"debts-{name}.npz", *owed)
def fit(state, batches, step, **options):
  def noted():
    for number, batch in enumerate(batches, options["start"]):
      held = rows(batch)
      with open(workdir / f"rows-{jax.process_index()}.txt", "a") as file:
        file.writelines(f"{number} {i} {d}\\n" for i, d in held.items())
      yield batch
  note_debts(f"from-{options['start']}", state)
  state, end, why = real(state, noted(), step, **options)
  note_debts(f"to-{end}", state)
  return state, end, why
loop.fit = fit
if "UNREPORTED" in os.environ:  # plots cost more than the steps
  train.report.write_report = lambda *args, **options: None
with hosts.connected(
    hosts.place(), connect_timeout_s=120, heartbeat_timeout_s=10):
  train.train(json.load(sys.stdin), workdir)
"""


def start(config, workdir, devices=1, **environment):
  """A process that trains; it writes digests of its rows down."""
  workdir.mkdir(parents=True, exist_ok=True)
  process = subprocess.Popen(
    [sys.executable, "-c", _PROGRAM, str(workdir), str(devices)],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
    env=os.environ | environment,
  )
  process.stdin.write(json.dumps(config))
  process.stdin.close()
  return process


def start_together(config, workdir, count, devices=1, **environment):
  """Processes that train together, as a job manifest starts them."""
  port = free_port()
  return [
    start(config, workdir, devices, **environment, **place(port, count, i))
    for i in range(count)
  ]


def place(port, count, index):
  """Variables that tell a process of its job."""
  return {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(count),
    "JAX_PROCESS_ID": str(index),
  }


def free_port():
  """A port that was free a moment ago."""
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


def finish(process):
  """Waits for its success; gives what it wrote on standard error."""
  errors = process.stderr.read()
  code = process.wait()
  assert code == 0, errors
  return errors


def wait_for_step(process, workdir, step):
  """Until the run has logged `step`."""
  deadline = time.monotonic() + 300
  while process.poll() is None and time.monotonic() < deadline:
    logged = rows(workdir)
    if logged and int(float(logged[-1]["step"])) >= step:
      return
    time.sleep(0.01)


def rows(workdir):
  """Rows of metrics.csv."""
  path = workdir / "metrics.csv"
  if not path.exists():
    return []
  with path.open() as file:
    return [r for r in csv.DictReader(file) if r.get("step")]


def values(workdir):
  """All that was logged, but for the speed."""
  return [
    {k: v for k, v in row.items() if k not in TIMES} for row in rows(workdir)
  ]


def held_rows(workdir, process=0):
  """(step, row of the batch, digest) of a process, in the order read."""
  text = (workdir / f"rows-{process}.txt").read_text()
  lines = (line.split() for line in text.splitlines())
  return [(int(step), int(row), digest) for step, row, digest in lines]


def batches(workdir):
  """Digests of the batches that a lone process read, in order."""
  found = held_rows(workdir)
  starts = [i for i, (_, row, _) in enumerate(found) if row == 0]
  return [
    hashlib.sha256("".join(d for *_, d in found[a:b]).encode()).hexdigest()
    for a, b in zip(starts, [*starts[1:], len(found)])
  ]
