"""1-bit LAMB: layer-wise ratios that go on without full-precision gradients.

Li et al. 2021, arXiv:2104.06069. LAMB in the first phase, which also averages
each layer's trust ratio. In the second the momentum travels in one bit, the
variance that divides it is frozen, and the ratio is that average times how much
the variance, rebuilt from what was received, has changed since.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from bertjax import fields
from bertjax.optim import freezing, local, selection, trust_ratio
from bertjax.optim.adamw import AdamState, scale_by_adam
from bertjax.optim.onebit_adam import MaskFn, adam_direction, moving
from bertjax.parallel.error_feedback import ErrorFeedback, Workers
from bertjax.parallel.grids import Compression


class OneBitLambState(NamedTuple):
  """Moments, ratios, and what has not been sent.

  Trees like the parameters; those of ratios and scales have one number per
  layer, shape () or [l] for a scanned stack.

  Attributes:
    count: updates of the first moment.
    nu_count: updates of the frozen second moment.
    mu: first moment.
    nu: second moment, frozen in the second phase.
    fresh_nu: second moment rebuilt from what was received.
    ratio_mean: running mean of the first phase's trust ratios.
    ratio_count: how many it has seen.
    factor: of the last step, by which the mean was corrected.
    momentum_scale: brings the momenta of all layers to one magnitude.
    errors: zero until the second phase.
    phase: which phase it is.
  """

  count: Int[Array, ""]
  nu_count: Int[Array, ""]
  mu: Any
  nu: Any
  fresh_nu: Any
  ratio_mean: Any
  ratio_count: Any
  factor: Any
  momentum_scale: Any
  errors: ErrorFeedback
  phase: freezing.PhaseState


class _Directions(NamedTuple):
  """An update before what scales it, which has no need of the conditionals.

  Attributes:
    plain: directions without weight decay, a tree like the gradients.
    ratio: one number per layer.
  """

  plain: Any
  ratio: Any


class _Layers:
  """Norms and maxima of layers, and numbers back onto their tensors."""

  def __init__(self, stacked_axes: selection.AxesFn | Any | None):
    self._stacked = stacked_axes

  def norm(self, tree: Any) -> Any:
    squares = trust_ratio.sum_squares(tree, stacked_axes=self._stacked)
    return jax.tree.map(jnp.sqrt, squares)

  def rms(self, tree: Any) -> Any:
    means = trust_ratio.per_slice(
      jax.tree.map(jnp.square, tree), _mean, self._stacked
    )
    return jax.tree.map(jnp.sqrt, means)

  def largest(self, tree: Any) -> Any:
    return trust_ratio.per_slice(tree, _largest, self._stacked)

  def expand(self, numbers: Any, tree: Any) -> Any:
    return trust_ratio.expand_slices(numbers, tree, self._stacked)

  def scale(self, tree: Any, numbers: Any) -> Any:
    return jax.tree.map(jnp.multiply, tree, self.expand(numbers, tree))


def _mean(x: Array, axis: tuple[int, ...]) -> Array:
  count = math.prod(x.shape[i] for i in axis)
  return jnp.sum(x, axis) / max(1, count)


def _largest(x: Array, axis: tuple[int, ...]) -> Array:
  return jnp.max(x, axis, initial=0.0)


def momentum_scales(rms: Any) -> Any:
  """Factors that give every layer's momentum the mean of all magnitudes.

  Args:
    rms: tree of root mean squares, one per layer.
  """
  leaves = [x.reshape(-1) for x in jax.tree.leaves(rms)]
  everything = jnp.concatenate(leaves)
  moving_count = jnp.maximum(jnp.sum(everything > 0, dtype=jnp.float32), 1.0)
  mean = jnp.sum(everything) / moving_count
  return jax.tree.map(
    lambda x: jnp.where(x > 0, mean / jnp.where(x > 0, x, 1.0), 1.0), rms
  )


def onebit_lamb(
  learning_rate: float | optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  bias_correction: bool = True,
  trust_clip: tuple[float, float] = (0.01, 10.0),
  ratio_decay: float = 0.9,
  factor_clip: tuple[float, float] = (0.5, 4.0),
  factor_change: float = 0.1,
  freeze_step: int | float | str = 0.2,
  freeze_threshold: float = 0.96,
  freeze_interval: int | None = None,
  scale: str = "l1",
  granularity: str | int = "buffer",
  error_feedback: bool = True,
  scale_momentum: bool = True,
  mask: MaskFn | None = None,
  no_decay: selection.Rule = selection.is_bias_or_norm,
  no_adaptation: selection.Rule = selection.is_bias_or_norm,
  stacked_axes: selection.AxesFn | Any | None = None,
  workers: Workers = Workers(),  # noqa: B008 frozen
  total_steps: int | None = None,
) -> local.LocalGradientTransformation:
  """LAMB that averages its momentum in one bit after a first phase.

  In the second phase, for each layer, with kappa its momentum scale:

      m <- compressed mean of kappa (b1 m + (1 - b1) g_i), divided by kappa
      g~ = (m - b1 m_old) / (1 - b1);   v~ <- b2 v~ + (1 - b2) g~^2
      f = max over coordinates of (sqrt(v) + eps) / (sqrt(v~) + eps)
      f <- clip(f rho + 1 - rho), rho = min(1, |r| / |u|) with weight decay
      w <- w - lr_t (mean ratio) f u,   u = r + weight_decay w

  where r = m^ / (sqrt(v^) + eps) with v frozen.

  Args:
    learning_rate: number or schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: outside the square root.
    weight_decay: inside the ratio, as in LAMB.
    bias_correction: divide the moments by (1 - b^t).
    trust_clip: bounds on the ratio; (0.01, 0.3) for BERT-large.
    ratio_decay: of the running mean of ratios; until it has seen
      1 / (1 - ratio_decay) of them it is their plain mean.
    factor_clip: bounds on f.
    factor_change: how much f may differ from the last step's, as a share.
    freeze_step: see `onebit_adam`; likewise freeze_threshold,
      freeze_interval, scale, granularity, error_feedback and mask.
    freeze_threshold: for "auto".
    freeze_interval: for "auto".
    scale: "l1" or "rms".
    granularity: what shares a scale.
    error_feedback: False is for ablations.
    scale_momentum: False leaves kappa at 1.
    mask: what may move in the second phase.
    no_decay: tensors without weight decay.
    no_adaptation: tensors with ratio 1 in both phases.
    stacked_axes: set by the builder; likewise workers and total_steps.
    workers: who averages.
    total_steps: of the phase.

  Raises:
    ValueError: an argument out of range.

  Reference: Li et al. 2021, arXiv:2104.06069, algorithm 1.
  """
  _check(weight_decay, trust_clip, factor_clip, ratio_decay, factor_change)
  rule = freezing.build_rule(
    freeze_step,
    threshold=freeze_threshold,
    interval=freeze_interval,
    b2=b2,
    total_steps=total_steps,
    learning_rate=learning_rate,
  )
  algorithm = _OneBitLamb(
    b1=b1,
    b2=b2,
    eps=eps,
    weight_decay=weight_decay,
    bias_correction=bias_correction,
    trust_clip=trust_clip,
    ratio_decay=ratio_decay,
    factor_clip=factor_clip,
    factor_change=factor_change,
    rule=rule,
    compression=local.build_compression(scale, granularity, error_feedback),
    scale_momentum=scale_momentum,
    mask=mask,
    no_decay=no_decay,
    no_adaptation=no_adaptation,
    layers=_Layers(stacked_axes),
    workers=workers,
  )
  return local.local_chain(
    workers,
    optax.GradientTransformationExtraArgs(algorithm.init, algorithm.update),
    optax.stateless(algorithm.scaled),
    optax.scale_by_learning_rate(learning_rate),
  )


@dataclasses.dataclass(frozen=True)
class _OneBitLamb:
  """The two phases; fields as the arguments of `onebit_lamb`."""

  b1: float
  b2: float
  eps: float
  weight_decay: float
  bias_correction: bool
  trust_clip: tuple[float, float]
  ratio_decay: float
  factor_clip: tuple[float, float]
  factor_change: float
  rule: freezing.FreezeRule
  compression: Compression
  scale_momentum: bool
  mask: MaskFn | None
  no_decay: selection.Rule
  no_adaptation: selection.Rule
  layers: _Layers
  workers: Workers

  @property
  def _adam(self) -> optax.GradientTransformationExtraArgs:
    return scale_by_adam(
      self.b1, self.b2, self.eps, bias_correction=self.bias_correction
    )

  def init(self, params: Any) -> OneBitLambState:
    selection.select(self.no_decay, params, "optim.no_decay")
    self._unadapted(params)
    first = self._adam.init(params)
    ones = jax.tree.map(jnp.ones_like, self.layers.norm(first.nu))
    return OneBitLambState(
      count=first.count,
      nu_count=jnp.zeros((), jnp.int32),
      mu=first.mu,
      nu=first.nu,
      fresh_nu=jax.tree.map(jnp.zeros_like, first.nu),
      ratio_mean=ones,
      ratio_count=jax.tree.map(jnp.zeros_like, ones),
      factor=jax.tree.map(jnp.ones_like, ones),
      momentum_scale=jax.tree.map(jnp.ones_like, ones),
      errors=self.workers.no_errors(params, self.compression),
      phase=self.rule.init(),
    )

  def update(self, updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError("params is required: the trust ratio needs the weights.")
    grads = local.float32(updates)
    directions, after = jax.lax.cond(
      state.phase.frozen, self._second, self._first, grads, state, params
    )
    plain = jax.tree.map(
      lambda u, like: u.astype(like.dtype), directions.plain, updates
    )
    return directions._replace(plain=plain), after

  def scaled(self, directions, params):
    """The update: directions, weight decay and ratios."""
    moved = self._decayed(directions.plain, params)
    return self.layers.scale(moved, directions.ratio)

  def _first(self, grads, state, params):
    """LAMB; remembers ratios and magnitudes."""
    before = AdamState(state.count, state.mu, state.nu)
    directions, after = self._adam.update(self.workers.sum(grads), before)
    moved = self._decayed(directions, params)
    ratio, adapted = self._ratios(params, moved)
    mean, count = self._averaged(state, ratio, adapted)
    scales = state.momentum_scale
    if self.scale_momentum:
      scales = momentum_scales(self.layers.rms(after.mu))
    return _Directions(directions, ratio), state._replace(
      count=after.count,
      nu_count=optax.safe_increment(state.nu_count),
      mu=after.mu,
      nu=after.nu,
      fresh_nu=after.nu,
      ratio_mean=mean,
      ratio_count=count,
      factor=jax.tree.map(jnp.ones_like, state.factor),
      momentum_scale=scales,
      phase=self.rule.advance(state.phase, after.nu),
    )

  def _second(self, grads, state, params):
    """The momentum in one bit; ratios from its own changes."""
    b1, b2 = self.b1, self.b2
    moves = moving(state.nu, self.mask)
    mu = jax.tree.map(
      lambda m, g: b1 * m + (1 - b1) * g, state.mu, self.workers.own(grads)
    )
    mu, errors = self.workers.compressed_mean(
      self.layers.scale(mu, state.momentum_scale),
      state.errors,
      self.compression,
      moves,
    )
    shrink = jax.tree.map(lambda k: 1 / k, state.momentum_scale)
    mu = self.layers.scale(mu, shrink)
    rebuilt = jax.tree.map(
      lambda m, old: (m - b1 * old) / (1 - b1), mu, state.mu
    )
    fresh = jax.tree.map(
      lambda g, v: b2 * v + (1 - b2) * jnp.square(g), rebuilt, state.fresh_nu
    )
    count = optax.safe_increment(state.count)
    directions = adam_direction(
      mu,
      state.nu,
      count,
      state.nu_count,
      betas=(b1, b2),
      eps=self.eps,
      bias_correction=self.bias_correction,
    )
    moved = self._decayed(directions, params)
    growth = self._growth(state, fresh, moves)
    factor = self._factors(state, growth, directions, moved)
    ratio = jax.tree.map(jnp.multiply, state.ratio_mean, factor)
    after = state._replace(
      count=count,
      mu=mu,
      fresh_nu=fresh,
      factor=factor,
      errors=errors,
      phase=state.phase._replace(steps=optax.safe_increment(state.phase.steps)),
    )
    # Taken as one, XLA computes them in one pass over memory.
    return jax.lax.optimization_barrier((_Directions(directions, ratio), after))

  def _unadapted(self, params):
    return selection.select(self.no_adaptation, params, "optim.no_adaptation")

  def _decayed(self, directions, params):
    excluded = selection.select(self.no_decay, params, "optim.no_decay")

    def one(r, w, out):
      return r if out else r + self.weight_decay * w

    return jax.tree.map(one, directions, params, excluded)

  def _ratios(self, params, moved):
    """LAMB's clipped trust ratios, 1 where there is none, and where one is."""

    def usable(w, u, out):
      return jnp.zeros_like(w, bool) if out else (w > 0) & (u > 0)

    def one(w, u, yes):
      ratio = jnp.clip(w / jnp.where(yes, u, 1.0), *self.trust_clip)
      return jnp.where(yes, ratio, 1.0)

    weights, updates = self.layers.norm(params), self.layers.norm(moved)
    adapted = jax.tree.map(usable, weights, updates, self._unadapted(params))
    return jax.tree.map(one, weights, updates, adapted), adapted

  def _averaged(self, state, ratio, adapted):
    """Running means of the ratios, and how many they have seen."""

    def counted(n, yes):
      return n + yes.astype(jnp.float32)

    def averaged(old, r, n, yes):
      share = jnp.maximum(1 - self.ratio_decay, 1 / jnp.maximum(n, 1.0))
      return jnp.where(yes, old + (r - old) * share, old)

    count = jax.tree.map(counted, state.ratio_count, adapted)
    mean = jax.tree.map(averaged, state.ratio_mean, ratio, count, adapted)
    return mean, count

  def _growth(self, state, fresh, moves):
    """How much smaller than the frozen one the rebuilt variance can be."""
    correction = jnp.float32(1)
    if self.bias_correction:
      correction = 1 - self.b2 ** state.nu_count.astype(jnp.float32)

    def one(v, f, ok):
      root = jnp.sqrt(v / correction) + self.eps
      return jnp.where(ok, root / (jnp.sqrt(f / correction) + self.eps), 0.0)

    return self.layers.largest(jax.tree.map(one, state.nu, fresh, moves))

  def _factors(self, state, growth, directions, moved):
    """By what the mean ratio is corrected."""

    def one(factor, plain, decayed, old, out):
      if out:
        return old
      if self.weight_decay:
        rho = plain / jnp.where(decayed > 0, decayed, 1.0)
        rho = jnp.minimum(rho, 1.0)
        factor = factor * rho + 1 - rho
      factor = jnp.clip(factor, *self.factor_clip)
      change = self.factor_change
      return jnp.clip(factor, old * (1 - change), old * (1 + change))

    return jax.tree.map(
      one,
      growth,
      self.layers.norm(directions),
      self.layers.norm(moved),
      state.factor,
      self._unadapted(directions),
    )


def _check(weight_decay, trust_clip, factor_clip, ratio_decay, factor_change):
  if weight_decay < 0:
    raise ValueError(f"optim.weight_decay={weight_decay} must not be negative.")
  for field, bounds in (
    ("trust_clip", trust_clip),
    ("factor_clip", factor_clip),
  ):
    if not (fields.INTERVAL.holds(bounds) and 0 < bounds[0] <= bounds[1]):
      raise ValueError(
        f"optim.{field}={bounds!r} must be (lowest, highest) with"
        " 0 < lowest <= highest."
      )
  for field, value in (
    ("ratio_decay", ratio_decay), ("factor_change", factor_change)
  ):  # fmt: skip
    if not 0 <= value < 1:
      raise ValueError(f"optim.{field}={value} must be in [0, 1).")
