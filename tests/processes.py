"""Runs in processes of their own, to be killed, and what they wrote."""

import csv
import json
import pathlib
import subprocess
import sys
import time

# What a run's row may differ in: the machine's speed.
TIMES = ("step_time_s", "tokens_per_s", "slots_per_s", "mfu")

# Runs the config it reads from standard input, with batches written down.
_PROGRAM = """
import hashlib, json, pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from bertjax import experiment, loop, train
import numpy as np
real = loop.fit
def fit(state, batches, step, **options):
  def noted():
    for batch in batches:
      digest = hashlib.sha256()
      for name in sorted(batch):
        digest.update(np.asarray(batch[name]).tobytes())
      with open(pathlib.Path(sys.argv[1]) / "batches.txt", "a") as file:
        file.write(digest.hexdigest() + "\\n")
      yield batch
  return real(state, noted(), step, **options)
loop.fit = fit
train.train(json.load(sys.stdin), sys.argv[1])
"""


def start(config, workdir, devices=1):
  """A process that trains; it writes digests of its batches down."""
  workdir.mkdir(parents=True, exist_ok=True)
  process = subprocess.Popen(
    [sys.executable, "-c", _PROGRAM, str(workdir), str(devices)],
    stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[1],
  )
  process.stdin.write(json.dumps(config))
  process.stdin.close()
  return process


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


def batches(workdir):
  """Digests of the batches that were read, in order."""
  return (workdir / "batches.txt").read_text().split()
