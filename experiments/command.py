"""The main of every run.py.

  python -m experiments.bert.run [--workdir DIR] [--variant tiny]

The same command again continues a run that was killed. The full variant
writes its results beside its run.py, any other into the workdir.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax

from bertjax import cli, garbage
from experiments import outcome as outcome_lib
from experiments import tables
from experiments.arms import InterruptedRunError

FULL = "full"
Experiment = Callable[[pathlib.Path, str], outcome_lib.Outcome]


def main(run: Experiment, arguments: Sequence[str] | None = None) -> None:
  """Runs an experiment and saves what it found.

  Args:
    run: `(workdir, variant) -> Outcome`, a function of its run.py.
    arguments: of the command line; by default this process's.
  """
  home = pathlib.Path(run.__code__.co_filename).parent
  parser = argparse.ArgumentParser(
    prog=f"python -m experiments.{home.name}.run"
  )
  parser.add_argument(
    "--workdir",
    type=pathlib.Path,
    default=pathlib.Path("runs", "experiments", home.name),
    help="folder of all runs; default %(default)s",
  )
  parser.add_argument(
    "--variant", default=FULL, help="'full', or 'tiny': seconds, to try it out"
  )
  options = parser.parse_args(arguments)
  workdir = options.workdir / options.variant
  cli.quiet()
  garbage.spare_imports()
  # Runs that differ in seed and data alone share their compiled programs.
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  with cli.clear_errors():
    try:
      outcome = run(workdir, options.variant)
    except InterruptedRunError as err:
      print(err, file=sys.stderr)
      sys.exit(1)
  target = home if options.variant == FULL else workdir
  outcome_lib.save(outcome, target)
  print(tables.markdown([claim.row() for claim in outcome.claims]))
  print(f"Results: {target / outcome_lib.RESULT}")
