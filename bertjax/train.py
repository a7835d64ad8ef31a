r"""Trains what a config describes, and continues where a killed run stopped.

  python -m bertjax.train --config=configs/quickstart.py --workdir=runs/quick

The workdir holds config.json, run.json (versions, commit), tokenizer/,
checkpoints/, metrics.csv, events/, health.json and report/. The same command
again resumes from the newest intact checkpoint; a finished run only reports.
`--dry_run` takes two real steps, evaluates and saves in a throw-away folder.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from bertjax import cli, loading, loop, predict, registry, report
from bertjax import experiment as experiment_lib
from bertjax import hooks as hooks_lib
from bertjax.checkpoint import Checkpointer
from bertjax.config import Settings, settings, stage_configs
from bertjax.data import audit
from bertjax.evals import unigram_baseline
from bertjax.evals.objective import read_batches
from bertjax.experiment import Experiment
from bertjax.handover import initial_state
from bertjax.metrics import logger, meters, progress, writers
from bertjax.parallel.sharding import put_batch

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_AUDITED_BATCHES = 32
_INTERRUPTED = "signal"


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    state: the final train state.
    step: optimizer steps taken.
    reason: why it stopped.
    metrics: the last training and evaluation values.
    interrupted: whether a signal ended it early.
  """

  state: Any
  step: int
  reason: str
  metrics: dict[str, float]
  interrupted: bool = False


def train(
  config: Any, workdir: str | os.PathLike, *, dry_run: bool = False
) -> Result:
  """Runs a config, or all its stages one after the other.

  Args:
    config: a ConfigDict or mapping of the fields of `Settings`.
    workdir: created if needed; stages have sub-folders of their own.
    dry_run: two steps of everything, in a folder that is removed again.

  Raises:
    ValueError: a config that does not fit, naming the field.
    NonFiniteError: the loss is NaN; earlier checkpoints are untouched.
  """
  if dry_run:
    with tempfile.TemporaryDirectory() as folder:
      return _train_stages(config, pathlib.Path(folder), limit=2)
  return _train_stages(config, pathlib.Path(workdir), limit=None)


def _train_stages(
  config: Any, workdir: pathlib.Path, limit: int | None
) -> Result:
  result: Result | None = None
  previous: pathlib.Path | None = None
  for name, fields in stage_configs(config).items():
    stage = settings(fields)
    if previous is not None and stage.init_from is not None:
      source = {"path": str(previous), **stage.init_from}
      stage = dataclasses.replace(stage, init_from=source)
    if limit is not None:
      stage = dataclasses.replace(stage, every={"log": 1, "checkpoint": 1})
    if name:
      print(f"Stage {name}.", file=sys.stderr)
    result = run(stage, workdir / name, limit=limit)
    if result.interrupted:
      break
    previous = workdir / name
  return result


