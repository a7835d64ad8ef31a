"""Figures of runs: curves with their spread, levels with error bars."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.arms import Run, Stat


def panels(count: int, height: float = 3.2) -> tuple[Figure, Sequence[Axes]]:
  """A figure of `count` panels side by side, which needs no display."""
  figure = Figure(figsize=(4.2 * count, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure, list(figure.subplots(1, count, squeeze=False)[0])


def curve(
  axes: Axes,
  runs: Iterable[Run],
  metric: str,
  label: str,
  at: Callable[[int], float] | None = None,
) -> None:
  """Mean over runs of a column of metrics.csv, and a band of least to most.

  The runs have values at the same steps.

  Args:
    axes: to draw into.
    runs: seeds of one curve.
    metric: the column.
    label: of the curve.
    at: where on the x axis a step is; by default at its number.
  """
  found = [run.curve(metric) for run in runs]
  steps = found[0][0]
  x = steps if at is None else [at(step) for step in steps]
  values = np.array([values for _, values in found])
  (line,) = axes.plot(x, values.mean(0), label=label)
  axes.fill_between(
    x, values.min(0), values.max(0), color=line.get_color(), alpha=0.2
  )
  if at is None:
    axes.set_xlabel("step")


def levels(
  axes: Axes, x: Sequence[Any], stats: Sequence[Stat], label: str
) -> None:
  """Means at `x` with bars of one standard deviation."""
  spread = [s.spread if len(s.values) > 1 else 0.0 for s in stats]
  axes.errorbar(
    x, [s.mean for s in stats], spread, label=label, marker="o", capsize=3
  )
