"""What an experiment found, and the files that say so."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments import tables

REPRODUCED, PARTLY, NOT = "reproduced", "partly", "not"
VERDICTS = (REPRODUCED, PARTLY, NOT)
RESULT = "result.json"
# What run.py writes into a README stands between these lines.
_BEGIN, _END = "<!-- results: run.py writes them -->", "<!-- end of results -->"


@dataclasses.dataclass(frozen=True)
class Claim:
  """One claim of a paper, and what became of it.

  Attributes:
    claim: in a few words.
    published: the paper's figures for it.
    measured: ours.
    holds: what must be true for it: all of it, "reproduced"; a part, "partly";
      nothing, "not".
  """

  claim: str
  published: str
  measured: str
  holds: Sequence[bool]

  def __post_init__(self):
    if not self.holds:
      raise ValueError(f"claim {self.claim!r} has no condition in `holds`.")

  @property
  def verdict(self) -> str:
    """One of `VERDICTS`."""
    if all(self.holds):
      return REPRODUCED
    return PARTLY if any(self.holds) else NOT

  def row(self) -> dict[str, str]:
    """Its line in a table."""
    return {
      "claim": self.claim,
      "published": self.published,
      "measured": self.measured,
      "verdict": self.verdict,
    }


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Everything that an experiment reports.

  Attributes:
    paper: authors, year and identifier.
    claims: at least one.
    counts: how many runs, measurements ... the rows stand for, by name.
    rows: of results.csv; their `seconds` give the minutes.
    summary: rows of the README's table.
    figure: results.png.
  """

  paper: str
  claims: Sequence[Claim]
  counts: Mapping[str, int]
  rows: Sequence[Mapping[str, Any]]
  summary: Sequence[Mapping[str, Any]]
  figure: Figure

  @property
  def minutes(self) -> float:
    """Of all rows, one after the other."""
    return sum(row["seconds"] for row in self.rows) / 60


def save(outcome: Outcome, folder: str | os.PathLike) -> None:
  """Writes result.json, results.csv and results.png.

  If the folder has a README.md, its block of results is replaced too.

  Raises:
    ValueError: a README.md without the lines that enclose the block.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  block = "\n\n".join(
    (
      _BEGIN,
      tables.markdown([claim.row() for claim in outcome.claims]),
      tables.markdown(outcome.summary),
      ", ".join(f"{n} {what}" for what, n in outcome.counts.items() if n)
      + f", {outcome.minutes:.0f} minutes on {os.cpu_count()} CPU cores.",
      _END,
    )
  )
  readme = folder / "README.md"
  if readme.exists():
    readme.write_text(_replaced(readme, block), encoding="utf-8")
  tables.write_csv(folder / "results.csv", outcome.rows)
  outcome.figure.savefig(folder / "results.png", dpi=80)
  result = {
    "paper": outcome.paper,
    "claims": [claim.row() for claim in outcome.claims],
    "minutes": round(outcome.minutes, 1),
    "cpu_cores": os.cpu_count(),
    "jax": importlib.metadata.version("jax"),
  }
  text = json.dumps(result, indent=2, ensure_ascii=False)
  (folder / RESULT).write_text(text + "\n", encoding="utf-8")


def _replaced(readme: pathlib.Path, block: str) -> str:
  text = readme.read_text(encoding="utf-8")
  enclosed = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
  if not enclosed.search(text):
    raise ValueError(
      f"{readme} has no place for the results; add the lines {_BEGIN!r} and"
      f" {_END!r}."
    )
  return enclosed.sub(lambda _: block, text, count=1)
