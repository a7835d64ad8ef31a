"""Seconds until BERT-large's training step is compiled, on this CPU.

  python -m benchmarks.compiling

The first time, with an empty cache of compiled programs, and the second, in
another process that finds it full.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import jax

from benchmarks import output
from bertjax import experiment
from bertjax.config import settings
from bertjax.data.abstract import abstract_text

_ROWS, _LENGTH, _MASKED = 8, 128, 20
_LINES = 20  # of a process that failed


def measure() -> dict[str, float]:
  """{"first_s", "second_s"}: tracing and compiling, without the first step.

  Raises:
    RuntimeError: a process failed; with its last lines.
  """
  with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": folder,
    }
    found = {}
    for name in ("first_s", "second_s"):
      done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiling", "--once"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
      )
      if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-_LINES:])
        raise RuntimeError(
          f"The process that compiles ended with {done.returncode}:\n{last}"
        )
      found[name] = float(done.stdout.split()[-1])
  print(
    f"BERT-large step: compiled in {found['first_s']:.1f} s, from the cache in"
    f" {found['second_s']:.1f} s"
  )
  return found


def once() -> float:
  """Seconds of tracing and compiling in this process."""
  config = dict(
    dtype="bfloat16",
    model=dict(name="bert", size="large"),
    objective=dict(name="masked_lm"),
    data=dict(
      source=dict(name="python_docs"),
      tokenizer=dict(name="train", kind="wordpiece", vocab_size=4096),
      splitter="sentences",
      seq_len=_LENGTH,
      batch_size=_ROWS,
      instances=dict(name="packed"),
      masking=dict(rate=0.15, max_masked=_MASKED),
    ),
    optim=dict(name="lamb", learning_rate=1e-3),
    stop=dict(steps=10),
  )
  stage = settings(config)
  built = experiment.build(stage, data=abstract_text(stage.data, 4096))
  start = time.perf_counter()
  with jax.set_mesh(built.mesh):
    built.step.jitted.lower(built.abstract_state, built.batch_spec).compile()
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.compiling")
  parser.add_argument("--once", action="store_true", help="in this process")
  parser.add_argument("--json", type=output.path, help="file for the seconds")
  options = parser.parse_args()
  if options.once:
    print(once())
    return
  found = measure()
  if options.json:
    options.json.write_text(json.dumps(found))


if __name__ == "__main__":
  main()
