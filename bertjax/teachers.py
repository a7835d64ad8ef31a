"""Where the frozen models of an objective come from.

  config.objective = dict(
    name="masked_points", tokenizer=dict(path="runs/tokenizer")
  )

What a frozen model is, its folder says, unless the config does (`resolve`); so
shapes are known without reading weights. Its variables are read once, when a
run starts; a run that goes on has them in its checkpoint. Without a path they
are those of the folder that `init_from` names, such as the stage before.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bertjax import loading
from bertjax.experiment import Experiment
from bertjax.interop import names
from bertjax.objectives.frozen import frozen_variables, with_frozen
from bertjax.train_state import TrainState

_PART = "encoder"  # of the folder's objective: the model without its heads


def with_teachers(state: TrainState, experiment: Experiment) -> TrainState:
  """A fresh state with the variables of its frozen models in their place.

  Raises:
    ValueError: a frozen model without a path, or one that is not what the
      config says.
  """
  wanted = frozen_variables(state.extra)
  if not wanted:
    return state
  found = {}
  for field, variables in wanted.items():
    path = experiment.settings.objective[field].get("path")
    if path is None:
      raise ValueError(
        f"objective.{field}.path is required to start: the workdir of a trained"
        " model."
      )
    found[field] = jax.tree.map(
      lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding),
      read_frozen(path, variables, f"objective.{field}.path"),
      variables,
    )
  return state.replace(extra=with_frozen(state.extra, found))


def read_frozen(path: str, wanted: Mapping[str, Any], field: str) -> Any:
  """The variables of a folder's model that a frozen one asks for.

  Args:
    path: what `load_model` reads.
    wanted: by collection, a tree of arrays or shapes.
    field: for messages.

  Raises:
    ValueError: one that is not there, or of another shape.
  """
  saved = loading.read_model(path, scan=_scanned(wanted))
  have = {"params": saved.params, **saved.extra}
  found = {}
  for collection, tree in wanted.items():
    theirs = names.flatten(have.get(collection, {}).get(_PART, {}))
    flat = {}
    for name, leaf in names.flatten(tree).items():
      if name not in theirs:
        raise ValueError(f"{field}: {path} has no {collection}/{name}.")
      flat[name] = np.asarray(theirs[name])
      if flat[name].shape != tuple(leaf.shape):
        raise ValueError(
          f"{field}: {collection}/{name} of {path} is {flat[name].shape} and"
          f" {tuple(leaf.shape)} in this config; leave that model's options to"
          " its folder."
        )
    found[collection] = names.nest(flat)
  return found


def _scanned(wanted: Mapping[str, Any]) -> bool | None:
  """Whether layers are stacked; None of a model without a stack."""
  params = wanted["params"]
  if "layers" in params:
    return True
  return False if "layers_0" in params else None
