"""What the commands share."""

import contextlib
import sys
from collections.abc import Iterator

from absl import flags, logging
from ml_collections import config_flags

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


def define_config() -> flags.FlagHolder:
  """The flag `--config`, and `--config.FIELD=VALUE` for any field.

  A field that the config file leaves at its default can be set as well; the
  builders refuse what they do not know, by name.
  """
  return config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, as configs/bert.py:tiny.",
    lock_config=False,
    accept_new_attributes=True,
  )


def quiet() -> None:
  """Leaves warnings and our own lines; `--verbosity=0` shows all of it.

  Orbax writes a dozen lines for each checkpoint.
  """
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
