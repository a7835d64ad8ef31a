"""What the commands share."""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from bertjax import garbage, overrides
from bertjax.checkpoint import CheckpointError
from bertjax.config import cache_path
from bertjax.hardware import CompilerEnded
from bertjax.metrics.accumulator import NonFiniteError
from bertjax.parallel import hosts

# `--help` lists what is defined here among the flags of the command itself.
flags.disclaim_key_flags()

_OVERRIDES = "config_overrides"  # a flag, so that they are parsed with the rest

EXPECTED = (
  ValueError,
  FileExistsError,
  FileNotFoundError,
  ImportError,  # the message names the package to install
  IsADirectoryError,
  NotADirectoryError,
  PermissionError,
  CheckpointError,
  CompilerEnded,
  NonFiniteError,
)


def run(
  main: Callable[[Sequence[str]], Any],
  flags_parser: Callable[[Sequence[str]], list[str]] | None = None,
) -> None:
  """`app.run` of a command whose imports are done."""
  garbage.spare_imports()
  app.run(main, flags_parser=flags_parser or app.parse_flags_with_usage)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
  """Ends the command with one line for what a user can put right.

  The traceback is there with `--verbosity=1`.
  """
  try:
    yield
  except EXPECTED as err:
    logging.debug("Traceback:", exc_info=True)
    print(f"Error: {err}", file=sys.stderr)
    sys.exit(1)


class _Path(flags.ArgumentParser):
  """Of flags: `~` is the home folder, which shells leave alone there."""

  syntactic_help = "a path"

  def parse(self, argument: str) -> str:
    return os.path.expanduser(super().parse(argument))


PATH = _Path()  # for `flags.DEFINE`
# What flags that name a model take.
MODEL = "Workdir, Hugging Face folder, release of BERT or .pth of Point-BERT."


def define_config(given: flags.FlagValues = flags.FLAGS) -> None:
  """The flag `--config`, and `--config.FIELD=VALUE` for any field.

  The latter are `bertjax.overrides`; `parse_flags` hands them on.
  """
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, as configs/bert.py:tiny. --config.FIELD=VALUE sets any of its"
    " fields, as --config.optim.learning_rate=1e-3.",
    flag_values=given,
    sys_argv=[],  # its own search for overrides finds none
  )
  flags.declare_key_flag("config", flag_values=given)
  flags.DEFINE_multi_string(
    _OVERRIDES, [], "FIELD=VALUE of the config.", flag_values=given
  )


def parse_flags(argv: Sequence[str]) -> list[str]:
  """For `app.run`: mistakes in flags or in a config end in one line."""
  argv = flags.FLAGS.read_flags_from_files(list(argv))  # of --flagfile
  with clear_errors():
    others, found = overrides.separate(argv)
  given = [f"--{_OVERRIDES}={field}={text}" for field, text in found]
  try:
    return flags.FLAGS([*others[:1], *given, *others[1:]])
  except SyntaxError as err:
    message = (
      f"--config: {err.filename}, line {err.lineno} is no Python ({err.msg});"
      " name a config file, as configs/bert.py:tiny."
    )
  except AttributeError as err:
    if err.name != "get_config":
      raise
    file = getattr(err.obj, "__file__", err.obj)
    message = (
      f"--config: {file} has no function get_config; name a config file, as"
      " configs/bert.py:tiny."
    )
  except flags.Error as err:
    message = str(err).strip()
    kind, _, refusal = message.splitlines()[-1].strip().partition(": ")
    if kind == "ValueError":  # of get_config, below its traceback
      message = refusal
  print(f"Error: {message}", file=sys.stderr)
  sys.exit(1)


def define_hosts() -> None:
  """Flags of a run on several hosts; `bertjax.parallel.hosts` reads them."""
  flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0. TPUs, Slurm and JAX_COORDINATOR_ADDRESS tell.",
  )
  flags.DEFINE_integer("num_processes", None, "Of a run on several hosts.")
  flags.DEFINE_integer("process_id", None, "This process, from 0.")
  flags.DEFINE_integer(
    "connect_timeout_s", 300, "Seconds to wait for the other processes."
  )
  flags.DEFINE_integer(
    "heartbeat_timeout_s",
    100,
    "Seconds after which a silent process counts as dead.",
  )