def run(
  stage: Settings, workdir: pathlib.Path, *, limit: int | None = None
) -> Result:
  """Trains one stage; continues if the workdir holds a checkpoint.

  Args:
    stage: the checked config, without stages.
    workdir: created if needed.
    limit: take at most so many steps now, whatever the config says.
  """
  watch = hooks_lib.Stopwatch()
  stop_rules = hooks_lib.build_stop(stage.stop)
  experiment = experiment_lib.build(stage)
  checkpointer = registry.call(
    functools.partial(Checkpointer, workdir), stage.keep, "keep"
  )
  with contextlib.ExitStack() as stack:
    batches = experiment.data.dataset().iterator(
      experiment.data.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    stack.callback(batches.close)
    start, state, position = _start(experiment, checkpointer)
    last = stage.stop["steps"]
    if limit is not None:
      last = min(last, start + limit)
    if position:
      batches.set_state(position["data"])
      watch = hooks_lib.Stopwatch(position["elapsed_s"])
    _record(experiment, workdir)
    baseline = _health(experiment, workdir)
    writer = writers.open_writers(workdir, stage.writers, resume_from=start)
    stack.callback(writer.close)
    bar = progress.Progress(last, start=start)
    stack.callback(bar.close)
    throughput = meters.Throughput(
      flops_per_token=experiment.flops_per_token(), peak=meters.peak_flops()
    )
    log = logger.TrainLogger(
      hooks_lib.Every(stage.every["log"]),
      writer,
      slots_per_step=experiment.data.batch_size * experiment.data.seq_len,
      throughput=throughput,
      progress=bar,
      tokens_seen=position.get("tokens_seen", 0),
    )
    evaluations = _evaluations(experiment, writer, throughput, bar)

    def latest() -> dict[str, float]:
      values = dict(log.latest)
      for hook in evaluations:
        values |= hook.latest
      return values

    saving = hooks_lib.CheckpointHook(
      hooks_lib.Every(stage.every["checkpoint"]),
      checkpointer,
      iterator_state=lambda: {
        "data": batches.get_state(),
        "tokens_seen": log.tokens_seen,
        "elapsed_s": watch.elapsed_s(),
      },
      config=experiment.settings.to_json(),
      metrics=latest,
      # A resumed run has the same rows over the same windows of steps, and a
      # loss that is not finite is found before it is saved.
      before=log.flush,
    )
    stack.callback(saving.close)
    every_step = [*evaluations, saving]
    if stage.profile is not None:
      profiler = registry.call(
        functools.partial(hooks_lib.ProfilerHook, workdir / "profile"),
        stage.profile,
        "profile",
      )
      stack.callback(profiler.close)
      every_step.append(profiler)
    guard = stack.enter_context(hooks_lib.PreemptionGuard())

    def stop(step: int) -> str | None:
      if guard.requested():
        return _INTERRUPTED
      if step >= last:
        return f"{step} steps are done"
      return stop_rules(step, log.tokens_seen, watch.elapsed_s(), latest())

    state, step, reason = loop.fit(
      state,
      (put_batch(batch, experiment.mesh) for batch in batches),
      experiment.step,
      start=start,
      stop=stop,
      hooks=every_step,
      log=log,
    )
    log.flush()
    interrupted = reason == _INTERRUPTED
    if interrupted:
      reason = f"signal {guard.received or 'on another process'}"
    else:
      for hook in evaluations:
        hook.run(step, state)
    saving.save(step, state)
    bar.note(f"Stopped at step {step}: {reason}.")
    metrics = latest() | baseline
  if not interrupted and jax.process_index() == 0:
    _report(experiment, workdir, state)
  return Result(state, step, reason, metrics, interrupted)


def _start(
  experiment: Experiment, checkpointer: Checkpointer
) -> tuple[int, Any, dict[str, Any]]:
  """First step, state, and the saved position; {} for a fresh run."""
  if checkpointer.steps():
    restored = checkpointer.restore(experiment.abstract_state)
    print(f"Resuming at step {restored.step}.", file=sys.stderr)
    return restored.step, restored.state, restored.iterator_state
  state = initial_state(experiment)
  return int(state.step), state, {}


def _record(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Writes what it takes to understand, repeat or use the run."""
  if jax.process_index() != 0:
    return
  workdir.mkdir(parents=True, exist_ok=True)
  facts = {
    "python": platform.python_version(),
    "libraries": {n: importlib.metadata.version(n) for n in _LIBRARIES},
    "commit": _commit(),
    "devices": [d.device_kind for d in experiment.mesh.devices.flat],
    "mesh": dict(experiment.mesh.shape),
  }
  _write_json(workdir / "run.json", facts)
  _write_json(workdir / "config.json", experiment.settings.to_json())
  if not (workdir / "tokenizer").exists():
    experiment.data.tokenizer.save(workdir / "tokenizer")


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
  partial.replace(path)


def _commit() -> str | None:
  """The library's git commit, if it runs from a checkout."""
  done = subprocess.run(
    ["git", "describe", "--always", "--dirty", "--abbrev=12"],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout.strip() or None


def _health(experiment: Experiment, workdir: pathlib.Path) -> dict[str, float]:
  """Writes health.json: statistics of the data, and what guessing achieves.

  Returns:
    Accuracy and loss of the unigram baseline on each held-out split.
  """
  data = experiment.data
  dataset = data.dataset()
  rows = min(dataset.rows_per_epoch(0), _AUDITED_BATCHES * data.batch_size)
  size = min(rows, data.batch_size)
  found = audit.audit(
    (dataset.batch(i, size) for i in range(rows // size)), data.tokenizer
  )
  health = data.facts() | {
    "masking_rate": found["masked_rate"],
    "mask_share": found["mask_share"],
    "random_share": found["random_share"],
    "keep_share": found["kept_share"],
    "selected": found["labels_per_batch"] * found["batches"],
    "label_weight_min": found["labels_per_batch_min"],
    "label_weight_mean": found["labels_per_batch"],
    "vocab_size": data.tokenizer.vocab_size,
    "clip_norm": experiment.settings.optim.get("clip_norm"),
    "fill": found["fill"],
  }
  if (masking := data.masking) is not None:
    health |= {
      "expected_masking_rate": masking.rate,
      "expected_mask_share": masking.mask_share,
      "expected_random_share": masking.random_share,
      "expected_keep_share": 1 - masking.mask_share - masking.random_share,
    }
  counts = data.token_counts()
  baseline = {}
  for name, spec in experiment.settings.evals.items():
    if spec["name"] == "objective":
      split = spec.get("split", "validation")
      batches = read_batches(data, split, spec.get("num_batches"), None)
      values = unigram_baseline(counts, batches)
      baseline |= {f"{name}/{key}": value for key, value in values.items()}
      health |= values
  if jax.process_index() == 0:
    _write_json(workdir / "health.json", health)
  return baseline


def _evaluations(
  experiment: Experiment,
  writer: writers.Writer,
  throughput: meters.Throughput,
  bar: progress.Progress,
) -> list[hooks_lib.EvaluationHook]:
  built = []
  for name, (every, evaluator) in experiment.evaluators().items():

    def evaluate(step, state, evaluator=evaluator):
      key = jax.random.fold_in(state.key, step)
      jax.block_until_ready(state)  # steps under way are no part of the pause
      with throughput.pause():
        return evaluator({"params": state.params, **state.extra}, key)

    def write(step, values, name=name):
      writer.write(step, values)
      shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
      bar.note(f"step {step}  {shown}")

    when = hooks_lib.Every(every) if every else hooks_lib.AtSteps(())
    built.append(
      hooks_lib.EvaluationHook(when, evaluate, write, prefix=f"{name}/")
    )
  return built


def _report(experiment: Experiment, workdir: pathlib.Path, state: Any) -> None:
  texts = list(experiment.settings.samples)
  model = loading.from_experiment(experiment, state.params)
  samples = predict.samples(model, texts) if texts else []
  report.write_report(
    workdir,
    reference=experiment.settings.reference_curve or None,
    samples=samples,
  )


_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, as configs/bert.py:tiny.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Two real steps, then leave.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}")
  if _WORKDIR.value is None and not _DRY_RUN.value:
    raise app.UsageError("--workdir is required, except with --dry_run.")
  cli.quiet()
  with cli.clear_errors():
    result = train(_CONFIG.value, _WORKDIR.value or "", dry_run=_DRY_RUN.value)
  for name, value in sorted(result.metrics.items()):
    print(f"{name:32s} {value:.6g}")
  if not _DRY_RUN.value and not result.interrupted:
    print(f"Report: {pathlib.Path(_WORKDIR.value) / 'report' / 'report.md'}")


if __name__ == "__main__":
  app.run(main)
