"""All benchmarks, one after the other, and a line in their history.

  python -m benchmarks [PART ...] [--json FILE] [--no-history]

Every part has a process of its own and can be run by itself, as `python -m
benchmarks.step`. `SECONDS` says how long each takes on two cores.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import history, output
from bertjax import cli
from bertjax.registry import lookup

# About so long on two cores that nobody else uses.
SECONDS = {
  "reading": 120,
  "step": 180,
  "ragged": 600,
  "compiling": 60,
  "points": 40,
  "tpu": 60,
  "farthest_points": 20,
}


def measured(parts: Sequence[str]) -> Iterator[tuple[str, Any]]:
  """Each part and what it writes as JSON; what it prints is shown.

  Raises:
    ValueError: there is no such part, or it failed.
  """
  budget = {part: lookup(SECONDS, part, "part") for part in parts}
  print(f"{len(budget)} parts, about {sum(budget.values())} s in all")
  with tempfile.TemporaryDirectory() as folder:
    for part, seconds in budget.items():
      print(f"== {part} (about {seconds} s)", flush=True)
      figures = pathlib.Path(folder) / f"{part}.json"
      start = time.monotonic()
      command = [sys.executable, "-m", f"benchmarks.{part}"]
      command.append(f"--json={figures}")
      code = subprocess.run(command, check=False).returncode
      if code:
        raise ValueError(
          f"part={part!r} ended with code {code} and says why above; to leave"
          " it out, name the others."
        )
      print(f"{time.monotonic() - start:.0f} s", flush=True)
      yield part, json.loads(figures.read_text())


def _commit() -> str:
  """Of the checkout, with a + if files differ from it; "" without git.

  The history, to which every run adds, is none of them.
  """
  folder, name = history.PATH.parent, history.PATH.name

  def git(*arguments):
    done = subprocess.run(
      ["git", *arguments],
      cwd=folder,
      capture_output=True,
      text=True,
      check=False,
    )
    return done.stdout.strip()

  what = ("--", ":/", f":(exclude){name}")
  changed = git("status", "--porcelain", "--untracked-files=no", *what)
  return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks")
  parser.add_argument("parts", nargs="*", metavar="PART", default=[*SECONDS])
  parser.add_argument(
    "--json", type=output.path, help="file for all that was measured"
  )
  parser.add_argument("--no-history", action="store_true")
  options = parser.parse_args()
  with cli.clear_errors():
    run(options)


def run(options: argparse.Namespace) -> None:
  """Measures the parts and keeps what they find.

  Raises:
    ValueError: there is no such part, or it failed.
  """
  found: dict[str, Any] = {}
  commit = _commit()  # files may change while it measures
  try:
    for part, values in measured(options.parts):
      found[part] = values
      if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
  finally:  # a part that fails does not take along what others measured
    if found and not options.no_history:
      lines = {part: history.headlines(part, found[part]) for part in found}
      today = datetime.date.today().isoformat()
      history.append(history.PATH, lines, commit, today)
      print(f"Appended to {history.PATH}.")


if __name__ == "__main__":
  main()