def connected() -> contextlib.AbstractContextManager[None]:
  """Inside, this process is one of those that the flags or a launcher tell of.

  Raises:
    ValueError: they contradict themselves, or the processes do not meet.
  """
  given = flags.FLAGS
  return hosts.connected(
    hosts.place(
      coordinator_address=given.coordinator_address,
      num_processes=given.num_processes,
      process_id=given.process_id,
    ),
    connect_timeout_s=given.connect_timeout_s,
    heartbeat_timeout_s=given.heartbeat_timeout_s,
    expected=EXPECTED,
  )


def config(given: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
  """What `--config` names, with its overrides.

  Raises:
    ValueError: there is no such file, or no such group in it.
  """
  try:
    hasattr(given.config, "name")  # a failure to load waits for the first use
  except OSError as err:  # a page of attempts, the last line says why
    raise ValueError(
      f"--config={given['config'].config_filename} cannot be read:"
      f" {str(err).strip().splitlines()[-1].strip()}"
    ) from err
  found = [text.partition("=") for text in given[_OVERRIDES].value]
  return overrides.override(given.config, [(x[0], x[2]) for x in found])


def json_object(name: str, text: str | None) -> dict[str, Any] | None:
  """The value of a flag that is a JSON object; None if it was not given.

  Raises:
    ValueError: it is something else.
  """
  if text is None:
    return None
  try:
    value = json.loads(text)
  except ValueError as err:
    raise ValueError(f"--{name}={text} is no JSON: {err}.") from err
  if not isinstance(value, dict):
    raise ValueError(
      f'--{name}={text} must be a JSON object, as {{"name": ...}}.'
    )
  return value


def refuse_others(
  chosen: str,
  flags_of: Mapping[str, Collection[str]],
  given: flags.FlagValues,
) -> None:
  """Refuses flags that were given and that the choice made does not read.

  Args:
    chosen: a key of `flags_of`.
    flags_of: by choice, names of the flags that not all choices read.
    given: the flags, parsed.

  Raises:
    ValueError: names the first, and the choices that it is for.
  """
  for name in dict.fromkeys(itertools.chain(*flags_of.values())):
    if given[name].present and name not in flags_of[chosen]:
      readers = [choice for choice, names in flags_of.items() if name in names]
      raise ValueError(f"--{name} is for {', '.join(readers)}, not {chosen}.")


def check_output(
  name: str, path: str | None, endings: Sequence[str] = ()
) -> None:
  """Refuses a file that cannot be written, before any work is done for it.

  Args:
    name: of the flag.
    path: its value; None is no file.
    endings: those of which the file must have one; () allows any.

  Raises:
    ValueError: it ends in something else, its folder is not there, it is a
      folder itself, or nobody lets this process write it.
  """
  if path is None:
    return
  file = pathlib.Path(path).absolute()
  if endings and file.suffix.lower() not in endings:
    raise ValueError(f"--{name}={path} must end in {' or '.join(endings)}.")
  if file.is_dir():
    raise ValueError(f"--{name}={path} is a folder; name a file.")
  if not file.parent.is_dir():
    raise ValueError(f"--{name}={path}: there is no folder {file.parent}.")
  try:
    if not file.exists():  # permissions do not tell it all, least of all root
      tempfile.TemporaryFile(dir=file.parent).close()
    elif not os.access(file, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as err:
    raise ValueError(
      f"--{name}={path} cannot be written: {err.strerror}; name another file."
    ) from err


def keep_compiled() -> None:
  """Lets programs that took long to compile be read from disk the next time.

  They lie beside the token caches, by machine: a program for one CPU may not
  run on another. JAX_COMPILATION_CACHE_DIR names another folder, and
  JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
  """
  if jax.config.jax_compilation_cache_dir is None:
    folder = cache_path() / "compiled" / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(folder))


def quiet() -> None:
  """Leaves warnings and our own lines; `--verbosity=0` shows all of it.

  Orbax writes a dozen lines for each checkpoint.
  """
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
