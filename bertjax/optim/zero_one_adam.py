"""0/1 Adam: no long phase of full precision, and steps that send nothing.

Lu et al. 2022, arXiv:2202.06009. The variance is updated at ever rarer steps,
the only ones that send gradients in full precision; between them gradients
travel in one bit. Once the variance is frozen workers step by themselves and
synchronise, in one bit, at ever rarer steps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bertjax.optim import freezing, local, rates, selection
from bertjax.optim.onebit_adam import moving
from bertjax.parallel.error_feedback import (
  Drift,
  ErrorFeedback,
  PerWorker,
  Workers,
)
from bertjax.parallel.grids import Compression


class ZeroOneAdamState(NamedTuple):
  """Moments, where each worker has gone, and what has not been sent.

  Attributes:
    mu: first moment, of each worker after the freeze.
    nu: second moment.
    drift: how far a worker is from the last common parameters.
    errors: of gradients before the freeze, of drifts after it.
    phase: steps, and whether the variance is frozen.
    intervals: when something is due.
  """

  mu: PerWorker
  nu: Any
  drift: Drift
  errors: ErrorFeedback
  phase: freezing.PhaseState
  intervals: freezing.Intervals


def zero_one_adam(
  learning_rate: float | optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  freeze_step: int | float = 0.2,
  variance_updates: int = 16,
  local_step_scaler: int = 32_678,
  local_step_clipper: int = 16,
  scale: str = "l1",
  granularity: str | int = "buffer",
  error_feedback: bool = True,
  no_decay: selection.Rule = selection.is_bias_or_norm,
  workers: Workers = Workers(),  # noqa: B008 frozen
  rate_factors: Mapping[str, Any] | None = None,
  total_steps: int | None = None,
) -> local.LocalGradientTransformation:
  """AdamW without bias correction whose steps send one bit, or none.

  Before the freeze, m <- b1 m + (1 - b1) g with g the averaged gradient: in
  full precision where v is updated too, else compressed. After it, by worker,

      m <- b1 m + (1 - b1) g_i;  d = m / (sqrt(v) + eps) + weight_decay (w + u)
      u <- u - lr_t d;  S <- S + lr_t

  and at a synchronisation, with U the compressed mean of u (sqrt(v) + eps),

      w <- w + U / (sqrt(v) + eps);  m <- -U / S;  u, S <- 0

  Workers compute gradients at w + u. Between synchronisations `params` are the
  last common ones; evaluations and exports see those.

  Args:
    learning_rate: number or schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: outside the square root.
    weight_decay: decoupled.
    freeze_step: of the variance: steps (int) or fraction of all (float);
      usually the end of warm-up. `freezing.freeze_now` is earlier.
    variance_updates: after so many updates of the variance the steps between
      two of them double.
    local_step_scaler: after so many steps since the freeze the steps between
      two synchronisations double,
    local_step_clipper: up to this number; 1 synchronises every step.
    scale: see `Compression`; likewise granularity and error_feedback.
    granularity: what shares a scale.
    error_feedback: False is for ablations.
    no_decay: tensors without weight decay.
    workers: set by the builder; likewise rate_factors and total_steps.
    rate_factors: by path name, what lr_t is multiplied by (`rates.Factors`):
      a worker that walks alone must walk so far, too. What is sent, and m, are
      as without them.
    total_steps: of the phase.

  Raises:
    ValueError: an argument out of range.

  Reference: Lu et al. 2022, arXiv:2202.06009, algorithm 1 and its code.
  """
  for field, value in (
    ("variance_updates", variance_updates),
    ("local_step_scaler", local_step_scaler),
    ("local_step_clipper", local_step_clipper),
  ):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"optim.{field}={value!r} must be a positive int.")
  for field, value in (("b1", b1), ("b2", b2)):
    if not 0 <= value < 1:
      raise ValueError(f"optim.{field}={value} must be in [0, 1).")
  for field, value in (("eps", eps), ("weight_decay", weight_decay)):
    if not value >= 0:
      raise ValueError(f"optim.{field}={value} must not be negative.")
  algorithm = _ZeroOneAdam(
    learning_rate=learning_rate,
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    freeze_step=freezing.first_phase(freeze_step, total_steps, learning_rate),
    variance_updates=variance_updates,
    local_step_scaler=local_step_scaler,
    local_step_clipper=local_step_clipper,
    compression=local.build_compression(scale, granularity, error_feedback),
    no_decay=no_decay,
    workers=workers,
    rate_factors=rate_factors or {},
  )
  return local.local_chain(
    workers,
    optax.GradientTransformationExtraArgs(algorithm.init, algorithm.update),
  )


class _Step(NamedTuple):
  """What a step has at hand, all of it this worker's."""

  grads: Any
  state: ZeroOneAdamState
  params: Any
  rate: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class _ZeroOneAdam:
  """The four kinds of steps; fields as the arguments of `zero_one_adam`."""

  learning_rate: float | optax.Schedule
  b1: float
  b2: float
  eps: float
  weight_decay: float
  freeze_step: int
  variance_updates: int
  local_step_scaler: int
  local_step_clipper: int
  compression: Compression
  no_decay: selection.Rule
  workers: Workers
  rate_factors: Mapping[str, Any]

  def init(self, params: Any) -> ZeroOneAdamState:
    selection.select(self.no_decay, params, "optim.no_decay")
    zeros = self.workers.zeros(params).tree
    return ZeroOneAdamState(
      mu=PerWorker(zeros),
      nu=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
      drift=Drift(zeros),
      errors=self.workers.no_errors(params, self.compression),
      phase=freezing.FreezeRule("step", self.freeze_step).init(),
      intervals=freezing.Intervals.init(),
    )

  def update(self, updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError("params is required: weight decay needs the weights.")
    steps = state.phase.steps
    rate = self.learning_rate
    rate = jnp.asarray(rate(steps) if callable(rate) else rate, jnp.float32)
    due = state.intervals.variance_due(steps)
    before = jnp.where(due, 0, 1)
    kind = jnp.where(
      state.phase.frozen,
      jnp.where(self._sync_due(state), 3, 2),
      before,
    )
    moved, state = jax.lax.switch(
      kind,
      (self._variance, self._gradient, self._alone, self._synchronise),
      _Step(local.float32(updates), state, params, rate),
    )
    steps = optax.safe_increment(steps)
    phase = state.phase._replace(
      steps=steps, frozen=state.phase.frozen | (steps >= self.freeze_step)
    )
    moved = jax.tree.map(lambda u, like: u.astype(like.dtype), moved, updates)
    return moved, state._replace(phase=phase)

  def _sync_due(self, state: ZeroOneAdamState) -> Array:
    # Doubling is capped long before 2^30.
    doublings = jnp.minimum(
      state.intervals.since_freeze // self.local_step_scaler, 30
    )
    gap = jnp.minimum(
      jnp.left_shift(jnp.int32(1), doublings.astype(jnp.int32)),
      self.local_step_clipper,
    )
    return state.intervals.alone + 1 >= gap

  def _variance(self, step: _Step):
    """The gradient in full precision; both moments."""
    mean = self.workers.sum(step.grads)
    nu = jax.tree.map(
      lambda v, g: self.b2 * v + (1 - self.b2) * g * g, step.state.nu, mean
    )
    state = step.state._replace(
      nu=nu,
      intervals=step.state.intervals.variance_done(self.variance_updates),
    )
    return self._moved(step, state, mean)

  def _gradient(self, step: _Step):
    """The gradient in one bit; only the first moment."""
    mean, errors = self.workers.compressed_mean(
      self.workers.own(step.grads),
      step.state.errors,
      self.compression,
      moving(step.state.nu, None),
    )
    return self._moved(step, step.state._replace(errors=errors), mean)

  def _moved(self, step: _Step, state: ZeroOneAdamState, mean: Any):
    """An Adam step before the freeze."""
    mu = self._momentum(state, mean)
    directions = self._directions(mu, state.nu, step.params)
    moved = jax.tree.map(lambda d: -step.rate * d, directions)
    return self._at_own_rates(moved), state._replace(mu=_own(mu))

  def _walk(self, step: _Step) -> tuple[Any, Any, Array]:
    """A worker's own step: its moment, its drift and the sum of rates."""
    state = step.state
    mu = self._momentum(state, self.workers.own(step.grads))
    drift = _mine(state.drift)
    here = jax.tree.map(jnp.add, step.params, drift)
    directions = self._directions(mu, state.nu, here)
    taken = jax.tree.map(lambda d: -step.rate * d, directions)
    drift = jax.tree.map(jnp.add, drift, self._at_own_rates(taken))
    return mu, drift, state.intervals.rate_sum + step.rate

  def _at_own_rates(self, tree: Any) -> Any:
    return rates.scaled(tree, self.rate_factors)

  def _at_one_rate(self, tree: Any) -> Any:
    inverse = {name: 1.0 / x for name, x in self.rate_factors.items()}
    return rates.scaled(tree, inverse)

  def _alone(self, step: _Step):
    """Sends nothing."""
    mu, drift, rate_sum = self._walk(step)
    intervals = step.state.intervals
    return jax.tree.map(jnp.zeros_like, step.params), step.state._replace(
      mu=_own(mu),
      drift=Drift(_own(drift).tree),
      intervals=intervals._replace(
        alone=intervals.alone + 1,
        rate_sum=rate_sum,
        since_freeze=optax.safe_increment(intervals.since_freeze),
      ),
    )

  def _synchronise(self, step: _Step):
    """Averages where the workers have gone, in one bit."""
    mu, drift, rate_sum = self._walk(step)
    intervals = step.state.intervals
    roots = jax.tree.map(lambda v: jnp.sqrt(v) + self.eps, step.state.nu)
    # What gradients left is of no use to drifts. The first frozen step is no
    # step alone, so none of it gets past here.
    first = intervals.since_freeze == 0
    mean, errors = self.workers.compressed_mean(
      jax.tree.map(jnp.multiply, self._at_one_rate(drift), roots),
      jax.tree.map(lambda e: jnp.where(first, 0.0, e), step.state.errors),
      self.compression,
      moving(step.state.nu, None),
    )
    usable = rate_sum > 0
    mu = jax.tree.map(
      lambda u, m: jnp.where(usable, -u / jnp.where(usable, rate_sum, 1.0), m),
      mean,
      mu,
    )
    state = step.state._replace(
      mu=_own(mu),
      drift=jax.tree.map(jnp.zeros_like, step.state.drift),
      errors=errors,
      intervals=intervals._replace(
        alone=jnp.zeros((), jnp.int32),
        rate_sum=jnp.zeros((), jnp.float32),
        since_freeze=optax.safe_increment(intervals.since_freeze),
      ),
    )
    moved = jax.tree.map(
      lambda u, v, root: jnp.where(v > 0, u / root, 0.0),
      mean,
      step.state.nu,
      roots,
    )
    return self._at_own_rates(moved), state

  def _momentum(self, state: ZeroOneAdamState, grads: Any) -> Any:
    return jax.tree.map(
      lambda m, g: self.b1 * m + (1 - self.b1) * g, _mine(state.mu), grads
    )

  def _directions(self, mu: Any, nu: Any, params: Any) -> Any:
    excluded = selection.select(self.no_decay, params, "optim.no_decay")

    def one(m, v, w, out):
      direction = jnp.where(v > 0, m / (jnp.sqrt(v) + self.eps), 0.0)
      # What has no variance is not averaged, so decay must not move it either.
      decay = 0.0 if out else self.weight_decay
      return direction + jnp.where(v > 0, decay * w, 0.0)

    return jax.tree.map(one, mu, nu, params, excluded)


def _mine(node: PerWorker) -> Any:
  return jax.tree.map(lambda x: x[0], node.tree)


def _own(tree: Any) -> PerWorker:
  return PerWorker(jax.tree.map(lambda x: x[None], tree))
