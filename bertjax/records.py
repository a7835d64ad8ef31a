"""What a workdir says of its run: config, versions, tokenizer."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from bertjax.experiment import Experiment

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ABSENT = "absent"


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


def link(path: pathlib.Path, folder: str) -> None:
  """Makes `path` a link to a folder beside it, whole at any moment."""
  partial = path.with_name(f"{path.name}.partial")
  partial.unlink(missing_ok=True)
  partial.symlink_to(folder, target_is_directory=True)
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
