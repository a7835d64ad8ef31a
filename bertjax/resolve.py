"""What a config leaves to where its run starts from, and to its data."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from bertjax.config import Settings
from bertjax.data.base import Data
from bertjax.hooks import build_stop
from bertjax.loading import describe
from bertjax.objectives import OBJECTIVES
from bertjax.predict import SAMPLERS


def check_length(settings: Settings) -> None:
  """Refuses rules of `stop` that are wrong, before any data are read.

  Raises:
    ValueError: an unknown rule, a bad value, or no length of the run.
  """
  spec = dict(settings.stop)
  epochs = spec.pop("epochs", None)
  if epochs is None and spec.get("steps") is None:
    raise ValueError(
      "stop.steps or stop.epochs is required: the schedule is drawn for it,"
      " also when stop.tokens or stop.wall_clock_s ends the run earlier."
    )
  if epochs is not None:
    _epochs(epochs, "stop.epochs")
    spec["steps"] = spec.get("steps") or 1
  evals = {
    name: {"every": options.get("every_epochs")} | dict(options)
    for name, options in settings.evals.items()
  }
  build_stop(spec, evals)


def inherit(settings: Settings) -> Settings:
  """Takes model, tokenizer and text functions from the folder of `init_from`.

  A model without a name is the folder's, with the given options on top; data
  without a tokenizer get the folder's, and its `preprocess` with it. What a
  config says itself stays.
  """
  path = (settings.init_from or {}).get("path")
  whole = "name" in settings.model and "tokenizer" in settings.data
  if path is None or whole:
    return settings
  model, data = dict(settings.model), dict(settings.data)
  found = describe(path)
  if "name" not in model:
    model = found.spec | model
  if found.tokenizer is not None:
    folder = {"name": "folder", "path": str(found.tokenizer)}
    if "tokenizer" not in data:
      data["tokenizer"] = folder
      if found.preprocess:
        data.setdefault("preprocess", found.preprocess)
  return dataclasses.replace(settings, model=model, data=data)


def complete(settings: Settings, data: Data) -> Settings:
  """Fills in what the data know: the objective's classes, steps for epochs.

  Raises:
    ValueError: an objective that does not fit the data, or a bad pace of an
      evaluation.
  """
  objective = data.objective(settings.objective)
  name = objective.get("name")
  if settings.samples and name in OBJECTIVES and name not in SAMPLERS:
    raise ValueError(
      f"samples are texts for {', '.join(SAMPLERS)}; objective.name={name!r}"
      " has no use for them, leave them out."
    )
  return dataclasses.replace(
    settings,
    objective=objective,
    stop=_stop(settings.stop, data),
    evals={
      name: _every(spec, data, f"evals.{name}")
      for name, spec in settings.evals.items()
    },
  )


def _epochs(value: Any, field: str) -> float:
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not number or not 0 < value < math.inf:
    raise ValueError(f"{field}={value!r} must be a positive number.")
  return value


def _stop(spec: Mapping[str, Any], data: Data) -> dict[str, Any]:
  """`stop` with steps for epochs; of both, what comes first."""
  spec = dict(spec)
  epochs = spec.pop("epochs", None)
  if epochs is not None:
    steps = data.steps(epochs)
    spec["steps"] = min(steps, spec.get("steps") or steps)
  return spec


def _every(spec: Mapping[str, Any], data: Data, field: str) -> dict[str, Any]:
  """An evaluation with steps for `every_epochs`."""
  spec = dict(spec)
  epochs = spec.pop("every_epochs", None)
  if epochs is not None:
    if "every" in spec:
      raise ValueError(
        f"{field} has both every (steps) and every_epochs; leave one out."
      )
    spec["every"] = data.steps(_epochs(epochs, f"{field}.every_epochs"))
  return spec
