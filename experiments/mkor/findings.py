"""What runs and costs say about MKOR's claims."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments import arms, plots
from experiments.outcome import Claim, Outcome

PAPER = "MKOR (Mozaffari et al. 2023, arXiv:2306.01685)"

LAMB, MKOR, EXACT = "LAMB", "MKOR, reference", "MKOR, exact"
HYBRID, KFAC, EVA, SNGD = "MKOR-H", "K-FAC", "Eva", "SNGD"

_LOSS = "heldout/mlm_loss"
# Nats by which a loss may exceed another and still count as no worse.
TOLERANCE = 0.02
Rows = Sequence[Mapping[str, Any]]


def outcome(runs: Sequence[arms.Run], layers: Rows) -> Outcome:
  """Claims, tables and figure.

  Args:
    runs: finished, by factor "arm".
    layers: rows of `costs.layer`, by "arm", "width" and "tokens".
  """
  reached = {(r.factors["arm"], r.seed): steps_to(r, runs) for r in runs}
  rows = [
    run.row([_LOSS, "loss"])
    | {"steps to LAMB's loss": _shown(reached[run.factors["arm"], run.seed])}
    for run in runs
  ]
  published = {
    MKOR: "1,000 steps to LAMB's 1,536 (BERT-large, phase 2)",
    EXACT: "(the paper has one rule)",
    KFAC: "KAISA: 1,000 steps",
    EVA: "1,000 steps",
    SNGD: "(not in the table of BERT)",
  }
  found = {run.factors["arm"] for run in runs}
  return Outcome(
    paper=PAPER,
    claims=[
      *(
        _fewer(runs, reached, arm, text)
        for arm, text in published.items()
        if arm in found
      ),
      _hybrid(runs),
      _flat(layers),
      _cheaper(layers),
      _smaller(layers),
    ],
    counts={"runs": len(runs), "measurements": len(layers)},
    rows=[*rows, *layers],
    summary=_summary(runs, reached),
    figure=_figure(runs, layers),
  )


def steps_to(run: arms.Run, runs: Sequence[arms.Run]) -> float | None:
  """Steps until a run's held-out loss is LAMB's last one, of the same seed.

  Interpolated between looks; None if it never is.
  """
  (peer,) = arms.select(runs, arm=LAMB, seed=run.seed)
  target = peer.metrics[_LOSS]
  steps, losses = run.curve(_LOSS)
  for i, loss in enumerate(losses):
    if loss <= target:
      if i == 0:
        return float(steps[0])
      share = (losses[i - 1] - target) / (losses[i - 1] - loss)
      return steps[i - 1] + share * (steps[i] - steps[i - 1])
  return None


def _shown(steps: float | None) -> str:
  return "never" if steps is None else f"{steps:.0f}"


def _last(runs: Sequence[arms.Run]) -> int:
  return runs[0].curve(_LOSS)[0][-1]


def _fewer(runs, reached, arm: str, published: str) -> Claim:
  seeds = [run.seed for run in arms.select(runs, arm=arm)]
  found = [reached[arm, seed] for seed in seeds]
  gap = arms.gains(runs, _LOSS, "arm", arm, LAMB)
  steps = ", ".join(_shown(value) for value in found)
  return Claim(
    f"LAMB behind {arm} needs fewer steps to the loss of LAMB alone",
    published,
    f"{steps} of {_last(runs)} steps (by seed); held-out loss at the end"
    f" {gap:+.3f} above LAMB",
    [value is not None and value < _last(runs) for value in found],
  )


def _hybrid(runs) -> Claim:
  gaps = []
  for run in arms.select(runs, arm=HYBRID):
    modes = [
      arms.stat(runs, _LOSS, arm=arm, seed=run.seed).mean
      for arm in (LAMB, MKOR)
    ]
    gaps.append(run.metrics[_LOSS] - min(modes))
  switched = ", ".join(
    _shown(_switch_step(run)) for run in arms.select(runs, arm=HYBRID)
  )
  return Claim(
    "MKOR-H is no worse than the better of MKOR and LAMB (within"
    f" {TOLERANCE} nats)",
    "F1 90.64 after 600 steps, MKOR 90.50 after 1,000",
    f"held-out loss {arms.Stat(tuple(gaps)):+.3f} above the better one;"
    f" switched by step {switched}",
    [gap < TOLERANCE for gap in gaps],
  )


def _switch_step(run: arms.Run) -> float | None:
  """The first step logged as wholly first-order."""
  steps, on = run.curve("second_order")
  return next((s for s, value in zip(steps, on) if value < 0.5), None)


def _of(layers: Rows, arm: str, width: int, tokens: int) -> Mapping[str, Any]:
  (row,) = [
    row
    for row in layers
    if (row["arm"], row["width"], row["tokens"]) == (arm, width, tokens)
  ]
  return row


def _extremes(layers: Rows, key: str) -> tuple[int, int]:
  values = [row[key] for row in layers]
  return min(values), max(values)


def _flat(layers: Rows) -> Claim:
  few, many = _extremes(layers, "tokens")
  _, width = _extremes(layers, "width")
  ratios = {
    arm: _of(layers, arm, width, many)["refresh ms"]
    / _of(layers, arm, width, few)["refresh ms"]
    for arm in ("MKOR", "SNGD", "HyLo")
  }
  return Claim(
    f"MKOR's refresh does not depend on the batch: {many} tokens cost less than"
    f" twice what {few} do",
    "O(d^2) against HyLo's O(b^3)",
    f"width {width}: {ratios['MKOR']:.2f}x (SNGD {ratios['SNGD']:.0f}x,"
    f" HyLo {ratios['HyLo']:.0f}x)",
    [ratios["MKOR"] < 2],
  )


def _cheaper(layers: Rows) -> Claim:
  _, tokens = _extremes(layers, "tokens")
  ratios = []
  for width in sorted({row["width"] for row in layers}):
    kfac, mkor = (
      _of(layers, arm, width, tokens)["refresh ms"]
      for arm in ("K-FAC, inverse", "MKOR")
    )
    ratios.append((width, kfac / mkor))
  shown = ", ".join(f"{ratio:.0f}x at {width}" for width, ratio in ratios)
  grows = all(a < b for (_, a), (_, b) in itertools.pairwise(ratios))
  return Claim(
    "MKOR's refresh is far cheaper than K-FAC's inverses (4x), the more so the"
    " wider a layer is",
    "O(d^2) against O(d^3)",
    f"{shown}",
    [ratios[-1][1] > 4, grows],
  )


def _smaller(layers: Rows) -> Claim:
  _, tokens = _extremes(layers, "tokens")
  _, width = _extremes(layers, "width")
  kfac, mkor = (_of(layers, arm, width, tokens) for arm in ("K-FAC", "MKOR"))
  state, sent = (kfac[key] / mkor[key] for key in ("state bytes", "sent bytes"))
  return Claim(
    "MKOR keeps at most half of what K-FAC keeps and sends two vectors of half"
    " precision per layer",
    "2(d_i + d_o) bytes against O(d^2)",
    f"width {width}: state 1/{state:.1f}, {mkor['sent bytes']:.0f} bytes sent a"
    f" refresh instead of {kfac['sent bytes'] / 1e6:.1f} MB",
    [state >= 2, mkor["sent bytes"] == 4 * width, sent > 100],
  )


def _summary(runs, reached) -> list[dict[str, Any]]:
  rows = []
  for row in arms.summary(runs, {"held-out loss": _LOSS}):
    seeds = [run.seed for run in arms.select(runs, arm=row["arm"])]
    row["steps to LAMB's loss"] = ", ".join(
      _shown(reached[row["arm"], seed]) for seed in seeds
    )
    rows.append(row)
  return rows


def _figure(runs: Sequence[arms.Run], layers: Rows) -> Figure:
  figure, panels = plots.panels(3, height=3.6)
  for arm in dict.fromkeys(run.factors["arm"] for run in runs):
    plots.curve(panels[0], arms.select(runs, arm=arm), _LOSS, arm)
  panels[0].set_title("held-out loss")
  _, tokens = _extremes(layers, "tokens")
  _, widest = _extremes(layers, "width")
  for axis, key, fixed in (
    (panels[1], "width", ("tokens", tokens)),
    (panels[2], "tokens", ("width", widest)),
  ):
    for arm in dict.fromkeys(row["arm"] for row in layers):
      points = [
        row for row in layers if row["arm"] == arm and row[fixed[0]] == fixed[1]
      ]
      axis.plot(
        [row[key] for row in points],
        [row["refresh ms"] for row in points],
        marker="o",
        label=arm,
      )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(key)
    axis.set_title(f"ms a refresh, {fixed[0]} {fixed[1]}")
  for panel in panels:
    panel.legend(fontsize=6)
  return figure
