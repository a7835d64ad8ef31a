"""How a stage starts from another one, or from published weights.

An objective names the parts that may begin `fresh`, such as the head of a
fine-tuning task; everything else must be explained by the other model.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bertjax import registry
from bertjax.adaptation import reinitialise, vocabulary
from bertjax.checkpoint import Checkpointer, located, selected_step
from bertjax.data.textual import TextualData
from bertjax.data.tokenizers import load_tokenizer
from bertjax.experiment import Experiment
from bertjax.interop import names
from bertjax.loading import describe
from bertjax.optim import adapt, hand_over
from bertjax.parallel import hosts
from bertjax.teachers import with_teachers
from bertjax.train_state import TrainState
from bertjax.transfer import AVERAGES, load_variables_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
  """`config.init_from`.

  Attributes:
    path: a workdir or a published folder; the previous stage by default.
    carry: "params", or "optimizer" to keep the optimizer's moments as well
      (from a workdir with the same optimizer). Both are those of the best
      checkpoint by the other run's `keep.best_metric`, or else of the newest.
    reset_schedule: whether the schedule's counter restarts. Without it the step
      count goes on too, as in BERT's second phase.
    renames: `[(regex, replacement)]` from the other's parameter names to ours.
    allow_missing: regexes of our parameters that may keep their fresh values.
    ignore: regexes of the other's parameters that are left out.
    reinit: arguments of `reinitialise`: what starts afresh although the other
      model has it.
    new_rows: how the rows of pieces that the other's tokenizer lacks begin: a
      name of `STARTS`, "mean", "random" or "subword_mean". None refuses another
      vocabulary.
  """

  path: str
  carry: str = "params"
  reset_schedule: bool = True
  renames: Sequence[tuple[str, str]] = ()
  allow_missing: Sequence[str] = ()
  ignore: Sequence[str] = ()
  reinit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  new_rows: str | None = None

  def __post_init__(self):
    registry.lookup(
      dict.fromkeys(("params", "optimizer")), self.carry, "init_from.carry"
    )
    changes = (
      self.renames or self.allow_missing or self.ignore or self.reinit
      or self.new_rows
    )  # fmt: skip
    if self.new_rows is not None:
      registry.lookup(vocabulary.STARTS, self.new_rows, "init_from.new_rows")
    if self.carry == "optimizer" and changes:
      raise ValueError(
        "init_from.carry='optimizer' continues the same parameters; renames,"
        " allow_missing, ignore, reinit and new_rows go with carry='params'."
      )
    if self.carry == "params" and not self.reset_schedule:
      raise ValueError(
        "init_from.reset_schedule=False goes with carry='optimizer'."
      )


def initial_state(experiment: Experiment) -> TrainState:
  """A fresh state, with what `config.init_from` names put in its place.

  Frozen models get their variables, too (`bertjax.teachers`).

  Raises:
    ValueError: options that exclude each other, or parameters that neither
      side explains.
  """
  spec = experiment.settings.init_from
  state = experiment.init()
  if spec is None:
    return with_teachers(state, experiment)
  source = registry.call(InitFrom, spec, "init_from")
  if source.carry == "optimizer":
    with Checkpointer(located(source.path)) as checkpointer:
      old = checkpointer.restore(
        experiment.abstract_state, selected_step(source.path), adapt=adapt
      ).state
    opt_state = hand_over(
      old.opt_state, state.opt_state, reset_schedule=source.reset_schedule
    )
    step = jnp.zeros_like(old.step) if source.reset_schedule else old.step
    return old.replace(opt_state=opt_state, step=step, key=state.key)
  loaded = load_variables_for(
    source.path,
    {
      "params": state.params,
      **{k: v for k, v in state.extra.items() if k == AVERAGES},
    },
    fresh=experiment.objective.fresh,
    renames=source.renames,
    allow_missing=source.allow_missing,
    ignore=source.ignore,
    extend=_extend(source, experiment, state.params),
  )
  params = loaded.pop("params")
  placed = _placed(params, state.params)
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
  averages = {k: _placed(v, state.extra[k]) for k, v in loaded.items()}
  state = state.replace(params=placed, extra={**state.extra, **averages})
  return with_teachers(state, experiment)


def _placed(loaded: Any, fresh: Any) -> Any:
  """What was loaded, where fresh values are; these where there is nothing."""
  return jax.tree.map(
    lambda new, old: (
      old
      if new is None
      else jax.device_put(new.astype(old.dtype), old.sharding)
    ),
    loaded,
    fresh,
    is_leaf=_is_none,
  )


def _extend(
  source: InitFrom, experiment: Experiment, fresh: Any
) -> Callable[[str, np.ndarray], np.ndarray] | None:
  """What adds the rows of new pieces to a table; None: nothing may."""
  if source.new_rows is None:
    return None
  if not isinstance(experiment.data, TextualData):
    raise ValueError("init_from.new_rows is for data of text; leave it out.")
  folder = describe(source.path).tokenizer
  if folder is None:
    raise ValueError(
      f"init_from.new_rows: {source.path} holds no tokenizer, so which pieces"
      " are new is unknown; put its vocab.txt or tokenizer.json there."
    )
  old = load_tokenizer(folder)
  fresh = names.flatten(fresh)

  def extend(name: str, table: np.ndarray) -> np.ndarray:
    new = vocabulary.new_rows(
      old, experiment.data.tokenizer, len(table), len(fresh[name])
    )
    if len(table) > len(fresh[name]):
      return table  # refused by its shape
    fresh_table = np.asarray(jax.device_get(fresh[name]))
    return vocabulary.extended(table, fresh_table, new, source.new_rows)

  return extend


def _tell(params: Any) -> None:
  """Says on standard error which parts begin untrained."""
  fresh = {
    part
    for part, tree in params.items()
    if any(x is None for x in jax.tree.leaves(tree, is_leaf=_is_none))
  }
  if fresh:
    hosts.say(f"init_from: untrained are {', '.join(sorted(fresh))}.")


def _is_none(x: Any) -> bool:
  return x is None
