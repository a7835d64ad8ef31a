"""Runs in processes of their own, to be killed, and what they wrote."""

import csv
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

# What a run's row may differ in: the machine's speed.
TIMES = ("step_time_s", "tokens_per_s", "slots_per_s", "mfu")

# Runs the config it reads from standard input, with notes taken.
_PROGRAM = """
import json, os, pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from bertjax import garbage, train
from bertjax.parallel import hosts
from tests import noted
garbage.spare_imports()
workdir = pathlib.Path(sys.argv[1])
if "UNREPORTED" in os.environ:  # plots cost more than the steps
  train.report.write_report = lambda *args, **options: None
with noted.noting(workdir), hosts.connected(
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
