"""What steps and times say about MKOR's claims."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments import plots
from experiments.curvature.problems import LOOK
from experiments.outcome import Claim, Outcome

PAPER = "MKOR (Mozaffari et al. 2023, arXiv:2306.01685)"
LAMB, MKOR = "LAMB", "MKOR, reference"
_RULES = (MKOR, "MKOR, exact", "MKOR, paper")
# Hours to the paper's score, and what they make of LAMB's.
_PUBLISHED = {
  MKOR: "1.52x (7.97 h to 5.25 h)",
  "MKOR-H": "2.57x (7.97 h to 3.10 h)",
  "K-FAC": "1.40x (KAISA: 7.97 h to 5.71 h)",
  "Eva": "1.52x (7.97 h to 5.24 h)",
}
Rows = Sequence[Mapping[str, Any]]
Steps = Mapping[str, Sequence[float | None]]


def outcome(rows: Rows, times: Mapping[str, Any], steps: Steps) -> Outcome:
  """Claims, tables and figure.

  Args:
    rows: of `problems.solve`, by "problem", "arm" and "rate".
    times: of `timing.milliseconds`.
    steps: of `timing.steps_per_arm`.
  """
  best = _best(rows)
  cost = times["milliseconds"]
  claims = [
    _fewer(best, problem, rule)
    for problem in _problems(best)
    for rule in _RULES
    if (problem, rule) in best
  ]
  claims += [_sooner(arm, cost, steps) for arm in _PUBLISHED if arm in cost]
  solved = [
    {
      "problem": row["problem"],
      "arm": row["arm"],
      "rate": row["rate"],
      "last loss": statistics.mean(map(_last, row["losses"])),
      "steps": _shown(_reached(best, row)),
      "seconds": row["seconds"],
    }
    for row in rows
  ]
  timed = [
    {"arm": arm, "ms a step": value, "seconds": times["seconds"] / len(cost)}
    for arm, value in cost.items()
  ]
  return Outcome(
    paper=PAPER,
    claims=claims,
    counts={
      "runs": sum(len(row["losses"]) for row in rows),
      "measurements": len(timed),
    },
    rows=[*solved, *timed],
    summary=_summary(best, cost, steps),
    figure=_figure(best, cost),
  )


def _last(losses: Sequence[float]) -> float:
  """The last loss; a run that broke off has none."""
  return losses[-1] if losses else math.inf


def _best(rows: Rows) -> dict[tuple[str, str], Mapping[str, Any]]:
  """By problem and arm, the rate with the lowest last loss over seeds."""
  length = max(len(losses) for row in rows for losses in row["losses"])

  def loss(row):
    return statistics.mean(
      _last(losses) if len(losses) == length else math.inf
      for losses in row["losses"]
    )

  return {
    (problem, arm): min(
      (r for r in rows if (r["problem"], r["arm"]) == (problem, arm)), key=loss
    )
    for problem, arm in dict.fromkeys((r["problem"], r["arm"]) for r in rows)
  }


def _problems(best) -> list[str]:
  return list(dict.fromkeys(problem for problem, _ in best))


def _reached(best, row: Mapping[str, Any]) -> list[int | None]:
  """Steps until LAMB's last loss, of the same seed; None if it never is."""
  found = []
  theirs = best[row["problem"], LAMB]["losses"]
  for losses, target in zip(row["losses"], map(_last, theirs)):
    looks = (i for i, loss in enumerate(losses, 1) if loss <= target)
    first = next(looks, None)
    found.append(None if first is None else first * LOOK)
  return found


def _shown(steps: Sequence[float | None]) -> str:
  return ", ".join("never" if s is None else f"{s:.0f}" for s in steps)


def _fewer(best, problem: str, rule: str) -> Claim:
  mine, lamb, sgd = (
    _reached(best, best[problem, arm]) for arm in (rule, LAMB, "SGD")
  )
  return Claim(
    f"{problem}: SGD behind {rule} needs fewer steps to LAMB's last loss than"
    " LAMB and than SGD alone",
    "(fewer steps than LAMB, on BERT)",
    f"{_shown(mine)} (by seed); LAMB {_shown(lamb)}; SGD {_shown(sgd)}",
    [
      step is not None and (other is None or step < other)
      for others in (lamb, sgd)
      for step, other in zip(mine, others)
    ],
  )


def _ratios(arm: str, cost, steps: Steps) -> list[float | None]:
  """LAMB's time to its last loss over an arm's, by seed; None for never."""
  slower = cost[arm] / cost[LAMB]
  return [
    None if mine is None else theirs / (mine * slower)
    for mine, theirs in zip(steps[arm], steps[LAMB])
  ]


def _sooner(arm: str, cost, steps: Steps) -> Claim:
  ratios = _ratios(arm, cost, steps)
  shown = ", ".join("never" if r is None else f"{r:.2f}x" for r in ratios)
  return Claim(
    f"masked language model: LAMB behind {arm} is sooner at LAMB's last loss",
    _PUBLISHED[arm],
    f"{shown} (by seed); a step takes {cost[arm] / cost[LAMB]:.2f} of LAMB's"
    " time",
    [ratio is not None and ratio > 1 for ratio in ratios],
  )


def _summary(best, cost, steps: Steps) -> list[dict[str, Any]]:
  arms = dict.fromkeys([*(arm for _, arm in best), *cost])
  rows = []
  for arm in arms:
    row: dict[str, Any] = {"arm": arm}
    for problem in _problems(best):
      found = best.get((problem, arm))
      shown = "" if found is None else _shown(_reached(best, found))
      row[f"{problem}: steps"] = shown
    timed = arm in cost
    row["MLM: step / LAMB's"] = f"{cost[arm] / cost[LAMB]:.2f}" if timed else ""
    row["MLM: steps"] = _shown(steps[arm]) if timed else ""
    rows.append(row)
  return rows


def _figure(best, cost) -> Figure:
  figure, panels = plots.panels(len(_problems(best)) + 1, height=3.6)
  for panel, problem in zip(panels, _problems(best)):
    for (name, arm), row in best.items():
      if name == problem:
        curves = [losses for losses in row["losses"] if losses]
        length = min(map(len, curves), default=0)
        looks = [LOOK * (i + 1) for i in range(length)]
        means = [statistics.mean(c[i] for c in curves) for i in range(length)]
        panel.plot(looks, means, label=f"{arm} ({row['rate']:g})")
    panel.set_yscale("log")
    panel.set_xlabel("step")
    panel.set_title(f"{problem}: held-out loss")
    panel.legend(fontsize=6)
  panels[-1].barh(list(cost), list(cost.values()))
  panels[-1].set_title("masked language model: ms a step")
  return figure
