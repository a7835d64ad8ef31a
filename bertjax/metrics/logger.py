"""The loop's `log(step, metrics)`: accumulate, check, write, show."""

from collections.abc import Callable, Mapping

import jax

from bertjax.metrics.accumulator import MetricAccumulator, Sums
from bertjax.metrics.meters import Throughput
from bertjax.metrics.progress import Progress
from bertjax.metrics.writers import Writer


class TrainLogger:
  """Called after every step with metrics that are still on the device.

  Reads them when `when` says so, and only then waits for the device. The
  metric `tokens`, if the step returns it as (real tokens, 1), gives the rates
  and the total.

  Attributes:
    tokens_seen: real tokens up to the last reading, over all resumes.
    latest: values of the last reading.
  """

  def __init__(
    self,
    when: Callable[[int], bool],
    writer: Writer,
    *,
    slots_per_step: int,
    throughput: Throughput,
    progress: Progress,
    accumulator: MetricAccumulator | None = None,
    tokens_seen: float = 0,
    latest: Mapping[str, float] | None = None,
  ):
    """Silent until the first step.

    Args:
      when: asked with the number of finished steps.
      writer: where values go.
      slots_per_step: tokens and padding of a global batch.
      throughput: rates; started here after the first step.
      progress: what a person sees.
      accumulator: by default one that refuses a non-finite loss or gradient.
      tokens_seen: of the restored run.
      latest: values of its last reading.
    """
    self._when = when
    self._writer = writer
    self._slots_per_step = slots_per_step
    self._throughput = throughput
    self._progress = progress
    self._sums = accumulator or MetricAccumulator()
    self._untimed = 0
    self.tokens_seen = tokens_seen
    self.latest = dict(latest or {})

  def __call__(self, step: int, metrics: Sums) -> None:
    """Takes the metrics of the step with index `step` (0 is the first).

    Raises:
      NonFiniteError: see `MetricAccumulator.read`.
    """
    self._sums.add(step, metrics)
    if not self._throughput.running:
      jax.block_until_ready(metrics)  # the first step compiles
      self._throughput.start()
      self._untimed = 1
    self._progress.advance(step + 1)
    if self._when(step + 1):
      self.flush()

  def flush(self) -> None:
    """Reads and writes what has gathered since the last reading, if anything.

    Raises:
      NonFiniteError: see `MetricAccumulator.read`.
    """
    steps = self._sums.steps
    if not steps:
      return
    step = self._sums.last + 1
    values = self._sums.read()
    timed, self._untimed = steps - self._untimed, 0
    tokens = values.pop("tokens", float(self._slots_per_step))
    self.tokens_seen += tokens * steps
    values["tokens_seen"] = self.tokens_seen
    values.update(
      self._throughput.read(timed, tokens * timed, self._slots_per_step * timed)
    )
    self.latest = values
    self._writer.write(step, values)
    self._progress.report(step, values)
