"""Headlines of the benchmarks by commit: a line of JSON for each run."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

PATH = pathlib.Path(__file__).parent / "history.jsonl"
# Of what a part measured, what is worth comparing between commits. Absolute
# speeds are those of the machine of that line.
HEADLINES = {
  "reading": ("packed token/tokens_per_s",),
  "step": ("train/ratio", "infer/ratio"),
  "ragged": ("train/ratio", "infer/ratio", "infer sorted/ratio"),
  "compiling": ("first_s", "second_s"),
  "tpu": ("tokens_per_s_per_chip", "mfu"),
}
_FIELDS = ("commit", "date", "cores", "found")


def headlines(part: str, measured: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a part that go into its line."""
  found = {}
  for path in HEADLINES[part]:
    value: Any = measured
    for name in path.split("/"):
      value = value[name]
    found[path] = value
  return found


def append(
  path: pathlib.Path,
  found: Mapping[str, Mapping[str, float]],
  commit: str,
  date: str,
) -> None:
  """Adds a line.

  Args:
    path: of the file, made if needed.
    found: headlines by part.
    commit: that was measured.
    date: of the measurement.
  """
  line = dict(commit=commit, date=date, cores=os.cpu_count(), found=found)
  with path.open("a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")


def read(path: pathlib.Path = PATH) -> list[dict[str, Any]]:
  """All lines, the oldest first; [] if there is no file.

  Raises:
    ValueError: a line that no benchmark wrote.
  """
  if not path.exists():
    return []
  lines = []
  for number, text in enumerate(path.read_text().splitlines(), 1):
    try:
      line = json.loads(text)
      lines.append({name: line[name] for name in _FIELDS})
    except (KeyError, TypeError, ValueError) as err:
      raise ValueError(
        f"{path}, line {number} is not what `make bench` writes ({err!r})."
      ) from err
  return lines


def table(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """A row a run; a column a headline."""
  return [
    {"commit": line["commit"], "date": line["date"]}
    | {
      f"{part} {path}".replace("/", " "): f"{value:.4g}"
      for part, found in line["found"].items()
      for path, value in found.items()
    }
    for line in lines
  ]
