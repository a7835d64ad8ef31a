"""How a stage starts from another one, or from published weights.

An objective names the parts that may begin `fresh`, such as the head of a
fine-tuning task; everything else must be explained by the other model.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bertjax import registry
from bertjax.adaptation import reinitialise
from bertjax.checkpoint import Checkpointer
from bertjax.experiment import Experiment
from bertjax.optim import hand_over
from bertjax.train_state import TrainState
from bertjax.transfer import load_params_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
  """`config.init_from`.

  Attributes:
    path: a workdir or a published folder; the previous stage by default.
    carry: "params", or "optimizer" to keep the optimizer's moments as well
      (from a workdir with the same optimizer).
    reset_schedule: whether the schedule's counter restarts. Without it the step
      count goes on too, as in BERT's second phase.
    renames: `[(regex, replacement)]` from the other's parameter names to ours.
    allow_missing: regexes of our parameters that may keep their fresh values.
    ignore: regexes of the other's parameters that are left out.
    reinit: arguments of `reinitialise`: what starts afresh although the other
      model has it.
  """

  path: str
  carry: str = "params"
  reset_schedule: bool = True
  renames: Sequence[tuple[str, str]] = ()
  allow_missing: Sequence[str] = ()
  ignore: Sequence[str] = ()
  reinit: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    registry.lookup(
      dict.fromkeys(("params", "optimizer")), self.carry, "init_from.carry"
    )
    changes = self.renames or self.allow_missing or self.ignore or self.reinit
    if self.carry == "optimizer" and changes:
      raise ValueError(
        "init_from.carry='optimizer' continues the same parameters; renames,"
        " allow_missing, ignore and reinit go with carry='params'."
      )
    if self.carry == "params" and not self.reset_schedule:
      raise ValueError(
        "init_from.reset_schedule=False goes with carry='optimizer'."
      )


def initial_state(experiment: Experiment) -> TrainState:
  """A fresh state, with what `config.init_from` names put in its place.

  Raises:
    ValueError: options that exclude each other, or parameters that neither
      side explains.
  """
  spec = experiment.settings.init_from
  state = experiment.init()
  if spec is None:
    return state
  source = registry.call(InitFrom, spec, "init_from")
  if source.carry == "optimizer":
    old = Checkpointer(source.path).restore(experiment.abstract_state).state
    opt_state = hand_over(
      old.opt_state, state.opt_state, reset_schedule=source.reset_schedule
    )
    step = jnp.zeros_like(old.step) if source.reset_schedule else old.step
    return state.replace(params=old.params, opt_state=opt_state, step=step)
  params = load_params_for(
    source.path,
    experiment.abstract_state.params,
    fresh=experiment.objective.fresh,
    renames=source.renames,
    allow_missing=source.allow_missing,
    ignore=source.ignore,
  )
  placed = jax.tree.map(
    lambda new, old: (
      old
      if new is None
      else jax.device_put(new.astype(old.dtype), old.sharding)
    ),
    params,
    state.params,
    is_leaf=_is_none,
  )
  if source.reinit:
    placed = registry.call(
      functools.partial(
        reinitialise,
        placed,
        state.params,
        stacked_axes=experiment.stacked_axes,
      ),
      source.reinit,
      "init_from.reinit",
    )
  _tell(params)
  return state.replace(params=placed)


def _tell(params: Any) -> None:
  """Says on standard error which parts begin untrained."""
  fresh = {
    part
    for part, tree in params.items()
    if any(x is None for x in jax.tree.leaves(tree, is_leaf=_is_none))
  }
  if fresh:
    print(
      f"init_from: untrained are {', '.join(sorted(fresh))}.", file=sys.stderr
    )


def _is_none(x: Any) -> bool:
  return x is None
