"""What happens around the steps: when, and what.

The loop calls every hook as `hook(step, state)` before it draws the batch of
step `step`, so `step` is also the number of finished steps and the state is
exactly what a checkpoint must hold. When something runs is an object of its
own, `when(step) -> bool`, separate from what runs.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from absl import logging
from jax.experimental import multihost_utils

from bertjax.checkpoint import Checkpointer

When = Callable[[int], bool]

# Of all guards of this process: a step may come again in the next stage.
_asks = itertools.count()


# -- when --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Every:
  """At multiples of `steps`, 0 excepted."""

  steps: int

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"Every({self.steps}): steps must be at least 1.")

  def __call__(self, step: int) -> bool:
    return step > 0 and step % self.steps == 0


@dataclasses.dataclass(frozen=True)
class AtSteps:
  """At the steps listed."""

  steps: tuple[int, ...]

  def __call__(self, step: int) -> bool:
    return step in self.steps


class Once:
  """The first time that it is asked at `step` or later, also after a resume."""

  def __init__(self, step: int = 0):
    self._step = step
    self._done = False

  def __call__(self, step: int) -> bool:
    due = not self._done and step >= self._step
    self._done = self._done or due
    return due


class AnyOf:
  """When at least one of several is due; each of them is asked."""

  def __init__(self, *whens: When):
    self._whens = whens

  def __call__(self, step: int) -> bool:
    return any([when(step) for when in self._whens])


# -- what --------------------------------------------------------------------


@runtime_checkable
class Hook(Protocol):
  """Something that the loop calls before each step and closes at the end."""

  def __call__(self, step: int, state: Any) -> None: ...

  def close(self) -> None: ...


class EvaluationHook:
  """Evaluates and writes the values under a prefix.

  Attributes:
    latest: values of the last evaluation, with their prefix.
  """

  def __init__(
    self,
    when: When,
    evaluate: Callable[[int, Any], Mapping[str, float]],
    write: Callable[[int, Mapping[str, float]], None],
    *,
    prefix: str = "eval/",
  ):
    """Waits for `when`.

    Args:
      when: when to evaluate.
      evaluate: `(step, state) -> {name: value}`.
      write: where values go, such as `writer.write`.
      prefix: put before each name.
    """
    self._when = when
    self._evaluate = evaluate
    self._write = write
    self._prefix = prefix
    self._evaluated: int | None = None
    self.latest: dict[str, float] = {}

  def __call__(self, step: int, state: Any) -> None:
    if self._when(step):
      self.run(step, state)

  def run(self, step: int, state: Any) -> dict[str, float]:
    """Evaluates now, whatever `when` says, unless it has done so this step."""
    if step == self._evaluated:
      return self.latest
    values = self._evaluate(step, state)
    self._evaluated = step
    self.latest = {self._prefix + k: float(v) for k, v in values.items()}
    self._write(step, self.latest)
    return self.latest

  def close(self) -> None:
    """Nothing is held open."""


class CheckpointHook:
  """Saves the run."""

  def __init__(
    self,
    when: When,
    checkpointer: Checkpointer,
    *,
    iterator_state: Callable[[], Mapping[str, Any]],
    config: Mapping[str, Any],
    metrics: Callable[[int], Mapping[str, float]] = lambda step: {},
    before: Callable[[], None] = lambda: None,
    pause: Callable[[], contextlib.AbstractContextManager] = (
      contextlib.nullcontext
    ),
  ):
    """Waits for `when`.

    Args:
      when: when to save.
      checkpointer: closed with the hook.
      iterator_state: position of the data iterator now.
      config: resolved config.
      metrics: `step -> values`, for the best checkpoint.
      before: called before each save, such as `TrainLogger.flush`; raises if
        the state is not worth saving (a non-finite loss).
      pause: makes the context to save in, such as `Throughput.pause`.
    """
    self._when = when
    self._checkpointer = checkpointer
    self._iterator_state = iterator_state
    self._config = config
    self._metrics = metrics
    self._before = before
    self._pause = pause

  def __call__(self, step: int, state: Any) -> None:
    """Saves when due; raises the error of a background save that failed."""
    self._checkpointer.check()
    if self._when(step):
      self.save(step, state)

  def save(self, step: int, state: Any) -> None:
    """Saves now, whatever `when` says; for the last step and for SIGTERM."""
    self._before()
    with self._pause():
      self._checkpointer.save(
        step,
        state,
        iterator_state=self._iterator_state(),
        config=self._config,
        metrics=self._metrics(step),
      )

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._checkpointer.close()


class ProfilerHook:
  """Traces steps [start, stop) with `jax.profiler` into `logdir`."""

  def __init__(self, logdir: str | os.PathLike, start: int, stop: int):
    if not 0 <= start < stop:
      raise ValueError(
        f"profile: start={start}, stop={stop}; they must satisfy"
        " 0 <= start < stop."
      )
    self._logdir = os.fspath(logdir)
    self._start = start
    self._stop = stop
    self._tracing = False

  def __call__(self, step: int, state: Any) -> None:
    if self._start <= step < self._stop and not self._tracing:
      jax.block_until_ready(state)  # earlier steps stay out of the trace
      jax.profiler.start_trace(self._logdir)
      self._tracing = True
    elif step >= self._stop and self._tracing:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Ends a trace that the end of the run cut short."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      logging.info("Wrote a profile to %s", self._logdir)


# -- around the run ----------------------------------------------------------


class Stopwatch:
  """Seconds of work on a run, over all resumes."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._start = clock()

  def add(self, seconds: float) -> None:
    """Counts the seconds of before a resume."""
    self._start -= seconds

  def elapsed_s(self) -> float:
    return self._clock() - self._start


class PreemptionGuard:
  """Turns SIGTERM and SIGINT into a flag, so that the run can save first.

  A second signal acts at once, as without the guard. The handlers of before
  come back at the end of the block. With several processes JAX passes SIGTERM
  on, so that all of them stop before the same step.
  """

  def __init__(
    self,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
  ):
    self._signals = tuple(signals)
    self._previous: dict[int, Any] = {}
    self._received: int | None = None

  def __enter__(self) -> "PreemptionGuard":
    if threading.current_thread() is not threading.main_thread():
      logging.warning(
        "Not in the main thread: signals end this run without a last save."
      )
      return self
    for number in self._signals:
      if number == signal.SIGTERM and jax.process_count() > 1:
        continue  # `jax.distributed` has a handler of its own
      self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc_info) -> None:
    self._restore()

  @property
  def received(self) -> str | None:
    """Name of the signal that came to this process, such as `SIGTERM`."""
    if self._received is None:
      return None
    return signal.Signals(self._received).name

  def requested(self) -> bool:
    """Whether to stop before this step, for a signal that any process got.

    Every process must ask before each step. No device is waited for: JAX makes
    all of them stop at the ask after the last one that any has made.
    """
    if jax.process_count() == 1:
      return self._received is not None
    return multihost_utils.reached_preemption_sync_point(next(_asks))

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self._received is None:
      self._received = number
      if jax.process_count() > 1:
        os.kill(os.getpid(), signal.SIGTERM)  # the others must hear of it
      return
    self._restore()
    os.kill(os.getpid(), number)

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._previous = {}
