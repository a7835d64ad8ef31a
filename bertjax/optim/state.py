"""Optimizer states from outside: what they tell, shardings, hand-over.

Moments are trees like the parameters, so the path of a moment ends with the
path of its parameter; whatever else a state holds (counters, norms, trust
ratios) is small.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, Int

from bertjax import rules
from bertjax.optim import clip, freezing, selection
from bertjax.optim.preconditioning import memory
from bertjax.optim.preconditioning.base import CurvatureState
from bertjax.parallel import elastic, error_feedback


def gradient_norm(opt_state: Any) -> Float[Array, ""]:
  """Global norm of the last gradient, before clipping.

  Frozen parameters do not count. The state is one of `build_optimizer`'s.

  Raises:
    ValueError: the state holds no norm.
  """
  return _first(opt_state, clip.GlobalNormState, "gradient norm").norm


def schedule_step(opt_state: Any) -> Int[Array, ""]:
  """The step that the schedule sees next.

  Skipped steps do not count. The state is one of `build_optimizer`'s.

  Raises:
    ValueError: the state holds no counter.
  """
  for schedule in _nodes(opt_state, optax.ScaleByScheduleState):
    return schedule.count
  # Optimizers that look their rate up themselves.
  return _first(opt_state, freezing.PhaseState, "counter of steps").steps


def _nodes(opt_state: Any, kind: type) -> Iterator[Any]:
  def found(node):
    return isinstance(node, kind)

  return filter(found, jax.tree.leaves(opt_state, is_leaf=found))


def _first(opt_state: Any, kind: type, what: str) -> Any:
  for node in _nodes(opt_state, kind):
    return node
  raise ValueError(f"opt_state holds no {what}; is it from build_optimizer?")


def state_shardings(
  opt_state: Any, params: Any, shardings: Any, replicated: Any
) -> Any:
  """A sharding for every leaf of an optimizer state.

  A leaf whose path ends with a parameter's path and whose shape is that
  parameter's gets its sharding; what each worker has of its own is sharded over
  the workers as well, and curvature as `preconditioning.memory` says; all else
  gets `replicated`. (Under
  `jit(transform.init)` the compiler would find most of it by itself; say it,
  and a restored checkpoint lands where the step wants it.)

  Args:
    opt_state: state or its `jax.eval_shape`.
    params: parameters, possibly abstract.
    shardings: tree like `params` of NamedShardings (for jit) or PartitionSpecs
      (for shard_map).
    replicated: what the small leaves get, of the same kind.

  Returns:
    A tree like `opt_state`.
  """

  def is_sharding(x):
    return isinstance(x, jax.sharding.Sharding | jax.sharding.PartitionSpec)

  by_name = selection.by_name(shardings, is_leaf=is_sharding)
  shapes = {
    name: leaf.shape for name, leaf in selection.by_name(params).items()
  }

  def pick(path, leaf):
    if error_feedback.is_per_worker(leaf):
      return error_feedback.shard(leaf, by_name, replicated)
    if memory.is_curvature(leaf):
      return memory.shard(leaf, replicated)
    parts = rules.path_name(path).split("/")
    # The longest suffix first: a parameter's path can end with another's.
    for i in range(len(parts)):
      name = "/".join(parts[i:])
      if name in by_name and shapes[name] == leaf.shape:
        return by_name[name]
    return replicated

  return jax.tree_util.tree_map_with_path(
    pick,
    opt_state,
    is_leaf=lambda x: error_feedback.is_per_worker(x) or memory.is_curvature(x),
  )


def adapt(
  saved: Mapping[str, tuple[int, ...]], wanted: Any
) -> tuple[Any, Callable[[Any], Any]]:
  """How a checkpoint is read whose optimizer state has other shapes.

  Those of other numbers of workers (`parallel.elastic`), and those of factors
  that its run had released. For `Checkpointer.restore`.

  Args:
    saved: shapes in the checkpoint, by path name.
    wanted: abstract state with shardings.

  Returns:
    What to read, and what makes the wanted state of it.
  """
  released = memory.was_released(saved, wanted)
  if not released:
    return elastic.adapt(saved, wanted)

  def readable(path, leaf):
    shape = released.get(rules.path_name(path))
    if shape is None:
      return leaf
    whole = jax.sharding.NamedSharding(
      leaf.sharding.mesh, jax.sharding.PartitionSpec()
    )
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=whole)

  return (
    jax.tree_util.tree_map_with_path(readable, wanted),
    lambda state: memory.without(state, released, wanted),
  )


def hand_over(
  old: Any,
  fresh: Any,
  *,
  reset_schedule: bool = True,
  reset_moments: bool = False,
) -> Any:
  """The optimizer state with which a new phase starts.

  Phase 2 of BERT and LAMB warms the learning rate up again but keeps the
  moments and their debiasing counter: the defaults. Overwriting the one counter
  with the other changes the debiasing, so they are separate here. With the
  schedule also restarts curvature; with either of them the phases of an
  optimizer that freezes its variance, and what its workers have of their own,
  which other data and other moments made.

  Args:
    old: state at the end of the previous phase.
    fresh: `transform.init(params)` of the new phase's optimizer.
    reset_schedule: the step that the schedule sees restarts at 0, see above.
    reset_moments: moments and debiasing counter restart.

  Returns:
    A state for the new phase's optimizer.

  Raises:
    ValueError: the two states have different structures or shapes.
  """

  def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState | CurvatureState)

  def is_phase(node):
    return isinstance(
      node, freezing.PhaseState | freezing.Intervals
    ) or error_feedback.is_per_worker(node)

  def shapes(tree):
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=memory.is_curvature
    ):
      if not memory.is_curvature(leaf):
        found[rules.path_name(path)] = leaf.shape
      elif not reset_schedule:  # or it starts afresh, whatever its factors were
        for rest, inner in jax.tree_util.tree_leaves_with_path(leaf):
          found[rules.path_name((*path, *rest))] = inner.shape
    return found

  before, after = shapes(old), shapes(fresh)
  released = memory.was_released(before, fresh)
  differ = sorted(
    name
    for name in before.keys() | after.keys()
    if before.get(name) != after.get(name) and name not in released
  )
  if differ or jax.tree.structure(old) != jax.tree.structure(fresh):
    where = f", first at {differ[0]!r}" if differ else ""
    raise ValueError(
      "optim: the previous phase's optimizer state does not fit this phase's"
      f" optimizer{where}; use the same optim.name, freeze and clipping"
      " options, or start with fresh moments."
    )

  def pick(before, after):
    if is_phase(after):
      reset = reset_schedule or reset_moments
    else:
      reset = reset_schedule if is_schedule(after) else reset_moments
    return after if reset else before

  return jax.tree.map(
    pick, old, fresh, is_leaf=lambda x: is_schedule(x) or is_phase(x)
  )
