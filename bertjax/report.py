"""The end-of-run report: curves, a table, and whether the run looks healthy.

`python -m bertjax.report WORKDIR` reads `metrics.csv`, `config.json` and
`health.json` of a workdir and writes `WORKDIR/report/` with `report.md`,
`curves.png` and the `metrics.csv` behind it. A stuck run looks like a slow
run; the health section is there to tell them apart.
"""

import dataclasses
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.metrics.writers import read_csv

Table = Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Check:
  """One line of the health section.

  Attributes:
    name: what was looked at.
    value: what was found, as text.
    expected: the range, as text.
    ok: whether the value is inside.
  """

  name: str
  value: str
  expected: str
  ok: bool


def _between(
  name: str, value: float, low: float, high: float, form: str = ".3g"
) -> Check:
  if math.isinf(high):
    expected = f"at least {low:{form}}"
  elif math.isinf(low):
    expected = f"at most {high:{form}}"
  else:
    expected = f"{low:{form}} to {high:{form}}"
  return Check(name, f"{value:{form}}", expected, low <= value <= high)


def data_checks(health: Mapping[str, Any]) -> list[Check]:
  """Checks of the data audit; a key that is absent gives no line.

  Args:
    health: any of `masking_rate` with `expected_masking_rate`; `mask_share`,
      `random_share`, `keep_share` with `expected_` twins; `selected` (how many
      positions were counted); `duplicate_share`; `label_weight_min` and
      `label_weight_mean` per batch; of a task `class_shares` by label,
      `truncated_share` and `unlabelled_share`.
  """
  checks = _share_checks(health)
  # The rate is rounded per row and special tokens are never chosen.
  if "masking_rate" in health:
    rate = health.get("expected_masking_rate", 0.15)
    checks.append(
      _between("masking rate", health["masking_rate"], 0.8 * rate, 1.1 * rate)
    )
  # Four standard deviations of a binomial share.
  for name, default in (("mask", 0.8), ("random", 0.1), ("keep", 0.1)):
    if f"{name}_share" in health:
      share = health.get(f"expected_{name}_share", default)
      count = max(health.get("selected", 1000), 1)
      band = 4 * math.sqrt(share * (1 - share) / count)
      checks.append(
        _between(
          f"share of {name} among the chosen",
          health[f"{name}_share"],
          max(share - band, 0),
          min(share + band, 1),
        )
      )
  if "label_weight_min" in health:
    mean = health.get("label_weight_mean", health["label_weight_min"])
    checks.append(
      _between(
        "least label weight of a batch",
        health["label_weight_min"],
        max(1.0, 0.2 * mean),
        math.inf,
        ".4g",
      )
    )
  return checks


def _share_checks(health: Mapping[str, Any]) -> list[Check]:
  """Of examples that are worth little, and of the classes."""
  checks = []
  for key, name, most in (
    ("duplicate_share", "duplicates", 0.05),
    ("truncated_share", "rows that were cut", 0.1),
    ("unlabelled_share", "rows without label", 0.05),
  ):
    if key in health:
      checks.append(_between(name, health[key], -math.inf, most, ".1%"))
  if shares := health.get("class_shares"):
    shown = sorted(shares.items(), key=lambda item: -item[1])
    value = ", ".join(f"{label} {share:.1%}" for label, share in shown[:5])
    if len(shown) > 5:
      label, share = shown[-1]
      value += f", ... {label} {share:.1%}"
    ok = all(share > 0 for share in shares.values())
    checks.append(Check("class shares", value, "each above 0", ok))
  return checks


