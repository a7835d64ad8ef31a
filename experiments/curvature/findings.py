"""What steps and times say about MKOR's claims."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments import plots
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


def outcome(
  rows: Rows, times: Mapping[str, Any], steps: Steps, *, most: int
) -> Outcome:
  """Claims, tables and figure.

  Args:
    rows: of `problems.solve`, by "problem", "arm" and "rate".
    times: of `timing.milliseconds`.
    steps: of `timing.steps_per_arm`.
    most: steps of a run of `rows`.
  """
  best = {
    (problem, arm): min(
      (r for r in rows if (r["problem"], r["arm"]) == (problem, arm)),
      key=lambda row: _rank(row, most),
    )
    for problem, arm in dict.fromkeys((r["problem"], r["arm"]) for r in rows)
  }
  cost = times["milliseconds"]
  claims = [
    _fewer(best, problem, rule, most)
    for problem in dict.fromkeys(problem for problem, _ in best)
    for rule in _RULES
    if (problem, rule) in best
  ]
  claims += [_sooner(arm, cost, steps) for arm in _PUBLISHED if arm in cost]
  solved = [
    {
      "problem": row["problem"],
      "arm": row["arm"],
      "rate": row["rate"],
      "steps": _shown(row["steps"]),
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
    rows=[*solved, *timed],
    summary=_summary(best, cost, steps),
    figure=_figure(best, cost, most),
  )


def _rank(row: Mapping[str, Any], most: int) -> tuple[float, float]:
  """Fewer steps first; among those that never arrive, the lower loss."""
  steps = [2 * most if s is None else s for s in row["steps"]]
  return statistics.mean(steps), statistics.mean(row["losses"])


def _shown(steps: Sequence[float | None]) -> str:
  return ", ".join("never" if s is None else f"{s:.0f}" for s in steps)


def _fewer(best, problem: str, rule: str, most: int) -> Claim:
  mine = best[problem, rule]["steps"]
  others = {arm: best[problem, arm]["steps"] for arm in (LAMB, "SGD")}
  against = "; ".join(f"{arm} {_shown(s)}" for arm, s in others.items())
  return Claim(
    f"{problem}: SGD behind {rule} needs fewer steps to the loss than LAMB and"
    " than SGD alone",
    "(fewer steps than LAMB, on BERT)",
    f"{_shown(mine)} of {most} steps (by seed); {against}",
    [
      step is not None and (other is None or step < other)
      for steps in others.values()
      for step, other in zip(mine, steps)
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
  problems = list(dict.fromkeys(problem for problem, _ in best))
  arms = dict.fromkeys([*(arm for _, arm in best), *cost])
  rows = []
  for arm in arms:
    row: dict[str, Any] = {"arm": arm}
    for problem in problems:
      found = best.get((problem, arm))
      row[f"{problem}: steps"] = (
        "" if found is None else f"{_shown(found['steps'])}"
      )
    timed = arm in cost
    row["MLM: step / LAMB's"] = f"{cost[arm] / cost[LAMB]:.2f}" if timed else ""
    row["MLM: steps"] = _shown(steps[arm]) if timed else ""
    rows.append(row)
  return rows


def _figure(best, cost, most: int) -> Figure:
  problems = list(dict.fromkeys(problem for problem, _ in best))
  figure, panels = plots.panels(len(problems) + 1, height=3.6)
  for panel, problem in zip(panels, problems):
    arms = [arm for name, arm in best if name == problem]
    values = [
      statistics.mean(
        most if s is None else s for s in best[problem, arm]["steps"]
      )
      for arm in arms
    ]
    panel.barh(arms, values)
    panel.set_title(f"{problem}: steps (of {most})")
  panels[-1].barh(list(cost), list(cost.values()))
  panels[-1].set_title("masked language model: ms a step")
  return figure
