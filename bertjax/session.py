"""A run under way: where it starts, what happens around its steps, its end."""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from bertjax import hooks as hooks_lib
from bertjax import records, registry
from bertjax.checkpoint import Checkpointer
from bertjax.experiment import Experiment
from bertjax.handover import initial_state
from bertjax.metrics import logger, meters, progress, writers
from bertjax.parallel.sharding import put_batch

INTERRUPTED = "signal"


class Session:
  """Everything that a run holds open, from its first step to its last.

  Attributes:
    state: the train state that the run starts from.
    start: optimizer steps already taken.
    log: for the loop.
    hooks: for the loop: evaluations, saving, profiler.
  """

  def __init__(
    self,
    experiment: Experiment,
    workdir: pathlib.Path,
    stack: contextlib.ExitStack,
    watch: hooks_lib.Stopwatch,
    *,
    limit: int | None = None,
  ):
    """Restores the newest checkpoint, or starts afresh, and opens the outputs.

    Args:
      experiment: the parts.
      workdir: created if needed.
      stack: closes what is opened here.
      watch: runs since this process began to work for the run.
      limit: take at most so many steps, whatever the config says.

    Raises:
      ValueError: the workdir holds a run of another model or other data.
    """
    settings = experiment.settings
    self._experiment = experiment
    self._workdir = workdir
    self._checkpointer = registry.call(
      functools.partial(Checkpointer, workdir), settings.keep, "keep"
    )
    self._batches = experiment.data.dataset().iterator(
      experiment.data.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    stack.callback(self._batches.close)
    position = self._restore()
    self._last = settings.stop["steps"]
    if limit is not None:
      self._last = min(self._last, self.start + limit)
    self._watch = watch
    watch.add(position.get("elapsed_s", 0.0))
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
    )
    self._evaluations = [
      self._evaluation(name, every, evaluator)
      for name, (every, evaluator) in experiment.evaluators().items()
    ]
    self._saving = self._checkpoint_hook()
    self.hooks = [*self._evaluations, self._saving, *self._profiler()]
    for hook in self.hooks:
      stack.callback(hook.close)
    self._guard = stack.enter_context(hooks_lib.PreemptionGuard())

  def batches(self) -> Iterator[dict[str, jax.Array]]:
    """The training batches from `start` on, as global arrays."""
    return (put_batch(b, self._experiment.mesh) for b in self._batches)

  def stop(self, step: int) -> str | None:
    """Why to stop before `step`, or None."""
    if self._guard.requested():
      return INTERRUPTED
    if step >= self._last:
      return f"{step} steps are done"
    return self._experiment.stop(
      step, self.log.tokens_seen, self._watch.elapsed_s(), self.latest()
    )

  def latest(self) -> dict[str, float]:
    """The last training and evaluation values."""
    values = dict(self.log.latest)
    for hook in self._evaluations:
      values |= hook.latest
    return values

  def finish(self, state: Any, step: int, reason: str) -> str:
    """Evaluates (unless a signal ended the run), saves, says why it ended."""
    self.log.flush()
    if reason == INTERRUPTED:
      reason = f"signal {self._guard.received or 'on another process'}"
    else:
      for hook in self._evaluations:
        hook.run(step, state)
    self._saving.save(step, state)
    self._bar.note(f"Stopped at step {step}: {reason}.")
    return reason

  def _restore(self) -> dict[str, Any]:
    """Sets `start` and `state`; the saved position, {} for a fresh run."""
    experiment = self._experiment
    if not self._checkpointer.steps():
      self.state = initial_state(experiment)
      self.start = int(self.state.step)
      return {}
    restored = self._checkpointer.restore(experiment.abstract_state)
    self.start, self.state = restored.step, restored.state
    print(f"Resuming at step {self.start}.", file=sys.stderr)
    for line in records.config_changes(experiment, self._workdir):
      print(f"Changed since the run began: {line}", file=sys.stderr)
    position = restored.iterator_state
    self._batches.set_state(position["data"])
    return position

  def _evaluation(self, name, every, evaluator) -> hooks_lib.EvaluationHook:
    def evaluate(step, state):
      key = jax.random.fold_in(state.key, step)
      jax.block_until_ready(state)  # steps under way are no part of the pause
      with self._throughput.pause():
        return evaluator({"params": state.params, **state.extra}, key)

    def write(step, values):
      self._writer.write(step, values)
      shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
      self._bar.note(f"step {step}  {shown}")

    when = hooks_lib.Every(every) if every else hooks_lib.AtSteps(())
    return hooks_lib.EvaluationHook(when, evaluate, write, prefix=f"{name}/")

  def _checkpoint_hook(self) -> hooks_lib.CheckpointHook:
    settings = self._experiment.settings
    return hooks_lib.CheckpointHook(
      hooks_lib.Every(settings.every["checkpoint"]),
      self._checkpointer,
      iterator_state=lambda: {
        "data": self._batches.get_state(),
        "tokens_seen": self.log.tokens_seen,
        "elapsed_s": self._watch.elapsed_s(),
      },
      config=settings.to_json(),
      metrics=self.latest,
      # A resumed run has the same rows over the same windows of steps, and a
      # loss that is not finite is found before it is saved.
      before=self.log.flush,
    )

  def _profiler(self) -> list[hooks_lib.ProfilerHook]:
    spec = self._experiment.settings.profile
    if spec is None:
      return []
    build = functools.partial(hooks_lib.ProfilerHook, self._workdir / "profile")
    return [registry.call(build, spec, "profile")]
