"""Metrics stay on the device as (sum, weight) until somebody reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Sums = Mapping[str, tuple[jax.Array, jax.Array]]

_add = jax.jit(lambda a, b: jax.tree.map(lambda x, y: x + y, a, b))


class NonFiniteError(FloatingPointError):
  """The loss or the gradient is NaN or infinite."""


class MetricAccumulator:
  """Adds (sum, weight) pairs over steps; divides once, when read.

  A mean of means would be wrong: masked rows carry different weights.
  """

  def __init__(self, finite: Sequence[str] = ("loss", "grad_norm")):
    """Empty.

    Args:
      finite: metrics in which NaN or infinity ends the run.
    """
    self._finite = tuple(finite)
    self._sums: Sums | None = None
    self._first = self.last = 0
    self.steps = 0

  def add(self, step: int, metrics: Sums) -> None:
    """Adds the metrics of optimizer step `step`, without waiting for them.

    Raises:
      ValueError: the names differ from those of the step before.
    """
    if self._sums is None:
      self._sums, self._first = dict(metrics), step
    elif set(metrics) != set(self._sums):
      different = sorted(set(metrics) ^ set(self._sums))
      raise ValueError(
        f"metrics: {', '.join(different)} not in both step {self.last} and"
        f" step {step}; a train step returns the same names every time."
      )
    else:
      self._sums = _add(self._sums, dict(metrics))
    self.last = step
    self.steps += 1

  def read(self) -> dict[str, float]:
    """One fetch of everything; empties the accumulator.

    A metric whose weight is 0 is left out.

    Raises:
      NonFiniteError: naming the metric and the steps since the last read.
    """
    if self._sums is None:
      return {}
    sums = jax.device_get(self._sums)
    self._refuse(sums)
    self._sums, self.steps = None, 0
    return {
      name: float(np.float64(total) / np.float64(weight))
      for name, (total, weight) in sums.items()
      if weight != 0
    }

  def _refuse(self, sums: Mapping[str, tuple[Any, Any]]) -> None:
    for name in self._finite:
      if name in sums and not np.isfinite(sums[name][0]):
        raise NonFiniteError(
          f"{name} is {float(sums[name][0])} somewhere in steps"
          f" {self._first} to {self.last}. Checkpoints saved before are"
          " untouched. Lower optim.learning_rate, lengthen the warm-up, or set"
          " every.log=1 to find the step."
        )
