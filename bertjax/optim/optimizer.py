"""An optimizer as the step builder sees it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from bertjax.layers.statistics import Wanted
from bertjax.optim.preconditioning import memory
from bertjax.optim.schedules import Schedule
from bertjax.parallel import error_feedback


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """What the step builder needs.

  Attributes:
    transform: `init(params)`, `update(grads, state, params, **extra)`.
    schedule: step -> learning rate, for logs. Its steps are those that the
      transformation has counted, without skipped ones: see `schedule_step`.
    local_gradients: gradients must reach `update` un-reduced, inside shard_map.
    statistics: of linear layers that `update` takes as `statistics=`; None if
      it takes none.
    compact_every: steps between two looks, on the host, at whether a part of
      the state can be given up (`compact`); None if it never can.
    reset_errors: whether a resumed run forgets what its compressed averages
      still owed.
    layerwise: the same as `transform` and `optax.apply_updates`, one layer
      after another; None where that is no gain.
  """

  transform: optax.GradientTransformationExtraArgs
  schedule: Schedule
  local_gradients: bool = False
  statistics: Wanted | None = None
  compact_every: int | None = None
  reset_errors: bool = False
  layerwise: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None

  def apply(
    self, grads: Any, opt_state: Any, params: Any, **extra: Any
  ) -> tuple[Any, Any]:
    """New parameters and optimizer state.

    Args:
      grads: a tree like the parameters.
      opt_state: the optimizer's state.
      params: parameters.
      **extra: what else the transformation takes.
    """
    if self.layerwise is not None:
      return self.layerwise(grads, opt_state, params)
    updates, opt_state = self.transform.update(
      grads, opt_state, params, **extra
    )
    return optax.apply_updates(params, updates), opt_state

  def resumed(self, opt_state: Any) -> Any:
    """What a run goes on with, of what its last checkpoint held."""
    return (
      error_feedback.forgotten(opt_state) if self.reset_errors else opt_state
    )

  def compact(self, opt_state: Any) -> Any:
    """The state without what its next steps do not read; it may wait."""
    return memory.release(opt_state)
