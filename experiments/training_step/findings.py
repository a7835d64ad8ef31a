"""What the measurements say about the training step."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from bertjax.hardware import CHIPS
from experiments import plots
from experiments.outcome import Claim, Outcome

PAPER = "BERT (Devlin et al. 2018, arXiv:1810.04805)"

# Parts of results.csv.
WATERFALL, LOOPS = "waterfall", "loop"
SHAPES, FILL = "shape", "filled"

Row = Mapping[str, Any]

_CHIP = CHIPS["v5e"]
_GIB = 2**30
_GOAL_MFU = 0.66


def outcome(rows: Sequence[Row]) -> Outcome:
  """Claims, tables and figure of all measurements."""
  return Outcome(
    paper=PAPER,
    claims=[
      *([_faster(rows)] if len(_fitting(rows, WATERFALL)) > 1 else []),
      *([_goal(rows)] if _select(rows, LOOPS) else []),
      *([_larger(rows), _others(rows)] if _select(rows, SHAPES) else []),
      _matrix_units(rows),
      *([_packing(rows)] if _select(rows, FILL) else []),
    ],
    counts={"measurements": len(rows)},
    rows=rows,
    summary=_summary(rows),
    figure=_figure(rows),
  )


def _select(rows: Sequence[Row], part: str) -> list[Row]:
  return [row for row in rows if row["part"] == part]


def _fitting(rows: Sequence[Row], part: str) -> list[Row]:
  return [row for row in _select(rows, part) if row["fits"]]


def mfu(row: Row, rows: Sequence[Row]) -> float:
  """Share of the peak that the model's own FLOPs are.

  Logits that nobody reads are no part of them: all of the waterfall count
  those of its last step.
  """
  if row.get("part") == WATERFALL:
    flops = _fitting(rows, WATERFALL)[-1]["model_flops"]
  else:
    flops = row["model_flops"]
  return flops / row["cycles"] / _CHIP.flops_per_cycle


def _faster(rows: Sequence[Row]) -> Claim:
  steps = _fitting(rows, WATERFALL)
  gains = [
    f"{after['step']} {before['cycles'] / after['cycles']:.2f}x"
    for before, after in itertools.pairwise(steps)
  ]
  whole = steps[0]["cycles"] / steps[-1]["cycles"]
  return Claim(
    "Every measure makes the step faster",
    "not a paper's",
    f"{', '.join(gains)}; together {whole:.2f}x",
    [a["cycles"] > b["cycles"] for a, b in itertools.pairwise(steps)],
  )


def _goal(rows: Sequence[Row]) -> Claim:
  *_, scanned, best = _fitting(rows, WATERFALL)
  found = [
    f"{row['step']}: {row['tokens_per_s']:,.0f}"
    for row in (scanned, *_fitting(rows, LOOPS), best)
  ]
  return Claim(
    "BERT-large, 8 x 512: tokens/s on a v5e",
    "goal: 60,000",
    "; ".join(found),
    [row["tokens_per_s"] >= 60_000 for row in (scanned, best)],
  )


def _shown(rows: Sequence[Row], every: Sequence[Row]) -> str:
  return "; ".join(
    f"{row['step']}: {row['tokens_per_s']:,.0f} ({mfu(row, every):.0%} MFU)"
    for row in rows
  )


def _larger(rows: Sequence[Row]) -> Claim:
  found, _ = _shapes(rows)
  return Claim(
    "BERT-large in a larger batch: tokens/s on a v5e",
    f"goal: 66,000, {_GOAL_MFU:.0%} MFU",
    _shown(found, rows),
    [
      row["tokens_per_s"] >= 66_000 and mfu(row, rows) >= _GOAL_MFU
      for row in found
    ],
  )


def _others(rows: Sequence[Row]) -> Claim:
  _, found = _shapes(rows)
  return Claim(
    "Rows of 128 tokens and BERT-base: tokens/s on a v5e",
    f"goal: {_GOAL_MFU:.0%} MFU",
    _shown(found, rows),
    [mfu(row, rows) >= _GOAL_MFU for row in found],
  )


def _shapes(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
  """(those of the waterfall's model and length, others)."""
  base = _select(rows, WATERFALL)[-1]
  found: tuple[list[Row], list[Row]] = ([], [])
  for row in _fitting(rows, SHAPES):
    other = any(row[name] != base[name] for name in ("variant", "seq_len"))
    found[other].append(row)
  return found


def _matrix_units(rows: Sequence[Row]) -> Claim:
  """How much of `bertjax.plan` is more than bundles and bytes."""
  shares = [
    1 - row["plain_cycles"] / row["cycles"] for row in rows if row.get("fits")
  ]
  return Claim(
    "A plan hardly leans on what bertjax knows of matrix units",
    "goal: 5% of its cycles",
    f"without that it has {min(shares):.1%} to {max(shares):.1%} fewer cycles",
    [share <= 0.05 for share in shares],
  )


def _packing(rows: Sequence[Row]) -> Claim:
  slots = _fitting(rows, WATERFALL)[-1]["tokens_per_s"]
  shown = [
    f"{row['step']}: {row['filled']:.1%} of the slots, "
    f"{row['filled'] * slots:,.0f} tokens/s"
    for row in _select(rows, FILL)
  ]
  return Claim(
    "Packed rows waste hardly a slot: real tokens only",
    "not a paper's",
    "; ".join(shown),
    [
      row["filled"] > 0.98
      for row in _select(rows, FILL)
      if row["step"] == "packed"
    ],
  )


def _line(label: str, figures: Row, rows: Sequence[Row]) -> dict[str, Any]:
  if "cycles" not in figures:
    needed = figures["needed_bytes"]
    return {
      "step": label,
      "GiB": "does not fit"
      if needed is None
      else f"{needed / _GIB:.2f} (does not fit)",
    }
  return {
    "step": label,
    "Mcycles": f"{figures['cycles'] / 1e6:.2f}",
    "tokens/s": f"{figures['tokens_per_s']:,.0f}",
    "MFU": f"{mfu(figures, rows):.1%}",
    "HBM GB": f"{figures['hbm_bytes'] / 1e9:.1f}",
    "GiB": f"{figures['needed_bytes'] / _GIB:.2f}",
    "compile s": f"{figures['compile_s']:.0f}",
  }


def _summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
  steps = _select(rows, WATERFALL)
  lines = [
    _line(row["step"] if row is steps[0] else f"+ {row['step']}", row, rows)
    for row in steps
  ]
  for part in (LOOPS, SHAPES):
    lines += [_line(row["step"], row, rows) for row in _select(rows, part)]
  return lines


def _figure(rows: Sequence[Row]) -> Figure:
  """A bar a step; what a measure took away hangs beside the one before."""
  steps = _fitting(rows, WATERFALL)
  figure, (axes,) = plots.panels(1, height=4.0)
  figure.set_figwidth(8)
  before = None
  for row in steps:
    cycles = row["cycles"] / 1e6
    if before is None:
      axes.bar(row["step"], cycles, color="gray")
    else:
      color = "tab:green" if cycles <= before else "tab:red"
      axes.bar(row["step"], before - cycles, bottom=cycles, color=color)
    axes.annotate(f"{cycles:.1f}", (row["step"], cycles), ha="center", va="top")
    before = cycles
  axes.bar("all", before, color="gray")
  axes.set_ylabel("Mcycles a step")
  for label in axes.get_xticklabels():
    label.set(rotation=30, horizontalalignment="right")
  return figure
