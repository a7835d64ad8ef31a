"""Rows of results as CSV and Markdown."""

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

from bertjax.report import markdown_table

Row = Mapping[str, Any]


def columns(rows: Sequence[Row]) -> list[str]:
  """Names of all cells, in the order in which they first appear."""
  return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path: str | os.PathLike, rows: Sequence[Row]) -> None:
  """One line a row; numbers with six digits, missing cells empty."""
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)


def markdown(rows: Sequence[Row]) -> str:
  """A table with a column for every name; missing cells empty."""
  names = columns(rows)
  cells = [[str(_short(row.get(name, ""))) for name in names] for row in rows]
  return markdown_table(names, cells)


def _short(value: Any) -> Any:
  return f"{value:.6g}" if isinstance(value, float) else value
