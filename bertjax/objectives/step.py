"""What an objective may know of the training step that it is applied in.

Schedules of the loss, such as the temperature of a Gumbel-softmax, read the
clock; what is drawn at random comes from the streams. Outside training there is
no clock and no stream, and an objective does what it does at inference.
"""

from typing import Any

import flax.linen as nn
import jax

CLOCK = "clock"  # a collection of variables that nothing updates
_STEP = "step"
_GUMBEL = 1


def clock(step: jax.Array) -> dict[str, Any]:
  """The collection that tells the step, to be given to `objective.apply`.

  Args:
    step: optimizer steps taken, int32 scalar.
  """
  return {CLOCK: {_STEP: step}}


def current_step(module: nn.Module) -> jax.Array | None:
  """Optimizer steps taken so far, int32 scalar; None outside training.

  Args:
    module: the objective itself, for the clock is at the top.
  """
  if not module.has_variable(CLOCK, _STEP):
    return None
  return module.get_variable(CLOCK, _STEP)


def streams(key: jax.Array) -> dict[str, jax.Array]:
  """By name, what modules draw from.

  Dropout, and masks or mixtures that a step draws, take "dropout", which is the
  step's own key; the noise of a Gumbel-softmax is drawn wherever there is a
  stream "gumbel".

  Args:
    key: of a step and its microbatch.
  """
  return {"dropout": key, "gumbel": jax.random.fold_in(key, _GUMBEL)}
