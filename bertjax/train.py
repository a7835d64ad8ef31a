r"""Trains what a config describes, and continues where a killed run stopped.

  python -m bertjax.train --config=configs/quickstart.py --workdir=runs/quick

The workdir holds config.json, run.json (versions, commit), tokenizer/,
checkpoints/, metrics.csv, events/, health.json and report/. The same command
again resumes from the newest intact checkpoint; a finished run only reports.
`--dry_run` takes two real steps, evaluates and saves in a throw-away folder.

On several hosts the same command runs on each, in a workdir that they share;
TPUs and Slurm say who is who; elsewhere `--coordinator_address=HOST:PORT`,
`--num_processes` and `--process_id` do (`bertjax.parallel.launchers`). A run
that a signal ended exits with status 143: a scheduler may start it again.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import tempfile
from typing import Any

import jax
from absl import app, flags

from bertjax import (
  checkpoint,
  cli,
  fields,
  grid,
  loading,
  loop,
  predict,
  records,
  report,
)
from bertjax import experiment as experiment_lib
from bertjax.config import (
  Settings,
  cache_path,
  plain,
  settings,
  stage_configs,
)
from bertjax.experiment import Experiment
from bertjax.hooks import Stopwatch
from bertjax.parallel import agreement, hosts
from bertjax.session import INTERRUPTED, Session


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    state: the final train state, or the best by `keep.best_metric`; None of a
      grid, whose best run is on disk.
    step: optimizer steps taken.
    reason: why it stopped.
    metrics: the last training values, and the evaluation values of `state`.
    interrupted: whether a signal ended it early.
    elapsed_s: seconds of the (last) stage, over all resumes.
    report: of the (last) stage, or the table of a grid, if process 0 wrote one.
  """

  state: Any
  step: int
  reason: str
  metrics: dict[str, float]
  interrupted: bool = False
  elapsed_s: float = 0.0
  report: pathlib.Path | None = None


def train(
  config: Any, workdir: str | os.PathLike, *, dry_run: bool = False
) -> Result:
  """Runs a config: all stages one after the other, all points of its grid.

  Args:
    config: a ConfigDict or mapping of the fields of `Settings`.
    workdir: created if needed; stages, and the runs of a grid, have sub-folders
      of their own.
    dry_run: two steps of everything, in a folder that is removed again.

  Raises:
    ValueError: a config that does not fit, naming the field, a workdir that
      is a file, holds something else, cannot be written or is not shared by
      all hosts, or processes that differ.
    NonFiniteError: the loss is NaN; earlier checkpoints are untouched.
  """
  if dry_run:
    if jax.process_count() > 1:
      raise ValueError(
        "dry_run=True works in a temporary folder, which several processes do"
        " not share; train for stop.steps=2 in a workdir instead."
      )
    with tempfile.TemporaryDirectory() as folder:
      return _train_grid(config, pathlib.Path(folder), limit=2)
  workdir = pathlib.Path(workdir)
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir={workdir} is a file; name a folder.")
  # The others write nothing before they agree with process 0 (`run`).
  if hosts.is_first():
    _check_workdir(config, workdir)
    records.check_writable(workdir)
  return _train_grid(config, workdir, limit=None)


def _check_workdir(config: Any, workdir: pathlib.Path) -> None:
  """Refuses what is not this run's, there or where its parts will be."""
  cache = plain(config).get("cache_dir")
  fields.check({"cache_dir": cache})
  parts = {point.name: point.config for point in grid.points(config)}
  parts = parts or {k: v for k, v in stage_configs(config).items() if k}
  records.check_workdir(workdir, parts, cache_path(cache))
  for name, part in parts.items():
    _check_workdir(part, workdir / name)


def _train_grid(
  config: Any, workdir: pathlib.Path, limit: int | None
) -> Result:
  """Every combination of `config.grid`, if there is one; gives the best."""
  points = grid.points(config)
  if not points:
    return _train_stages(config, workdir, limit, workdir)
  by, results, metrics = grid.selection(config), {}, []
  for number, point in enumerate(points, 1):
    hosts.say(f"Run {number} of {len(points)}: {point.name}.")
    result = _train_stages(point.config, workdir / point.name, limit, workdir)
    if result.interrupted:
      return result
    # The states of all runs together would not fit.
    results[point.name] = dataclasses.replace(result, state=None)
    metrics.append((point, result.metrics))
  best = grid.best_of(metrics, by)
  table = None
  if hosts.is_first():
    table = grid.record(workdir, metrics, best)
  hosts.say(f"Best by {by.metric}: {best.name}.")
  return dataclasses.replace(results[best.name], report=table)


