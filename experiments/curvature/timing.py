"""Time per step of the masked language models of `experiments.mkor`."""

import csv
import pathlib
import statistics
import time
from typing import Any

import jax

from bertjax import experiment
from bertjax.config import settings
from bertjax.parallel.sharding import put_batch
from experiments.mkor import run as trained

_RESULTS = pathlib.Path(trained.__file__).parent / "results.csv"
_STEPS = "steps to LAMB's loss"


def steps_per_arm() -> dict[str, list[float | None]]:
  """By arm, steps to LAMB's last loss per seed; None where never."""
  found: dict[str, list[float | None]] = {}
  with _RESULTS.open(encoding="utf-8", newline="") as file:
    for row in csv.DictReader(file):
      if row["seed"]:
        steps = row[_STEPS]
        found.setdefault(row["arm"], []).append(
          None if steps == "never" else float(steps)
        )
  return found


def milliseconds(
  *, variant: str, interval: int, rounds: int
) -> dict[str, dict[str, float]]:
  """Of a step of each arm, refreshes included, everything compiled.

  All arms take turns, so that whatever else the machine does meets them alike.

  Args:
    variant: key of `experiments.mkor.run.SCALES`.
    interval: steps of a turn: as many as between two refreshes.
    rounds: of turns; the median counts.

  Returns:
    "milliseconds", by arm.
  """
  scale = trained.SCALES[variant]
  runs, batch = {}, None
  for arm, precondition in trained.preconditioners(scale).items():
    if scale.arms and arm not in scale.arms:
      continue
    config = trained.config(scale, scale.rates[0], precondition)
    built = experiment.build(settings(config))
    if batch is None:
      rows = built.data.dataset().batch(0, scale.batch_size)
      batch = put_batch(rows, built.mesh)
    runs[arm] = _Turns(built, batch)
  times: dict[str, list[float]] = {arm: [] for arm in runs}
  for _ in range(rounds):
    for arm, turn in runs.items():
      times[arm].append(turn(interval))
  return {
    "milliseconds": {
      arm: 1e3 * statistics.median(found) for arm, found in times.items()
    }
  }


class _Turns:
  """A training run that takes some steps at a time."""

  def __init__(self, built: experiment.Experiment, batch: Any):
    self._step, self._batch = built.step, batch
    self._state, _ = self._step(built.init(), batch)

  def __call__(self, steps: int) -> float:
    """Seconds per step."""
    start = time.perf_counter()
    for _ in range(steps):
      self._state, metrics = self._step(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))
    return (time.perf_counter() - start) / steps
