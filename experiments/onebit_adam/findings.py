"""What the runs say about 1-bit Adam's claims."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import arms, plots
from experiments.onebit_adam import speedup
from experiments.onebit_adam.variance import THRESHOLD
from experiments.outcome import Claim, Outcome

PAPER = "1-bit Adam (Tang et al. 2021, arXiv:2102.02888)"

ADAM, ONEBIT, ZERO_ONE = "Adam", "1-bit Adam", "0/1 Adam"
PER_TENSOR = "1-bit Adam, a scale per tensor"
NO_FEEDBACK = "1-bit Adam, no error feedback"
TOO_EARLY = "1-bit Adam, frozen too early"
GRADIENT = "Adam on 1-bit gradients"
ZERO_ONE_PER_TENSOR = "0/1 Adam, a scale per tensor"
ZERO_ONE_RARE = "0/1 Adam, variance updated less often"
LAMB, ONEBIT_LAMB = "LAMB", "1-bit LAMB"

LOSS = "heldout/mlm_loss"
_ACCURACY = "heldout/mlm_accuracy"
# Nats by which a loss may exceed Adam's and still count as the same.
TOLERANCE = 0.05
DIVERGED = {LOSS: math.inf, _ACCURACY: 0.0, "loss": math.inf}


def outcome(
  runs: Sequence[arms.Run],
  trials: Sequence[arms.Run],
  rates: Mapping[str, float],
  sent: Mapping[str, Sequence[float]],
  pods: Sequence[Mapping[str, Any]],
  variance: Mapping[str, Any],
) -> Outcome:
  """Claims, tables and figure.

  Args:
    runs: finished, by factor "arm".
    trials: those that chose the rates, by "arm" and "rate".
    rates: of each arm, the one chosen.
    sent: bytes that a worker has sent after each step, by arm.
    pods: rows of `wires.measure`.
    variance: what `variance.watch` found.
  """
  metrics = [LOSS, _ACCURACY, "loss"]
  rows = [
    run.row(metrics)
    | {
      "rate": rates[run.factors["arm"]],
      "sent bytes": sent[run.factors["arm"]][-1],
    }
    for run in runs
  ]
  summary = [
    {"arm": row["arm"], "rate": f"{rates[row['arm']]:g}"}
    | row
    | {"MB sent": f"{sent[row['arm']][-1] / 1e6:.0f}"}
    for row in arms.summary(
      runs, {"held-out loss": LOSS, "masked accuracy": _ACCURACY}
    )
  ]
  return Outcome(
    paper=PAPER,
    claims=[
      *_compared(runs),
      _per_byte(runs, sent),
      _volume(sent),
      *([_pods(pods)] if pods else []),
    ],
    counts={"runs": len(trials) + len(runs), "compiled steps": len(pods)},
    rows=[*(run.row(metrics) for run in trials), *rows, *pods],
    summary=summary,
    figure=_figure(runs, sent, variance),
  )


def _compared(runs: Sequence[arms.Run]) -> list[Claim]:
  """Of the arms that were run."""
  known = {run.factors["arm"] for run in runs}
  same = (
    (ONEBIT, ADAM, "GLUE and SQuAD within noise"),
    (PER_TENSOR, ADAM, "(not in the paper)"),
    (ZERO_ONE, ONEBIT, "same accuracy (Lu et al. 2022)"),
    (ZERO_ONE_PER_TENSOR, PER_TENSOR, "(not in the paper)"),
    (ONEBIT_LAMB, LAMB, "1-bit LAMB: same convergence"),
  )
  worse = (
    (NO_FEEDBACK, "error feedback is needed"),
    (GRADIENT, "compressing Adam's gradient instead is worse"),
    (TOO_EARLY, "freezing the variance too early is worse"),
  )
  return [
    *(_same(runs, *claim) for claim in same if known.issuperset(claim[:2])),
    *(_worse(runs, *claim) for claim in worse if claim[0] in known),
  ]


def _same(runs, arm: str, reference: str, published: str) -> Claim:
  """Within the tolerance in every run, so that seeds do not average it away."""
  gap = arms.gains(runs, LOSS, "arm", arm, reference)
  return Claim(
    f"{arm} learns as {reference} does at equal steps (within"
    f" {TOLERANCE} nats)",
    published,
    f"held-out loss {gap:+.3f} above {reference} ({_each(gap)})",
    [value < TOLERANCE for value in gap.values],
  )


def _worse(runs, arm: str, claim: str) -> Claim:
  gap = arms.gains(runs, LOSS, "arm", arm, ONEBIT)
  return Claim(
    f"1-bit Adam: {claim}",
    "shown as curves",
    f"held-out loss {gap:+.3f} above 1-bit Adam ({_each(gap)})",
    [value > 0 for value in gap.values],
  )


def _each(stat: arms.Stat) -> str:
  return ", ".join(f"{value:+.3f}" for value in stat.values)


def _per_byte(runs, sent: Mapping[str, Sequence[float]]) -> Claim:
  """Training losses where Adam has sent what 1-bit Adam sends in all."""
  step = int(np.searchsorted(sent[ADAM], sent[ONEBIT][-1])) + 1

  def losses(arm, last):
    found = []
    for run in arms.select(runs, arm=arm):
      steps, values = run.curve("loss")
      seen = [v for s, v in zip(steps, values) if s <= last]
      found.append(float(np.mean(seen[-3:])))  # three windows of the log
    return np.array(found)

  ahead = arms.Stat(
    tuple(losses(ADAM, step) - losses(ONEBIT, len(sent[ONEBIT])))
  )
  return Claim(
    "At equal bytes 1-bit Adam has the lower training loss",
    "curves over time, 3.3x faster",
    f"{ahead} below Adam, which has taken {step} steps when it has sent what"
    " 1-bit Adam sends in all",
    [value > 0 for value in ahead.values],
  )


def _volume(sent: Mapping[str, Sequence[float]]) -> Claim:
  ratio = sent[ADAM][-1] / sent[ONEBIT][-1]
  return Claim(
    "A whole run sends several times less than 16-bit Adam",
    "up to 5x; 3.4x with a quarter of the steps in full precision",
    f"{ratio:.2f}x with a quarter of the steps in full precision",
    [ratio > 3],
  )


def _pods(pods: Sequence[Mapping[str, Any]]) -> Claim:
  ratios = [row["ring bytes"] / row["sent bytes"] for row in pods]
  errors = [abs(row["sent bytes"] / row["formula bytes"] - 1) for row in pods]
  shown = "; ".join(
    f"{row['arm']}, {row['workers']} workers, BERT-{row['model']}:"
    f" {row['sent bytes'] / 1e6:.2f} MB, 1/{ratio:.2f}"
    for row, ratio in zip(pods, ratios)
  )
  return Claim(
    "A compressed step sends a sixteenth of a 16-bit ring all-reduce (at most"
    " 1/15), compiled for pods, and what the formula says within 1 %",
    "16x; BERT-large on 64 workers 82.7 MB instead of 1.32 GB",
    f"{shown}; formula off by {max(errors):.2%} at most",
    [min(ratios) >= 15, max(errors) < 0.01],
  )


def _figure(
  runs: Sequence[arms.Run],
  sent: Mapping[str, Sequence[float]],
  variance: Mapping[str, Any],
) -> Figure:
  figure, panels = plots.panels(6, height=3.6)
  steps, lambs, megabytes, levels, ratios, predicted = panels
  curves = (
    ADAM, ONEBIT, PER_TENSOR, ZERO_ONE, ZERO_ONE_PER_TENSOR, ZERO_ONE_RARE,
    NO_FEEDBACK, TOO_EARLY, GRADIENT,
  )  # fmt: skip
  known = {run.factors["arm"] for run in runs}
  for arm in filter(known.__contains__, curves):
    plots.curve(steps, arms.select(runs, arm=arm), "loss", arm)
  for arm in filter(known.__contains__, (LAMB, ONEBIT_LAMB)):
    plots.curve(lambs, arms.select(runs, arm=arm), "loss", arm)
  shown = (ADAM, ONEBIT, ZERO_ONE, LAMB, ONEBIT_LAMB)
  for arm in filter(known.__contains__, shown):
    plots.curve(
      megabytes,
      arms.select(runs, arm=arm),
      "loss",
      arm,
      lambda step, arm=arm: sent[arm][step - 1] / 1e6,
    )
  # From where Adam starts to where it ends; what has diverged lies above.
  adam = arms.select(runs, arm=ADAM)[0].curve("loss")[1]
  for panel in (steps, lambs, megabytes):
    panel.set_title("training loss")
  for arm in dict.fromkeys(run.factors["arm"] for run in runs):
    loss = arms.stat(runs, LOSS, arm=arm)
    plots.levels(levels, [sent[arm][-1] / 1e6], [loss], arm)
  levels.set_title("held-out loss")
  for panel in (steps, lambs, megabytes, levels):
    panel.set_ylim(min(adam) - 0.1, max(adam))
  for panel in (megabytes, levels):
    panel.set_xscale("log")
    panel.set_xlabel("MB sent by a worker")
  _watch(ratios, variance)
  _predict(predicted)
  for panel in panels:
    panel.legend(fontsize=6)
  return figure


def _watch(panel, variance: Mapping[str, Any]) -> None:
  """What the automatic rule sees, and where it would freeze."""
  panel.plot(variance["steps"], variance["ratios"], label="Adam")
  panel.axhline(THRESHOLD, color="black", linewidth=0.5, label=f"{THRESHOLD}")
  if variance["frozen"] is not None:
    panel.axvline(
      variance["frozen"],
      color="black",
      linestyle=":",
      label=f"freezes after {variance['frozen']}",
    )
  panel.set_xlabel("step")
  panel.set_title("|v_old| / |v|, l1 norms")


def _predict(panel) -> None:
  gigabits = np.logspace(0, 3.2, 40)
  for workers in speedup.WORKERS:
    gain = [
      speedup.EXPOSED.speedup(workers, speedup.network(g)) for g in gigabits
    ]
    panel.plot(gigabits, gain, label=f"{workers} workers")
  hidden = [speedup.HIDDEN.speedup(64, speedup.network(g)) for g in gigabits]
  panel.plot(gigabits, hidden, label="64, gradients hidden")
  panel.axhline(1, color="black", linewidth=0.5)
  panel.set_xscale("log")
  panel.set_yscale("log")
  panel.set_xlabel("Gbit/s of a worker")
  panel.set_title("predicted speed-up, BERT-large")
