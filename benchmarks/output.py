"""The file of a benchmark's `--json`."""

import argparse
import contextlib
import pathlib

from bertjax import cli


def path(text: str) -> pathlib.Path:
  """For argparse: a file that can be written; its folder is made if needed.

  Raises:
    argparse.ArgumentTypeError: it cannot; said before anything is measured.
  """
  file = pathlib.Path(text)
  with contextlib.suppress(OSError):  # the check says what is wrong
    file.parent.mkdir(parents=True, exist_ok=True)
  try:
    cli.check_output("json", text)
  except ValueError as err:
    raise argparse.ArgumentTypeError(str(err)) from err
  return file
