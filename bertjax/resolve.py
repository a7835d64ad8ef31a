"""What a config leaves to where its run starts from, and to its data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from bertjax.config import Settings
from bertjax.data.base import Data
from bertjax.loading import describe
from bertjax.objectives import OBJECTIVES
from bertjax.objectives.frozen import frozen_fields
from bertjax.predict import SAMPLERS
from bertjax.stopping import build_stop, check_evaluated


def check_length(settings: Settings) -> None:
  """Refuses rules of `stop` and `keep` that are wrong, before data are read.

  Raises:
    ValueError: an unknown rule, a bad value, no length of the run, or a metric
      of which no evaluation comes in time.
  """
  spec = dict(settings.stop)
  epochs = spec.pop("epochs", None)
  if epochs is None and spec.get("steps") is None:
    raise ValueError(
      "stop.steps or stop.epochs is required: the schedule is drawn for it,"
      " also when stop.tokens or stop.wall_clock_s ends the run earlier."
    )
  if epochs is not None:
    spec["steps"] = spec.get("steps") or 1
  evals = {
    name: {"every": options.get("every_epochs")} | dict(options)
    for name, options in settings.evals.items()
  }
  build_stop(spec, evals)
  best = settings.keep.get("best_metric")
  if best is not None:
    check_evaluated(best, evals, "keep.best_metric")


def inherit(settings: Settings) -> Settings:
  """Takes what a config leaves to other folders from there.

  Model, tokenizer and text functions come from that of `init_from`: a model
  without a name is the folder's, with the given options on top; data without a
  tokenizer get the folder's, and its `preprocess` with it; one that is
  `extended` without `of` extends the folder's. What a config says itself stays.
  Frozen models of the objective come from the folders that it names.

  Raises:
    ValueError: a frozen model of which nothing is said, or a folder that holds
      no model.
  """
  settings = _with_frozen(settings)
  start = settings.init_from or {}
  path = start.get("path")
  tokenizer = settings.data.get("tokenizer", {})
  extends = tokenizer and _extends_what_is_there(tokenizer)
  whole = "name" in settings.model and tokenizer and not extends
  if path is None or whole:
    return settings
  model, data = dict(settings.model), dict(settings.data)
  found = describe(path)
  if "name" not in model:
    kept = dict(found.spec)
    if start.get("new_rows"):
      kept.pop("vocab_size", None)  # it is that of the longer vocabulary
    model = kept | model
  if found.tokenizer is not None:
    folder = {"name": "folder", "path": str(found.tokenizer)}
    if extends:
      data["tokenizer"] = {**tokenizer, "of": folder}
    if found.preprocess and (extends or not tokenizer):
      data.setdefault("preprocess", found.preprocess)
    data.setdefault("tokenizer", folder)
  return dataclasses.replace(settings, model=model, data=data)


def _with_frozen(settings: Settings) -> Settings:
  """Frozen models of `config.objective`, as their folders have them.

  One without a path is that of `init_from`.
  """
  objective = dict(settings.objective)
  builder = OBJECTIVES.get(objective.get("name"))
  start = (settings.init_from or {}).get("path")
  for field in () if builder is None else frozen_fields(builder):
    spec = dict(objective.get(field) or {})
    path = spec.pop("path", None) or start
    if "name" not in spec:
      if path is None:
        raise ValueError(
          f"objective.{field}.path is required: the workdir of the model that"
          " is asked but not trained."
        )
      spec = {**describe(path).spec, **spec}
    objective[field] = spec | ({} if path is None else {"path": str(path)})
  return dataclasses.replace(settings, objective=objective)


def _extends_what_is_there(tokenizer: Any) -> bool:
  """Whether `data.tokenizer` adds pieces to that of `init_from`."""
  return (
    isinstance(tokenizer, Mapping)
    and tokenizer.get("name") == "extended"
    and "of" not in tokenizer
  )


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
    spec["every"] = data.steps(epochs)
  return spec
