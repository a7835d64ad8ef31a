"""A run under way: where it starts, what happens around its steps, its end."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from bertjax import hooks as hooks_lib
from bertjax import records, registry, stopping
from bertjax.checkpoint import Checkpointer
from bertjax.experiment import Experiment
from bertjax.handover import initial_state
from bertjax.metrics import logger, meters, progress, writers
from bertjax.optim import adapt
from bertjax.parallel import agreement, hosts
from bertjax.parallel.sharding import feed, put_batch
from bertjax.requests import Requests

INTERRUPTED = "signal"


class Session:
  """Everything that a run holds open, from its first step to its last.

  Attributes:
    state: the train state that the run starts from.
    start: optimizer steps already taken.
    log: for the loop.
    hooks: for the loop: evaluations, profiler.
    saving: for the loop, too.
    amend: for the loop: what files in the workdir ask for.
  """

  def __init__(
    self,
    experiment: Experiment,
    workdir: pathlib.Path,
    stack: contextlib.ExitStack,
    watch: hooks_lib.Stopwatch,
    *,
    limit: int | None = None,
    root: pathlib.Path | None = None,
  ):
    """Restores the newest checkpoint, or starts afresh, and opens the outputs.

    Args:
      experiment: the parts.
      workdir: created if needed.
      stack: closes what is opened here.
      watch: runs since this process began to work for the run.
      limit: take at most so many steps, whatever the config says.
      root: workdir of the stages or the grid that the run is part of.

    Raises:
      ValueError: the workdir holds a run of another model or optimizer, or of
        other data.
    """
    settings = experiment.settings
    self._experiment = experiment
    self._workdir = workdir
    self._checkpointer = registry.call(
      functools.partial(Checkpointer, workdir), settings.keep, "keep"
    )
    index, count = feed(experiment.mesh)
    self._batches = experiment.data.dataset().iterator(
      experiment.data.batch_size, process_index=index, process_count=count
    )
    stack.callback(self._batches.close)
    position = self._restore()
    self._history = {
      step: values
      for step, values in position.get("evaluations", ())
      if step <= self.start
    }
    self._last = settings.stop["steps"]
    if limit is not None:
      self._last = min(self._last, self.start + limit)
    self._watch = watch
    watch.add(position.get("elapsed_s", 0.0))
    self._resumed = bool(position)
    if not self._resumed:
      records.record(experiment, workdir)
    self._writer = writers.open_writers(
      workdir, settings.writers, resume_from=self.start
    )
    stack.callback(self._writer.close)
    self._bar = progress.Progress(self._last, start=self.start)
    stack.callback(self._bar.close)
    self._throughput = meters.Throughput(
      flops_per_token=experiment.flops_per_token(), peak=meters.peak_flops()
    )
    self.log = logger.TrainLogger(
      hooks_lib.Every(settings.every["log"]),
      self._writer,
      slots_per_step=experiment.data.dataset().tokens_per_batch(
        experiment.data.batch_size
      ),
      throughput=self._throughput,
      progress=self._bar,
      tokens_seen=position.get("tokens_seen", 0),
      latest=position.get("training", {}),
    )
    self._best = settings.keep.get("best_metric")
    self._evaluations = {
      self._evaluation(name, every, evaluator): every
      for name, (every, evaluator) in experiment.evaluators().items()
    }
    self.saving = self._checkpoint_hook()
    self.hooks = [*self._evaluations, *self._profiler()]
    for hook in (self.saving, *self.hooks):
      stack.callback(hook.close)
    self.amend = Requests(
      hooks_lib.Every(settings.every["log"]),
      workdir,
      self.state.opt_state,
      root,
    )
    self._guard = stack.enter_context(hooks_lib.PreemptionGuard())

  def batches(self) -> Iterator[dict[str, jax.Array]]:
    """The training batches from `start` on, as global arrays."""
    # Not before: a finished run that is started again was not made with this.
    if self._resumed:
      records.record(self._experiment, self._workdir)
    for batch in self._batches:
      yield put_batch(batch, self._experiment.mesh)

  def stop(self, step: int) -> str | None:
    """Why to stop before `step`, or None."""
    if self._guard.requested():
      return INTERRUPTED
    if step >= self._last:
      return f"{step} steps are done"
    return self._experiment.stop(
      step,
      self.log.tokens_seen,
      self._watch.elapsed_s(),
      self.latest(),
      sorted(self._history.items()),
    )

  def latest(self) -> dict[str, float]:
    """The last training and evaluation values."""
    values = dict(self.log.latest)
    for hook in self._evaluations:
      values |= hook.latest
    return values

  def finish(self, state: Any, step: int, reason: str) -> tuple[Any, str]:
    """Evaluates, saves, says why the run ended; a signal leaves less time.

    Evaluators that run at the end only see the state that was selected.

    Returns:
      That state: the one best by `keep.best_metric`, or else the last; and why
      the run ended.

    Raises:
      ValueError: `keep` or `stop` name a metric that is not reported; the
        state is saved.
    """
    self.log.flush()
    if reason == INTERRUPTED:
      reason = f"signal {self._guard.received or 'on another process'}"
      self.saving.save(step, state)
      self._bar.note(f"Stopped at step {step}: {reason}.")
      return state, reason
    paced = [hook for hook, every in self._evaluations.items() if every]
    for hook in paced:
      hook.run(step, state)
    if not self._best:
      for hook in self._evaluations:
        hook.run(step, state)
    self.saving.save(step, state)
    self._bar.note(f"Stopped at step {step}: {reason}.")
    self._refuse_unreported()
    if self._best:
      state = self._select(step, state)
      for hook in self._evaluations:
        if hook not in paced:
          hook.run(step, state)
    return state, reason

  def _refuse_unreported(self) -> None:
    """Refuses names of metrics; a dry run ends before others ask for them."""
    settings = self._experiment.settings
    named = {
      f"stop.{rule}.metric": (settings.stop.get(rule) or {}).get("metric")
      for rule in stopping.UNSURE
    }
    named["keep.best_metric"] = self._best
    for field, metric in named.items():
      if metric:
        stopping.refuse_unreported(metric, self.latest(), settings.evals, field)

  def _select(self, step: int, state: Any) -> Any:
    """The state of the best checkpoint, with its values in `latest`."""
    self._checkpointer.wait()
    best = self._checkpointer.best_step()
    if best is None or best == step:
      return state
    values = self._history.get(best, {})
    for hook in self._evaluations:
      # What was not measured at that step is not told of it.
      hook.latest = {k: values[k] for k in hook.latest if k in values}
    score = values.get(self._best, math.nan)
    self._bar.note(f"Selected step {best}, {self._best} {score:.4g}.")
    abstract = self._experiment.abstract_state
    return self._checkpointer.restore(abstract, best, adapt=adapt).state

  def _restore(self) -> dict[str, Any]:
    """Sets `start` and `state`; the saved position, {} for a fresh run."""
    experiment = self._experiment
    if not agreement.told(len(self._checkpointer.steps())):
      self.state = initial_state(experiment)
      self.start = int(self.state.step)
      return {}
    records.refuse_other_optimizer(experiment, self._workdir)
    restored = self._checkpointer.restore(
      experiment.abstract_state, adapt=adapt
    )
    self.start, state = restored.step, restored.state
    resumed = experiment.optimizer.resumed(state.opt_state)
    self.state = state.replace(opt_state=resumed)
    hosts.say(f"Resuming at step {self.start}.")
    for line in records.config_changes(experiment, self._workdir):
      hosts.say(f"Changed since the last start: {line}")
    position = restored.iterator_state
    self._batches.set_state(position["data"])
    return position

  def _evaluation(self, name, every, evaluator) -> hooks_lib.EvaluationHook:
    def evaluate(step, state):
      key = jax.random.fold_in(state.key, step)
      jax.block_until_ready(state)  # steps under way are no part of the pause
      with self._throughput.pause():
        return evaluator({"params": state.params, **state.extra}, key)

    prefix = f"{name}/"

    def write(step, values):
      self._history[step] = {**self._history.get(step, {}), **values}
      self._writer.write(step, values)
      # Values by class, name/class, are for the files.
      shown = "  ".join(
        f"{k} {v:.4g}"
        for k, v in values.items()
        if "/" not in k.removeprefix(prefix)
      )
      self._bar.note(f"step {step}  {shown}")

    when = hooks_lib.Every(every) if every else hooks_lib.AtSteps(())
    hook = hooks_lib.EvaluationHook(when, evaluate, write, prefix=prefix)
    for _, values in sorted(self._history.items()):
      mine = {k: v for k, v in values.items() if k.startswith(prefix)}
      hook.latest = mine or hook.latest
    return hook

  def _checkpoint_hook(self) -> hooks_lib.CheckpointHook:
    settings = self._experiment.settings
    due = hooks_lib.AnyOf(
      hooks_lib.Every(settings.every["checkpoint"]), self._improved
    )
    return hooks_lib.CheckpointHook(
      due,
      self._checkpointer,
      iterator_state=lambda: {
        "data": self._batches.get_state(),
        "tokens_seen": self.log.tokens_seen,
        "elapsed_s": self._watch.elapsed_s(),
        "training": self.log.latest,
        "evaluations": sorted(self._history.items()),
      },
      config=settings.to_json(),
      metrics=self._measured,
      # A resumed run has the same rows over the same windows of steps, and a
      # loss that is not finite is found before it is saved.
      before=self.log.flush,
      pause=self._throughput.pause,
    )

  def _measured(self, step: int) -> dict[str, float]:
    """Training values, and those of the evaluations of this very step."""
    return {**self.log.latest, **self._history.get(step, {})}

  def _improved(self, step: int) -> bool:
    """Whether the metric of `keep.best_metric` was never better than here."""
    values = self._history.get(step, {})
    if not self._best or not values:
      return False
    settings = self._experiment.settings
    stopping.refuse_unreported(
      self._best, values, settings.evals, "keep.best_metric"
    )
    if self._best not in values:
      return False
    mode = settings.keep.get("best_mode", "max")
    sign = stopping.sign_of(mode, "keep.best_mode")
    earlier = [
      stopping.score(v[self._best], sign)
      for s, v in self._history.items()
      if s < step and self._best in v
    ]
    now = stopping.score(values[self._best], sign)
    return now > max(earlier, default=-math.inf)

  def _profiler(self) -> list[hooks_lib.ProfilerHook]:
    spec = self._experiment.settings.profile
    if spec is None:
      return []
    build = functools.partial(hooks_lib.ProfilerHook, self._workdir / "profile")
    return [registry.call(build, spec, "profile")]
