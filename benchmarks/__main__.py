"""All benchmarks, one after the other, and a line in their history.

  python -m benchmarks [PART ...] [--json FILE] [--no-history]

About 16 minutes on two cores: ragged 10, step 3, reading 2, the others 1 each.
Every part has a process of its own and can be run by itself, as `python -m
benchmarks.step`.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import history
from bertjax.registry import lookup

PARTS = {part: f"benchmarks.{part}" for part in history.HEADLINES}


def measured(parts: Sequence[str]) -> dict[str, Any]:
  """What each part writes as JSON; what it prints is shown.

  Raises:
    ValueError: there is no such part.
    subprocess.CalledProcessError: a part failed.
  """
  modules = {part: lookup(PARTS, part, "part") for part in parts}
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    for part, module in modules.items():
      print(f"== {part}", flush=True)
      output = pathlib.Path(folder) / f"{part}.json"
      start = time.monotonic()
      command = [sys.executable, "-m", module, f"--json={output}"]
      subprocess.run(command, check=True)
      found[part] = json.loads(output.read_text())
      print(f"{time.monotonic() - start:.0f} s", flush=True)
  return found


def _commit() -> str:
  """Of the checkout, with a + if files differ from it; "" without git."""
  folder = pathlib.Path(__file__).parent

  def git(*arguments):
    done = subprocess.run(
      ["git", *arguments],
      cwd=folder,
      capture_output=True,
      text=True,
      check=False,
    )
    return done.stdout.strip()

  changed = git("status", "--porcelain", "--untracked-files=no")
  return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks")
  parser.add_argument("parts", nargs="*", metavar="PART", default=list(PARTS))
  parser.add_argument("--json", help="file for all that was measured")
  parser.add_argument("--no-history", action="store_true")
  options = parser.parse_args()
  found = measured(options.parts)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
  if not options.no_history:
    lines = {part: history.headlines(part, found[part]) for part in found}
    today = datetime.date.today().isoformat()
    history.append(history.PATH, lines, _commit(), today)
    print(f"Appended to {history.PATH}.")


if __name__ == "__main__":
  main()
