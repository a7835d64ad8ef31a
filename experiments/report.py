r"""One table of what all experiments found.

  python -m experiments.report [FOLDER]

Reads `<paper>/result.json` of every experiment and prints Markdown: paper,
claim, published and measured effect, verdict (reproduced, partly, not) and
minutes. FOLDER is that of the experiments by default. Below stand the headlines
of the benchmarks by commit, as `make bench` has collected them.
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Sequence

from benchmarks import history
from bertjax import cli
from experiments import tables
from experiments.outcome import RESULT, VERDICTS

_FIELDS = ("claim", "published", "measured", "verdict")


def experiments(folder: pathlib.Path) -> list[pathlib.Path]:
  """Folders of experiments, by name."""
  return sorted(path.parent for path in folder.glob("*/run.py"))


def rows(folder: pathlib.Path) -> list[dict[str, str]]:
  """A row a claim; an experiment without results has one that says so.

  Raises:
    ValueError: a result.json that no run.py wrote.
  """
  found = []
  for experiment in experiments(folder):
    path = experiment / RESULT
    if not path.exists():
      found.append({"experiment": experiment.name, "verdict": "not run yet"})
      continue
    try:
      result = json.loads(path.read_text(encoding="utf-8"))
      for number, claim in enumerate(result["claims"]):
        row = {"experiment": experiment.name, "paper": result["paper"]}
        row |= {name: claim[name] for name in _FIELDS}
        row["minutes"] = "" if number else f"{result['minutes']:.0f}"
        found.append(row)
    except (KeyError, TypeError, ValueError) as err:
      raise ValueError(
        f"{path} is not the result of an experiment ({err!r}); run"
        f" python -m experiments.{experiment.name}.run again."
      ) from err
  return found


def report(folder: pathlib.Path) -> str:
  """The table, and how many claims got which verdict.

  Raises:
    ValueError: no experiment, or see `rows`.
  """
  found = rows(folder)
  if not found:
    raise ValueError(f"{folder} holds no experiment (<paper>/run.py).")
  counts = collections.Counter(row["verdict"] for row in found)
  verdicts = ", ".join(f"{counts[name]} {name}" for name in VERDICTS)
  return f"{tables.markdown(found)}\n\nClaims: {verdicts}."


def speed() -> str:
  """The benchmarks' table by commit; "" before the first `make bench`."""
  lines = history.table(history.read())
  if not lines:
    return ""
  told = (
    "Speed by commit (of PyTorch: how many times its speed in the same run)"
  )
  return f"{told}:\n\n{tables.markdown(lines)}"


def main(arguments: Sequence[str] | None = None) -> None:
  """Command line: the folder, if it is another one."""
  parser = argparse.ArgumentParser(
    prog="python -m experiments.report",
    description="Prints one table of what all experiments found.",
  )
  parser.add_argument(
    "folder",
    nargs="?",
    type=pathlib.Path,
    default=pathlib.Path(__file__).parent,
    help="of the experiments; default %(default)s",
  )
  folder = parser.parse_args(arguments).folder
  with cli.clear_errors():
    print(report(folder))
    print(f"\n{speed()}".rstrip())


if __name__ == "__main__":
  main()