def _train_stages(
  config: Any, workdir: pathlib.Path, limit: int | None, root: pathlib.Path
) -> Result:
  result: Result | None = None
  previous: pathlib.Path | None = None
  for name, changed in stage_configs(config).items():
    stage = settings(changed)
    if previous is not None:
      source = {"path": str(previous), **(stage.init_from or {})}
      stage = dataclasses.replace(stage, init_from=source)
    if limit is not None:
      stage = dataclasses.replace(stage, every={"log": 1, "checkpoint": 1})
    if name:
      hosts.say(f"Stage {name}.")
    result = run(stage, workdir / name, limit=limit, root=root)
    if result.interrupted:
      break
    previous = workdir / name
    if name and hosts.is_first():
      checkpoint.link(workdir / checkpoint.LAST, name)
  return result


def run(
  stage: Settings,
  workdir: pathlib.Path,
  *,
  limit: int | None = None,
  root: pathlib.Path | None = None,
) -> Result:
  """Trains one stage; continues if the workdir holds a checkpoint.

  Args:
    stage: the checked config, without stages.
    workdir: created if needed.
    limit: take at most so many steps now, whatever the config says.
    root: workdir of the stages or the grid that this is part of.
  """
  watch = Stopwatch()  # building a vocabulary is part of a budget
  experiment = experiment_lib.build(stage)
  _check_report(experiment)
  _check_together(experiment, workdir)
  with contextlib.ExitStack() as stack, hosts.failing_together():
    session = Session(experiment, workdir, stack, watch, limit=limit, root=root)
    baseline = _health(experiment, workdir)
    state, step, end = loop.fit(
      session.state,
      session.batches(),
      experiment.step,
      start=session.start,
      stop=session.stop,
      hooks=session.hooks,
      log=session.log,
      save=session.saving,
      amend=session.amend,
    )
    state, reason = session.finish(state, step, end)
    metrics = session.latest() | baseline
  interrupted = end == INTERRUPTED
  written = None
  if not interrupted:
    written = _report(experiment, workdir, state)
  agreement.wait_for_all()  # the next stage reads what process 0 wrote
  return Result(
    state, step, reason, metrics, interrupted, watch.elapsed_s(), written
  )


def _check_together(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Refuses processes that would train something else, or elsewhere."""
  agreement.agree("config", dict(records.flat(experiment.settings.to_json())))
  agreement.agree("data", experiment.data.identity())
  agreement.check_shared(workdir)


def _check_report(experiment: Experiment) -> None:
  """Refuses now what the report would refuse when all is done."""
  asked = experiment.settings
  if asked.reference_curve:
    report.read_reference(asked.reference_curve)
  if asked.samples:
    predict.check_samples(asked.to_json(), experiment.data.tokenizer)


def _health(experiment: Experiment, workdir: pathlib.Path) -> dict[str, float]:
  """Writes health.json: statistics of the data, and what guessing achieves.

  Returns:
    Values of guessing, by evaluator and name.
  """
  baselines = experiment.baselines()
  if hosts.is_first():
    health = experiment.data.health() | {
      "clip_norm": experiment.settings.optim.get("clip_norm"),
      "baselines": baselines,
    }
    records.write_json(workdir / "health.json", health)
  return baselines


def _report(
  experiment: Experiment, workdir: pathlib.Path, state: Any
) -> pathlib.Path | None:
  """Writes the report, on process 0 and if there are curves for it."""
  texts, samples = list(experiment.settings.samples), []
  params = hosts.whole(state.params) if texts else None
  if not hosts.is_first():
    return None
  if not report.has_curves(workdir):
    hosts.say("There is no report: it is drawn from what writers='csv' writes.")
    return None
  if texts:
    model = loading.in_memory(
      experiment.objective,
      params,
      experiment.data.tokenizer,
      experiment.settings.to_json(),
    )
    samples = predict.samples(model, texts)
  # A finished run does not rewrite its config.json.
  reference = experiment.settings.reference_curve or ""
  return report.write_report(workdir, reference=reference, samples=samples)


cli.define_config()
cli.define_hosts()
_WORKDIR = flags.DEFINE(cli.PATH, "workdir", None, "Folder of the run.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Two real steps, then leave.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
  if not flags.FLAGS["config"].present:
    raise app.UsageError("--config is required.")
  if _WORKDIR.value is None and not _DRY_RUN.value:
    raise app.UsageError("--workdir is required, except with --dry_run.")
  cli.quiet()
  cli.keep_compiled()
  with cli.clear_errors(), cli.connected():
    result = train(cli.config(), _WORKDIR.value or "", dry_run=_DRY_RUN.value)
    if hosts.is_first():
      _show(result)
  if result.interrupted:
    sys.exit(128 + signal.SIGTERM)


def _show(result: Result) -> None:
  """Prints the values, and where the report is."""
  for name, value in sorted(result.metrics.items()):
    print(f"{name:32s} {value:.6g}")
  if not _DRY_RUN.value and result.report is not None:
    print(f"Report: {result.report}")


if __name__ == "__main__":
  cli.run(main, flags_parser=cli.parse_flags)
