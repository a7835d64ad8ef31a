"""Runs of an experiment: trained once, remembered, compared over seeds.

    bench = arms.Bench(workdir)
    for seed in (0, 1, 2):
      for init in ("random", "pretrained"):
        bench.run(config_of(init), seed=seed, init=init)
    gains = arms.gains(bench.runs, "test/accuracy", "init", "pretrained",
                       "random")

What distinguishes runs is free: any number of named factors and the seed. A
finished run is read back from the workdir; one that was killed goes on where
its last checkpoint left it. So an experiment is plain loops, and the same
command again continues them. A list of seeds of one kind only is such a loop
too: over `seeds.data` of the config, say, which is then a factor.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from bertjax import train as train_lib
from bertjax.config import merge, plain
from bertjax.metrics.accumulator import NonFiniteError
from bertjax.metrics.writers import read_csv

Factors = Mapping[str, str | int | float]

_FINISHED = "finished.json"


class InterruptedRunError(RuntimeError):
  """A signal ended a run early; the same command continues it."""


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    factors: what distinguishes it from the others, besides the seed.
    seed: of everything random in it.
    metrics: the last training and evaluation values.
    seconds: of training, evaluation and building, over all resumes.
    workdir: its folder, for `init_from` and for `curve`.
  """

  factors: Factors
  seed: int
  metrics: Mapping[str, float]
  seconds: float
  workdir: pathlib.Path

  def row(self, metrics: Iterable[str] | None = None) -> dict[str, Any]:
    """Factors, seed, the metrics named (by default all) and seconds."""
    names = self.metrics if metrics is None else metrics
    values = {name: self.metrics[name] for name in names}
    return {
      **self.factors,
      "seed": self.seed,
      **values,
      "seconds": self.seconds,
    }

  def curve(self, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column of metrics.csv, where it has one.

    Of a run that diverged at once there may be none.
    """
    if not (self.workdir / "metrics.csv").exists():
      return [], []
    table = read_csv(self.workdir / "metrics.csv")
    points = [
      (int(step), value)
      for step, value in zip(table["step"], table[metric], strict=True)
      if value == value  # NaN: not measured at that step
    ]
    return [step for step, _ in points], [value for _, value in points]


class Bench:
  """Trains configs in sub-folders of a workdir, each of them once.

  Attributes:
    runs: what was asked for, in that order.
  """

  def __init__(self, workdir: str | os.PathLike):
    """Args:
    workdir: created if needed.
    """
    self.workdir = pathlib.Path(workdir)
    self.runs: list[Run] = []

  def run(
    self,
    config: Any,
    *,
    seed: int,
    diverged: Mapping[str, float] | None = None,
    **factors: str | int | float,
  ) -> Run:
    """A finished run of `config`, trained unless the workdir has it.

    The folder's name ends in a hash of the config: a changed config is another
    run and never mistaken for this one.

    Args:
      config: a ConfigDict or mapping; its seed is replaced.
      seed: of everything random.
      diverged: metrics of a run whose loss is no number any more, where that is
        something to find out; None: it ends the experiment.
      **factors: what the run is called in tables and files.

    Raises:
      InterruptedRunError: a signal came; the run is saved.
      NonFiniteError: the run diverged, and `diverged` is None.
    """
    config = merge(plain(config), {"seed": seed})
    folder = self.workdir / _folder_name(factors, seed, config)
    record = folder / _FINISHED
    if not record.exists():
      start = time.monotonic()
      try:
        result = train_lib.train(config, folder)
      except NonFiniteError:
        if diverged is None:
          raise
        seconds = time.monotonic() - start
        values = {"metrics": dict(diverged), "seconds": seconds}
      else:
        if result.interrupted:
          raise InterruptedRunError(
            f"{folder} stopped at step {result.step}: {result.reason}. The same"
            " command continues."
          )
        values = {"metrics": result.metrics, "seconds": result.elapsed_s}
      folder.mkdir(parents=True, exist_ok=True)
      partial = record.with_suffix(".partial")
      partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
      partial.replace(record)
    run = Run(factors, seed, **json.loads(record.read_text()), workdir=folder)
    self.runs.append(run)
    return run


def _folder_name(factors: Factors, seed: int, config: Mapping) -> str:
  text = json.dumps(config, sort_keys=True, default=str)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  name = "-".join([*map(str, factors.values()), f"seed{seed}", digest])
  return re.sub(r"[^\w.+-]+", "_", name)


@dataclasses.dataclass(frozen=True)
class Stat:
  """Values of one quantity over seeds; prints as `0.812 ± 0.004`."""

  values: tuple[float, ...]

  @property
  def mean(self) -> float:
    return statistics.fmean(self.values)

  @property
  def spread(self) -> float:
    """Sample standard deviation; NaN for a single value."""
    if len(self.values) < 2:
      return float("nan")
    return statistics.stdev(self.values)

  def __format__(self, form: str) -> str:
    form = form or ".3f"
    mean = format(self.mean, form)
    if len(self.values) < 2:
      return mean
    return f"{mean} ± {format(self.spread, form.replace('+', ''))}"

  def __str__(self) -> str:
    return format(self, "")


def select(runs: Iterable[Run], **factors: Any) -> list[Run]:
  """The runs that have all these factors, of which `seed` may be one."""

  def fits(run: Run) -> bool:
    has = {**run.factors, "seed": run.seed}
    return all(has.get(name) == value for name, value in factors.items())

  return [run for run in runs if fits(run)]


def stat(runs: Iterable[Run], metric: str, **factors: Any) -> Stat:
  """A metric over the selected runs.

  Raises:
    ValueError: no run has these factors.
  """
  chosen = select(runs, **factors)
  if not chosen:
    raise ValueError(f"no run has the factors {factors}.")
  return Stat(tuple(run.metrics[metric] for run in chosen))


def summary(
  runs: Iterable[Run], metrics: Mapping[str, str]
) -> list[dict[str, Any]]:
  """A row for each combination of factors: mean and spread over its seeds.

  Args:
    runs: in the order of the rows.
    metrics: key of `Run.metrics` by title; a row lacks those it has not.
  """
  groups: dict[tuple, list[Run]] = {}
  for run in runs:
    groups.setdefault(tuple(run.factors.items()), []).append(run)
  return [
    {
      **dict(factors),
      "runs": len(group),
      **{
        title: str(stat(group, metric))
        for title, metric in metrics.items()
        if metric in group[0].metrics
      },
    }
    for factors, group in groups.items()
  ]


def gains(
  runs: Iterable[Run],
  metric: str,
  factor: str,
  better: str | int | float,
  than: str | int | float,
  **factors: Any,
) -> Stat:
  """How much more `metric` runs with one level of a factor have.

  Each is compared with the run that differs in nothing but `factor`, so that
  the seed's part in the spread cancels.

  Args:
    runs: among them pairs.
    metric: key of `Run.metrics`.
    factor: in which the two differ.
    better: its level in the minuend.
    than: its level in the subtrahend.
    **factors: further ones that both have.

  Raises:
    ValueError: there is no pair.
  """

  def by_rest(level):
    return {
      _rest(run, factor): run.metrics[metric]
      for run in select(runs, **factors, **{factor: level})
    }

  runs = list(runs)
  minuend, subtrahend = by_rest(better), by_rest(than)
  pairs = [key for key in minuend if key in subtrahend]
  if not pairs:
    raise ValueError(
      f"no two runs differ just in {factor} ({better!r} and {than!r})."
    )
  return Stat(tuple(minuend[key] - subtrahend[key] for key in pairs))


def _rest(run: Run, factor: str) -> tuple:
  rest = {k: v for k, v in run.factors.items() if k != factor}
  return tuple(sorted(rest.items())), run.seed
