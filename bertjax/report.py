"""The end-of-run report: curves, a table, and whether the run looks healthy.

`python -m bertjax.report WORKDIR` reads `metrics.csv`, `config.json` and
`health.json` of a workdir and writes `WORKDIR/report/` with `report.md`,
`curves.png`, and the `metrics.csv` and `samples.json` behind it.
"""

import argparse
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from bertjax import cli
from bertjax.checkpoint import located, parts_with
from bertjax.health import (
  REFERENCE_TOLERANCE,
  Check,
  Table,
  column,
  curve_checks,
  data_checks,
)
from bertjax.interop.names import listed
from bertjax.metrics.writers import read_csv

# What writers='csv' writes in a workdir.
CURVES = "metrics.csv"
_SAMPLES = "samples.json"


def write_report(
  workdir: str | pathlib.Path,
  *,
  reference: str | pathlib.Path | None = None,
  tolerance: float = REFERENCE_TOLERANCE,
  samples: Sequence[tuple[str, str]] | None = None,
) -> pathlib.Path:
  """Writes `workdir/report/` and returns the path of its `report.md`.

  Args:
    workdir: has `metrics.csv`, or is of a run of several, of which the best or
      the last stage counts; `config.json` and `health.json` are optional.
      `health.json` may also hold `initial_loss`, `clip_norm`, and `baselines`,
      values by name that are shown beside the results.
    reference: CSV of `step,loss` of a run known to be good; by default the
      config's `reference_curve`, and "" is none.
    tolerance: allowed relative distance from it.
    samples: (masked sentence, completion) pairs to show; by default those of
      the report that is there.

  Raises:
    FileNotFoundError: no `metrics.csv`, or no reference at the path given.
    ValueError: no row in the former, or no curve of the loss in the latter.
  """
  workdir = pathlib.Path(located(workdir))
  source = workdir / CURVES
  if not source.exists():
    # A report holds a copy of the curves.
    parts = parts_with(workdir, CURVES) - parts_with(workdir, "report.md")
    raise FileNotFoundError(
      f"{source} does not exist; "
      + (
        f"name a part of the run: {listed(parts)}."
        if parts
        else "the report needs a workdir in which training has logged at least"
        " once."
      )
    )
  table = read_csv(source)
  if not table["step"]:
    raise ValueError(f"{source} has no row; training has not logged yet.")
  health = _json(workdir / "health.json")
  config = _json(workdir / "config.json")
  if reference is None:
    reference = config.get("reference_curve")
  known = read_reference(reference) if reference else None
  checks = data_checks(health) + curve_checks(
    table,
    initial_loss=health.get("initial_loss"),
    pretrained=bool(config.get("init_from")),
    clip_norm=health.get("clip_norm"),
    reference=known,
    tolerance=tolerance,
  )
  folder = workdir / "report"
  folder.mkdir(exist_ok=True)
  if samples is None:
    samples = _json(folder / _SAMPLES).get("samples", ())
  else:
    kept = json.dumps({"samples": samples}, indent=2)
    (folder / _SAMPLES).write_text(kept + "\n")
  shutil.copyfile(source, folder / CURVES)
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


def has_curves(workdir: pathlib.Path) -> bool:
  """Whether a run left what its report is drawn from."""
  source = workdir / CURVES
  return source.exists() and bool(read_csv(source)["step"])


def read_reference(path: str | pathlib.Path) -> Table:
  """The curve of a run known to be good, from a CSV of `step,loss`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has other columns.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"reference_curve={str(path)!r} is not there; name a CSV with the columns"
      " step and loss, as the metrics.csv of another run."
    )
  table = read_csv(path)
  if not {"step", "loss"} <= set(table):
    raise ValueError(
      f"reference_curve={str(path)!r} has the columns {', '.join(table)}; it"
      " needs step and loss."
    )
  return table


def _json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; bars and ends of lines in cells are escaped."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
  return "<br>".join(text.replace("|", "\\|").splitlines())


def _results(table: Table, health: Mapping[str, Any]) -> str:
  rows = []
  for name in table:
    step, values = column(table, name)
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


_MARGINS = dict(
  left=0.06, right=0.99, bottom=0.07, top=0.95, wspace=0.24, hspace=0.3
)


def _plot(
  path: pathlib.Path,
  table: Table,
  health: Mapping[str, Any],
  reference: Table | None,
) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # Fixed margins: a layout that fits them draws everything once more.
  figure = Figure(figsize=(12, 7))
  FigureCanvasAgg(figure)
  panels = figure.subplots(2, 3, gridspec_kw=_MARGINS).flat
  for axes, wanted in zip(
    panels,
    ("loss", "accuracy", "learning_rate", "grad_norm", "tokens_per_s", "mfu"),
  ):
    for name in table:
      if name == wanted or name.rsplit("/", 1)[-1].endswith(wanted):
        step, values = column(table, name)
        if len(values):
          marker = "o" if "/" in name else None
          axes.plot(step, values, label=name, marker=marker, markersize=3)
    for name, value in health.get("baselines", {}).items():
      if name.endswith(wanted):
        axes.axhline(value, color="gray", ls="--", label=name)
    if wanted == "loss" and reference is not None:
      axes.plot(*column(reference, "loss"), "k:", label="reference")
    axes.set_title(wanted, y=1.0)  # placing it would draw the ticks first
    axes.set_xlabel("step")
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=7)
  figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> None:
  """Command line: a workdir and, if wanted, the path of a reference curve."""
  parser = argparse.ArgumentParser(
    prog="python -m bertjax.report",
    description="Writes WORKDIR/report/ from what training left in WORKDIR.",
  )
  parser.add_argument(
    "workdir", help="folder of a run that has logged at least once"
  )
  parser.add_argument(
    "reference",
    nargs="?",
    help="CSV with the columns step and loss of a run known to be good; by"
    " default the run's own reference_curve, '' is none",
  )
  given = parser.parse_args(arguments)
  with cli.clear_errors():
    print(write_report(given.workdir, reference=given.reference))


if __name__ == "__main__":
  main()