def curve_checks(
  table: Table,
  *,
  initial_loss: float | None = None,
  clip_norm: float | None = None,
  reference: Table | None = None,
  tolerance: float = 0.15,
) -> list[Check]:
  """Checks of what the run wrote.

  Args:
    table: columns of `metrics.csv`.
    initial_loss: what guessing evenly gives, the loss of an untrained model.
    clip_norm: gradients above it were clipped.
    reference: `step` and `loss` of a run known to be good.
    tolerance: allowed relative distance from the reference.
  """
  checks = []
  step, loss = _column(table, "loss")
  if initial_loss and len(loss):
    # The first row is a mean over its log interval, hence the wider low side.
    low, high = 0.6 * initial_loss, 1.1 * initial_loss
    checks.append(
      _between("first loss (even guessing)", loss[0], low, high, ".2f")
    )
  if len(loss) >= 6:
    last = slice(len(loss) - len(loss) // 3, None)
    if len(loss[last]) >= 2:
      slope = float(np.polyfit(step[last], loss[last], 1)[0]) * 1000
      checks.append(
        Check(
          "loss slope, last third, per 1000 steps",
          f"{slope:.3g}",
          "below 0",
          slope < 0,
        )
      )
  _, norm = _column(table, "grad_norm")
  if len(norm):
    median, largest = float(np.median(norm)), float(np.max(norm))
    checks.append(
      Check(
        "gradient norm, median",
        f"{median:.3g}",
        "above 0",
        0 < median < math.inf,
      )
    )
    checks.append(
      _between("gradient norm, largest", largest, 0, 100 * median or 0.0)
    )
    if clip_norm:
      clipped = float(np.mean(norm > clip_norm))
      checks.append(
        Check(
          f"share of logged rows with the norm above {clip_norm:g}",
          f"{clipped:.0%}",
          "below 95%",
          clipped < 0.95,
        )
      )
  if reference is not None and len(loss):
    checks.append(_reference_check(step, loss, reference, tolerance))
  _, rate = _column(table, "tokens_per_s")
  if len(rate):
    checks.append(
      Check(
        "tokens/s, median",
        f"{float(np.median(rate)):,.0f}",
        "slowest row above a third of it",
        bool(np.min(rate) > np.median(rate) / 3),
      )
    )
  return checks


def _reference_check(
  step: np.ndarray, loss: np.ndarray, reference: Table, tolerance: float
) -> Check:
  known_step, known = _column(reference, "loss")
  name, expected = "loss against the reference", f"within {tolerance:.0%}"
  if not len(known):
    raise ValueError("reference: the curve has no finite loss.")
  inside = (step >= known_step[0]) & (step <= known_step[-1])
  if not inside.any():
    return Check(name, "no common steps", expected, False)
  wanted = np.interp(step[inside], known_step, known)
  gap = loss[inside] / wanted - 1
  worst = int(np.argmax(np.abs(gap)))
  return Check(
    name,
    f"{gap[worst]:+.1%} at step {int(step[inside][worst])}",
    expected,
    bool(abs(gap[worst]) <= tolerance),
  )


def _column(table: Table, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values where the column has a finite value."""
  if name not in table:
    return np.zeros(0), np.zeros(0)
  step = np.asarray(table["step"], float)
  values = np.asarray(table[name], float)
  finite = np.isfinite(values)
  return step[finite], values[finite]


def write_report(
  workdir: str | pathlib.Path,
  *,
  reference: str | pathlib.Path | None = None,
  tolerance: float = 0.15,
  samples: Sequence[tuple[str, str]] = (),
) -> pathlib.Path:
  """Writes `workdir/report/` and returns the path of its `report.md`.

  Args:
    workdir: has `metrics.csv`; `config.json` and `health.json` are optional.
      `health.json` may also hold `initial_loss`, `clip_norm`, and `baselines`,
      values by name that are shown beside the results.
    reference: CSV of `step,loss` of a run known to be good.
    tolerance: allowed relative distance from it.
    samples: (masked sentence, completion) pairs to show.

  Raises:
    FileNotFoundError: no `metrics.csv`, or no reference at the path given.
  """
  workdir = pathlib.Path(workdir)
  source = workdir / "metrics.csv"
  if not source.exists():
    raise FileNotFoundError(
      f"{source} does not exist; the report needs a workdir in which"
      " training has logged at least once."
    )
  table = read_csv(source)
  health = _json(workdir / "health.json")
  config = _json(workdir / "config.json")
  known = None if reference is None else read_csv(reference)
  checks = data_checks(health) + curve_checks(
    table,
    initial_loss=health.get("initial_loss"),
    clip_norm=health.get("clip_norm"),
    reference=known,
    tolerance=tolerance,
  )
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  shutil.copyfile(source, folder / "metrics.csv")
  _plot(folder / "curves.png", table, health, known)
  report = folder / "report.md"
  report.write_text(
    "\n\n".join(
      part
      for part in (
        f"# Report of {workdir.resolve().name}",
        _results(table, health),
        "![curves](curves.png)",
        _health_section(checks),
        _samples_section(samples),
        _config_section(config),
      )
      if part
    )
    + "\n"
  )
  return report


def _json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; bars in cells are escaped."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(
    "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
    for line in lines
  )


def _results(table: Table, health: Mapping[str, Any]) -> str:
  rows = []
  for name in table:
    step, values = _column(table, name)
    if name != "step" and len(values):
      rows.append(
        [
          name,
          f"{values[0]:.4g}",
          f"{values[-1]:.4g}",
          f"{values.min():.4g}",
          f"{values.max():.4g}",
          f"{int(step[-1])}",
        ]
      )
  for name, number in health.get("baselines", {}).items():
    value = f"{number:.4g}"
    rows.append([f"{name} (baseline)", value, value, value, value, ""])
  header = ["metric", "first", "last", "least", "largest", "last step"]
  return "## Results\n\n" + markdown_table(header, rows)


def _health_section(checks: Sequence[Check]) -> str:
  rows = [
    [c.name, c.value, c.expected, "ok" if c.ok else "**warn**"] for c in checks
  ]
  warnings = sum(not c.ok for c in checks)
  verdict = (
    f"{warnings} of {len(checks)} checks warn."
    if warnings
    else f"All {len(checks)} checks are ok."
  )
  header = ["check", "value", "expected", "verdict"]
  return f"## Health\n\n{verdict}\n\n" + markdown_table(header, rows)


def _samples_section(samples: Sequence[tuple[str, str]]) -> str:
  if not samples:
    return ""
  return "## Samples\n\n" + markdown_table(["text", "model"], samples)


def _config_section(config: Mapping[str, Any]) -> str:
  if not config:
    return ""
  return "## Config\n\n```json\n" + json.dumps(config, indent=2) + "\n```"


def _plot(
  path: pathlib.Path,
  table: Table,
  health: Mapping[str, Any],
  reference: Table | None,
) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 7), layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(2, 3).flat
  for axes, wanted in zip(
    panels,
    ("loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_s", "mfu"),
  ):
    for name in table:
      if name == wanted or name.rsplit("/", 1)[-1].endswith(wanted):
        step, values = _column(table, name)
        if len(values):
          marker = "o" if "/" in name else None
          axes.plot(step, values, label=name, marker=marker, markersize=3)
    for name, value in health.get("baselines", {}).items():
      if name.endswith(wanted):
        axes.axhline(value, color="gray", ls="--", label=name)
    if wanted == "loss" and reference is not None:
      axes.plot(*_column(reference, "loss"), "k:", label="reference")
    axes.set_title(wanted)
    axes.set_xlabel("step")
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=7)
  figure.savefig(path, dpi=100)


def main(arguments: Sequence[str]) -> None:
  """Command line: a workdir and, if wanted, the path of a reference curve."""
  if len(arguments) not in (1, 2):
    raise SystemExit("usage: python -m bertjax.report WORKDIR [REFERENCE.csv]")
  reference = arguments[1] if len(arguments) == 2 else None
  print(write_report(arguments[0], reference=reference))


if __name__ == "__main__":
  main(sys.argv[1:])
