"""When an optimizer's second moment has settled and may be frozen."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from bertjax.optim import durations


class PhaseState(NamedTuple):
  """Where a run of two phases is; a hand-over starts it again.

  Attributes:
    steps: taken since the first phase began.
    frozen: the second phase has begun.
    history: the l1 norms of the last steps' second moments; None unless the
      rule asks for them.
  """

  steps: Int[Array, ""]
  frozen: Bool[Array, ""]
  history: Float[Array, "n"] | None


class Intervals(NamedTuple):
  """When 0/1 Adam's rarer and rarer events are due; a hand-over restarts them.

  Attributes:
    next_variance: step of the next update of the variance.
    gap: steps between two of them.
    updates: since the gap last doubled.
    alone: steps since workers last synchronised.
    rate_sum: of the learning rates of those steps.
    since_freeze: steps since the variance was frozen.
  """

  next_variance: Int[Array, ""]
  gap: Int[Array, ""]
  updates: Int[Array, ""]
  alone: Int[Array, ""]
  rate_sum: Float[Array, ""]
  since_freeze: Int[Array, ""]

  @classmethod
  def init(cls) -> "Intervals":
    """Everything is due at the first step."""
    zero = jnp.zeros((), jnp.int32)
    one = jnp.ones((), jnp.int32)
    return cls(zero, one, zero, zero, jnp.zeros((), jnp.float32), zero)

  def variance_due(self, steps: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the step with this index updates the variance."""
    return steps >= self.next_variance

  def variance_done(self, updates: int) -> "Intervals":
    """After an update; the gap doubles after every so many."""
    full = self.updates + 1 >= updates
    # The gap in force counts before it doubles.
    return self._replace(
      next_variance=self.next_variance + self.gap,
      gap=jnp.where(full, jnp.minimum(self.gap * 2, 2**29), self.gap),
      updates=jnp.where(full, 0, self.updates + 1),
    )


@dataclasses.dataclass(frozen=True)
class FreezeRule:
  """Ends the first phase.

  Attributes:
    step: after that many steps; None asks the variance, with "auto", or nobody,
      with "manual" (see `freeze_now`).
    how: "step", "auto" or "manual".
    threshold: "auto" freezes when |v_old|_1 / |v|_1 reaches it.
    interval: by how many steps v_old is older.
    learning_rate: "auto" waits while it still rises.
  """

  how: Literal["step", "auto", "manual"]
  step: int | None = None
  threshold: float = 0.96
  interval: int = 0
  learning_rate: Callable[[Any], Any] | float = 0.0

  def init(self) -> PhaseState:
    """The state of a run's first step."""
    return PhaseState(
      jnp.zeros((), jnp.int32),
      jnp.zeros((), bool),
      jnp.zeros((self.interval,), jnp.float32) if self.how == "auto" else None,
    )

  def advance(self, state: PhaseState, nu: Any) -> PhaseState:
    """The state after a step of the first phase that left `nu` behind."""
    steps = optax.safe_increment(state.steps)
    if self.how == "manual":
      return state._replace(steps=steps)
    if self.how == "step":
      return state._replace(steps=steps, frozen=steps >= self.step)
    norm = sum(
      (jnp.sum(v) for v in jax.tree.leaves(nu)), jnp.zeros((), jnp.float32)
    )
    place = state.steps % self.interval
    old = state.history[place]
    settled = (state.steps >= self.interval) & (old >= self.threshold * norm)
    return PhaseState(
      steps=steps,
      frozen=settled & ~self._rises(state.steps),
      history=state.history.at[place].set(norm),
    )

  def _rises(self, steps: Int[Array, ""]) -> Bool[Array, ""]:
    if not callable(self.learning_rate):
      return jnp.array(False)
    after = self.learning_rate(optax.safe_increment(steps))
    return jnp.asarray(after > self.learning_rate(steps))


def first_phase(
  freeze_step: int | float, total_steps: int | None, learning_rate: Any
) -> int:
  """Steps of a first phase of fixed length.

  One that ends while the learning rate still warms up is logged as a warning
  and not refused: it is the ablation of the papers.

  Args:
    freeze_step: number of steps (int) or fraction of `total_steps` (float).
    total_steps: of the phase.
    learning_rate: number or schedule.

  Raises:
    ValueError: out of range, or a fraction of nobody knows what.
  """
  if isinstance(freeze_step, float) and total_steps is None:
    raise ValueError(
      f"optim.freeze_step={freeze_step} is a fraction and needs total_steps."
    )
  most = freeze_step if total_steps is None else total_steps
  steps = durations.steps_of(freeze_step, most, "optim.freeze_step")
  if steps < 1:
    raise ValueError(
      "optim.freeze_step=0 would freeze a second moment of zeros; the first"
      " phase takes at least one step."
    )
  if callable(learning_rate):
    with jax.ensure_compile_time_eval():
      rises = bool(learning_rate(steps + 1) > learning_rate(steps))
    if rises:
      logging.warning(
        "optim.freeze_step=%s freezes the second moment after %d steps, while"
        " the learning rate still warms up; it has not settled. Freeze it"
        " after optim.schedule.warmup.",
        freeze_step,
        steps,
      )
  return steps


def build_rule(
  freeze_step: int | float | str,
  *,
  threshold: float,
  interval: int | None,
  b2: float,
  total_steps: int | None,
  learning_rate: Any,
) -> FreezeRule:
  """The rule that an optimizer's options describe.

  Args:
    freeze_step: number of steps (int), fraction of `total_steps` (float),
      "auto" or "manual".
    threshold: for "auto".
    interval: for "auto", steps; None for 1 / (1 - b2).
    b2: decay of the second moment.
    total_steps: of the phase.
    learning_rate: number or schedule.

  Raises:
    ValueError: names the option that does not fit.
  """
  if freeze_step == "manual":
    return FreezeRule("manual")
  if freeze_step == "auto":
    if not 0 < threshold < 1:
      raise ValueError(
        f"optim.freeze_threshold={threshold} must be between 0 and 1."
      )
    interval = round(1 / (1 - b2)) if interval is None else interval
    if interval < 1:
      raise ValueError(f"optim.freeze_interval={interval} must be positive.")
    return FreezeRule("auto", None, threshold, interval, learning_rate)
  if isinstance(freeze_step, str):
    raise ValueError(
      f"optim.freeze_step={freeze_step!r} must be a number of steps (int), a"
      " fraction of them (float), 'auto' or 'manual'."
    )
  step = first_phase(freeze_step, total_steps, learning_rate)
  return FreezeRule("step", step)


def freeze_now(opt_state: Any) -> Any:
  """The optimizer state with its second phase begun, whatever the rule says.

  For callbacks, and for `freeze_step="manual"`.

  Raises:
    ValueError: the state has no phases, or no step of the first one was taken.
  """

  def is_phase(node):
    return isinstance(node, PhaseState)

  phases = filter(is_phase, jax.tree.leaves(opt_state, is_leaf=is_phase))
  taken = [int(phase.steps) for phase in phases]
  if not taken:
    raise ValueError("opt_state is of no optimizer with a phase to freeze.")
  if 0 in taken:
    raise ValueError(
      "the second moment is 0 and would freeze so; the first phase takes at"
      " least one step."
    )
  return jax.tree.map(
    lambda node: (
      node._replace(frozen=jnp.ones_like(node.frozen))
      if is_phase(node)
      else node
    ),
    opt_state,
    is_leaf=is_phase,
  )
