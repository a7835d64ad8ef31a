"""What the commands share."""

import contextlib
import sys
from collections.abc import Iterator

from absl import flags, logging

from bertjax.checkpoint import CheckpointError
from bertjax.hardware import CompilerMissing
from bertjax.metrics.accumulator import NonFiniteError

_EXPECTED = (
  ValueError,
  FileNotFoundError,
  CheckpointError,
  CompilerMissing,
  NonFiniteError,
)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
  """Ends the command with one line for what a user can put right.

  The traceback is there with `--verbosity=1`.
  """
  try:
    yield
  except _EXPECTED as err:
    logging.debug("Traceback:", exc_info=True)
    print(f"Error: {err}", file=sys.stderr)
    sys.exit(1)


def quiet() -> None:
  """Leaves warnings and our own lines; `--verbosity=0` shows all of it.

  Orbax writes a dozen lines for each checkpoint.
  """
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
