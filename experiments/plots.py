"""Figures of runs: curves with their spread, levels with error bars."""

from collections.abc import Iterable, Sequence
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


def curve(axes: Axes, runs: Iterable[Run], metric: str, label: str) -> None:
  """Mean over runs of a column of metrics.csv, and a band of least to most.

  The runs have values at the same steps.
  """
  found = [run.curve(metric) for run in runs]
  steps = found[0][0]
  values = np.array([values for _, values in found])
  (line,) = axes.plot(steps, values.mean(0), label=label)
  axes.fill_between(
    steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2
  )
  axes.set_xlabel("step")


def levels(
  axes: Axes, x: Sequence[Any], stats: Sequence[Stat], label: str
) -> None:
  """Means at `x` with bars of one standard deviation."""
  spread = [s.spread if len(s.values) > 1 else 0.0 for s in stats]
  axes.errorbar(
    x, [s.mean for s in stats], spread, label=label, marker="o", capsize=3
  )
