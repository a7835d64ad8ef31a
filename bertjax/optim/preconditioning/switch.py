"""When curvature no longer buys progress: MKOR-H's switch to first order.

The paper gives the idea, a threshold on the rate at which the loss falls; its
code has a flag that a person sets.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class SwitchState(NamedTuple):
  """The loss, watched.

  Attributes:
    steps: seen.
    loss: moving average.
    earlier: the average at the last look.
    slow: looks in a row that saw too little progress.
    on: the switch is thrown; it stays so.
  """

  steps: Int[Array, ""]
  loss: Float[Array, ""]
  earlier: Float[Array, ""]
  slow: Int[Array, ""]
  on: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class SwitchRule:
  """Throws the switch.

      l <- decay l + (1 - decay) loss            (l = loss at the first step)
      every `window` steps: rate = (l_before - l) / l_before
      on once rate < threshold at `patience` looks in a row, after `earliest`

  Attributes:
    step: throws it before that step, whatever the loss does; None leaves it to
      the loss, unless `threshold` is None, too: then to `switch_now` (in a run
      of `bertjax.train`: to a file of that name in its workdir).
    threshold: relative decrease of the averaged loss over a window.
    window: steps between two looks.
    patience: looks.
    earliest: step before which nothing is counted.
    decay: of the average.
  """

  step: int | None = None
  threshold: float | None = 5e-4
  window: int = 50
  patience: int = 3
  earliest: int = 100
  decay: float = 0.95

  def __post_init__(self):
    for field, least in (("window", 1), ("patience", 1), ("earliest", 0)):
      value = getattr(self, field)
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
          f"optim.precondition.switch.{field}={value!r} must be an int of at"
          f" least {least}."
        )
    if not 0 <= self.decay < 1:
      raise ValueError(
        f"optim.precondition.switch.decay={self.decay} must be in [0, 1)."
      )
    if self.step is not None and (
      isinstance(self.step, bool)
      or not isinstance(self.step, int)
      or self.step < 1
    ):
      raise ValueError(
        f"optim.precondition.switch.step={self.step!r} must be a positive int,"
        " or None."
      )

  def init(self) -> SwitchState:
    """Off."""
    return SwitchState(
      steps=jnp.zeros((), jnp.int32),
      loss=jnp.zeros((), jnp.float32),
      earlier=jnp.zeros((), jnp.float32),
      slow=jnp.zeros((), jnp.int32),
      on=jnp.zeros((), bool),
    )

  def advance(self, state: SwitchState, value: Any) -> SwitchState:
    """The state of the next step, after one whose loss was `value`.

    Raises:
      ValueError: there is no loss to watch.
    """
    steps = state.steps + 1
    if self.step is not None:
      return state._replace(steps=steps, on=state.on | (steps >= self.step))
    if self.threshold is None:
      return state._replace(steps=steps)
    if value is None:
      raise ValueError(
        "value is required: optim.precondition.switch watches the loss."
      )
    value = jnp.asarray(value, jnp.float32)
    averaged = self.decay * state.loss + (1 - self.decay) * value
    loss = jnp.where(state.steps == 0, value, averaged)
    look = steps % self.window == 0
    # The first look has nothing to compare with.
    compared = look & (steps > self.window) & (steps > self.earliest)
    # Multiplied out: a loss may be 0.
    is_slow = state.earlier - loss < self.threshold * state.earlier
    slow = jnp.where(
      compared, jnp.where(is_slow, state.slow + 1, 0), state.slow
    )
    return SwitchState(
      steps=steps,
      loss=loss,
      earlier=jnp.where(look, loss, state.earlier),
      slow=slow,
      on=state.on | (slow >= self.patience),
    )


def switch_now(opt_state: Any) -> Any:
  """The optimizer state with its switch thrown, whatever the rule says.

  Raises:
    ValueError: the state has no switch.
  """

  def is_switch(node):
    return isinstance(node, SwitchState)

  if not any(map(is_switch, jax.tree.leaves(opt_state, is_leaf=is_switch))):
    raise ValueError(
      "opt_state has no switch; give optim.precondition.switch a rule."
    )
  return jax.tree.map(
    lambda node: (
      node._replace(on=jnp.ones_like(node.on)) if is_switch(node) else node
    ),
    opt_state,
    is_leaf=is_switch,
  )
