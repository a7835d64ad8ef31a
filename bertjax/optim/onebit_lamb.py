"""1-bit LAMB: layer-wise ratios that go on without full-precision gradients.

Li et al. 2021, arXiv:2104.06069. LAMB in the first phase, which also averages
each layer's trust ratio. In the second the momentum travels in one bit, the
variance that divides it is frozen, and the ratio is that average times how much
the variance, rebuilt from what was received, has changed since.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from bertjax.optim import by_layer, freezing, local, selection, trust_ratio
from bertjax.optim.adamw import AdamState, scale_by_adam
from bertjax.optim.onebit_adam import MaskFn, adam_direction, moving
from bertjax.parallel.compressed import Compression
from bertjax.parallel.error_feedback import ErrorFeedback, Workers


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


class _Layers:
  """Norms and maxima of layers, and numbers back onto their tensors."""

  def __init__(self, stacked_axes: selection.AxesFn):
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
    stacked=selection.as_axes_fn(stacked_axes),
    workers=workers,
  )
  return local.local_chain(
    workers,
    optax.GradientTransformationExtraArgs(algorithm.init, algorithm.update),
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
  stacked: selection.AxesFn
  workers: Workers

  @property
  def _adam(self) -> optax.GradientTransformationExtraArgs:
    return scale_by_adam(
      self.b1, self.b2, self.eps, bias_correction=self.bias_correction
    )

  def init(self, params: Any) -> OneBitLambState:
    selection.select(self.no_decay, params, "optim.no_decay")
    selection.select(self.no_adaptation, params, "optim.no_adaptation")
    first = self._adam.init(params)
    ones = jax.tree.map(jnp.ones_like, _Layers(self.stacked).norm(first.nu))
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
    return jax.tree.map(
      lambda u, like: u.astype(like.dtype), directions, updates
    ), after

  def _first(self, grads, state, params):
    """LAMB; remembers ratios and magnitudes."""
    rules = _Rules.of(self, params)

    def layers(carried, read, stacked, on_chip):
      grads, mu, nu, _, mean, seen, scales = carried
      (params,) = read
      norms = _Layers(stacked)
      moved, after = self._adam.update(grads, AdamState(state.count, mu, nu))
      moved = self._decayed(moved, params, rules)
      if on_chip:
        moved, params = jax.lax.optimization_barrier((moved, params))
      ratio = self._ratios(norms.norm(params), norms.norm(moved), rules)
      mean, seen = self._averaged(mean, seen, ratio)
      if self.scale_momentum:
        scales = norms.rms(after.mu)
      moved = norms.scale(moved, ratio)
      return moved, after.mu, after.nu, after.nu, mean, seen, scales

    moved, mu, nu, fresh, mean, seen, scales = self._by_layer(
      layers,
      (
        self.workers.sum(grads),
        state.mu,
        state.nu,
        state.fresh_nu,
        state.ratio_mean,
        state.ratio_count,
        state.momentum_scale,
      ),
      (params,),
    )
    return moved, state._replace(
      count=optax.safe_increment(state.count),
      nu_count=optax.safe_increment(state.nu_count),
      mu=mu,
      nu=nu,
      fresh_nu=fresh,
      ratio_mean=mean,
      ratio_count=seen,
      factor=jax.tree.map(jnp.ones_like, state.factor),
      momentum_scale=momentum_scales(scales) if self.scale_momentum else scales,
      phase=self.rule.advance(state.phase, nu),
    )

  def _second(self, grads, state, params):
    """The momentum in one bit; ratios from its own changes."""
    rules = _Rules.of(self, params)
    moves = moving(state.nu, self.mask)
    mean, errors = self._mean(grads, state, moves)
    count = optax.safe_increment(state.count)

    def layers(carried, read, stacked, on_chip):
      mu, old, fresh, factor = carried
      nu, params, moves, scales, ratio = read
      norms = _Layers(stacked)
      mu = norms.scale(mu, jax.tree.map(lambda k: 1 / k, scales))
      fresh = self._rebuilt(mu, old, fresh)
      plain = adam_direction(
        mu,
        nu,
        count,
        state.nu_count,
        betas=(self.b1, self.b2),
        eps=self.eps,
        bias_correction=self.bias_correction,
      )
      moved = self._decayed(plain, params, rules)
      if on_chip:
        mu, fresh, plain, moved = jax.lax.optimization_barrier(
          (mu, fresh, plain, moved)
        )
      growth = norms.largest(self._growth(state.nu_count, nu, fresh, moves))
      factor = self._factors(
        factor, growth, norms.norm(plain), norms.norm(moved), rules
      )
      ratio = jax.tree.map(jnp.multiply, ratio, factor)
      return norms.scale(moved, ratio), mu, fresh, factor

    moved, mu, fresh, factor = self._by_layer(
      layers,
      (mean, state.mu, state.fresh_nu, state.factor),
      (state.nu, params, moves, state.momentum_scale, state.ratio_mean),
    )
    return moved, state._replace(
      count=count,
      mu=mu,
      fresh_nu=fresh,
      factor=factor,
      errors=errors,
      phase=state.phase._replace(steps=optax.safe_increment(state.phase.steps)),
    )

  def _by_layer(self, function, carried, read):
    """`by_layer.updated`, where a loop over layers is a gain."""
    on_chip = by_layer.on_chip_bytes(self.workers.mesh)
    return by_layer.updated(
      function,
      carried,
      read,
      stacked=self.stacked,
      names=by_layer.looped(carried[0], self.stacked, on_chip),
    )

  def _mean(self, grads, state, moves):
    """The workers' momentum times its scales, and new errors."""
    b1 = self.b1
    mu = jax.tree.map(
      lambda m, g: b1 * m + (1 - b1) * g, state.mu, self.workers.own(grads)
    )
    return self.workers.compressed_mean(
      _Layers(self.stacked).scale(mu, state.momentum_scale),
      state.errors,
      self.compression,
      moves,
    )

  def _rebuilt(self, mu, old, fresh):
    """The second moment of the gradients that the momentum has seen."""
    b1, b2 = self.b1, self.b2

    def one(m, before, v):
      gradient = (m - b1 * before) / (1 - b1)
      return b2 * v + (1 - b2) * jnp.square(gradient)

    return jax.tree.map(one, mu, old, fresh)

  def _decayed(self, directions, params, rules):
    return {
      name: r
      if rules.no_decay[name]
      else r + self.weight_decay * params[name]
      for name, r in directions.items()
    }

  def _ratios(self, weights, updates, rules):
    """LAMB's clipped trust ratios, of norms."""

    def one(name, w, u):
      usable = (w > 0) & (u > 0)
      ratio = jnp.clip(w / jnp.where(usable, u, 1.0), *self.trust_clip)
      if rules.no_adaptation[name]:
        return jnp.ones_like(w)
      return jnp.where(usable, ratio, 1.0)

    return {name: one(name, w, updates[name]) for name, w in weights.items()}

  def _averaged(self, mean, seen, ratio):
    """Running means of the ratios, and how many they have seen."""

    def counted(n, r):
      return n + (r != 1).astype(jnp.float32)

    def averaged(old, r, n):
      share = jnp.maximum(1 - self.ratio_decay, 1 / jnp.maximum(n, 1.0))
      return jnp.where(r != 1, old + (r - old) * share, old)

    seen = jax.tree.map(counted, seen, ratio)
    return jax.tree.map(averaged, mean, ratio, seen), seen

  def _growth(self, nu_count, nu, fresh, moves):
    """How much smaller than the frozen one the rebuilt variance is."""
    correction = jnp.float32(1)
    if self.bias_correction:
      correction = 1 - self.b2 ** nu_count.astype(jnp.float32)

    def one(v, f, ok):
      root = jnp.sqrt(v / correction) + self.eps
      return jnp.where(ok, root / (jnp.sqrt(f / correction) + self.eps), 0.0)

    return jax.tree.map(one, nu, fresh, moves)

  def _factors(self, old, growth, plain, decayed, rules):
    """By what the mean ratio is corrected; `plain`, `decayed` are norms."""

    def one(name, factor, plain, decayed, old):
      if rules.no_adaptation[name]:
        return old
      if self.weight_decay:
        rho = plain / jnp.where(decayed > 0, decayed, 1.0)
        rho = jnp.minimum(rho, 1.0)
        factor = factor * rho + 1 - rho
      factor = jnp.clip(factor, *self.factor_clip)
      change = self.factor_change
      return jnp.clip(factor, old * (1 - change), old * (1 + change))

    return {
      name: one(name, factor, plain[name], decayed[name], old[name])
      for name, factor in growth.items()
    }


class _Rules(NamedTuple):
  """By path name, what the options select."""

  no_decay: Mapping[str, bool]
  no_adaptation: Mapping[str, bool]

  @classmethod
  def of(cls, options: _OneBitLamb, params: Any) -> "_Rules":
    """Of these parameters."""
    return cls(
      *(
        selection.by_name(
          selection.select(getattr(options, field), params, f"optim.{field}")
        )
        for field in cls._fields
      )
    )


def _check(weight_decay, trust_clip, factor_clip, ratio_decay, factor_change):
  if weight_decay < 0:
    raise ValueError(f"optim.weight_decay={weight_decay} must not be negative.")
  for field, bounds in (
    ("trust_clip", trust_clip),
    ("factor_clip", factor_clip),
  ):
    if not 0 < bounds[0] <= bounds[1]:
      raise ValueError(
        f"optim.{field}={tuple(bounds)} must be (lowest, highest) with"
        " 0 < lowest <= highest."
      )
  for field, value in (
    ("ratio_decay", ratio_decay), ("factor_change", factor_change)
  ):  # fmt: skip
    if not 0 <= value < 1:
      raise ValueError(f"optim.{field}={value} must be in [0, 1).")
