"""What a workdir says of its run: config, versions, tokenizer."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax

from bertjax.checkpoint import BEST, LAST, parts_with
from bertjax.experiment import Experiment
from bertjax.grid import CSV
from bertjax.interop.names import listed

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ABSENT = "absent"
# One of them is there from a run's first write on; see `write_json`.
_SIGNS = {"run.json", "run.partial", "checkpoints"}
# What else a run would write over; other files, such as a log, are left alone.
_TAKEN = {
  "config.json",
  "events",
  "health.json",
  "metrics.csv",
  "report",
  "tokenizer",
  BEST,
  CSV,
  LAST,
}


def record(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Writes what it takes to understand, repeat or use the run."""
  if jax.process_index() != 0:
    return
  workdir.mkdir(parents=True, exist_ok=True)
  facts = {
    "python": platform.python_version(),
    "libraries": {n: importlib.metadata.version(n) for n in _LIBRARIES},
    "commit": _commit(),
    "devices": [d.device_kind for d in experiment.mesh.devices.flat],
    "mesh": dict(experiment.mesh.shape),
  }
  write_json(workdir / "run.json", facts)
  write_json(workdir / "config.json", experiment.settings.to_json())
  experiment.data.save(workdir)


def check_workdir(
  workdir: pathlib.Path, parts: Collection[str], cache: pathlib.Path
) -> None:
  """Refuses a folder that holds another run, or files that this one writes.

  Args:
    workdir: may be new or empty.
    parts: sub-folders of the run's stages, or of its grid's runs; () of a plain
      run.
    cache: of the run, which may be begun before the workdir is.

  Raises:
    ValueError: names the folder and what it holds.
  """
  if not workdir.is_dir():
    return
  found = {
    path.name
    for path in workdir.iterdir()
    if not cache.absolute().is_relative_to(path.absolute())
  }
  plain = found & _SIGNS
  if found & {*parts, CSV} and not plain if parts else plain:
    return
  if plain:
    what = (
      f"a run without stages or a grid, but this config has {listed(parts)}"
    )
  elif runs := {
    pathlib.PurePath(part).parts[0]
    for sign in _SIGNS
    for part in parts_with(workdir, sign)
  }:
    what = f"runs in {listed(runs)}, but not this one"
  elif taken := found & _TAKEN:
    what = f"{listed(taken)}, but no run of bertjax"
  else:
    return
  raise ValueError(f"workdir={workdir} holds {what}; name a new folder.")


def check_writable(workdir: pathlib.Path) -> None:
  """Raises ValueError for a folder in which nothing can be written, or made."""
  path = workdir.absolute()
  there = next(folder for folder in (path, *path.parents) if folder.exists())
  try:  # permissions do not tell it all, least of all root
    tempfile.TemporaryDirectory(dir=there, prefix=".").cleanup()
  except OSError as err:
    what = "written" if there == path else "created"
    raise ValueError(
      f"workdir={workdir} cannot be {what} ({there}: {err.strerror}); name"
      " another folder."
    ) from err


def config_changes(experiment: Experiment, workdir: pathlib.Path) -> list[str]:
  """Fields that differ from the config this workdir was last started with.

  Returns:
    Lines such as `optim.learning_rate: 0.001 -> 0.002`; none for a fresh
    workdir.
  """
  path = workdir / "config.json"
  if not path.exists():
    return []
  old = dict(flat(json.loads(path.read_text())))
  new = dict(flat(experiment.settings.to_json()))
  return [
    f"{name}: {old.get(name, _ABSENT)} -> {new.get(name, _ABSENT)}"
    for name in sorted({*old, *new})
    if old.get(name, _ABSENT) != new.get(name, _ABSENT)
  ]


def refuse_other_optimizer(
  experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Refuses a workdir whose checkpoints hold another optimizer's state.

  Raises:
    ValueError: names both.
  """
  path = workdir / "config.json"
  if not path.exists():
    return
  old = dict(flat(json.loads(path.read_text())))
  new = dict(flat(experiment.settings.to_json()))
  for name in ("optim.name", "optim.precondition.name"):
    before, now = (fields.get(name, _ABSENT) for fields in (old, new))
    if before != now:
      raise ValueError(
        f"{name}={now}, but {workdir} is a run with {name}={before}, whose"
        " state its checkpoints hold. Go on with that one; or begin in another"
        f" workdir with init_from.path={workdir}, which takes the parameters."
      )


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a file that is whole at any moment."""
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
  partial.replace(path)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """Names such as `optim.learning_rate` of a nested mapping, and values."""
  if not isinstance(value, Mapping):
    yield name, value
    return
  for key, inner in value.items():
    yield from flat(inner, f"{name}.{key}" if name else key)


def _commit() -> str | None:
  """The library's git commit, if it runs from a checkout."""
  done = subprocess.run(
    ["git", "describe", "--always", "--dirty", "--abbrev=12"],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.stdout.strip() or None
