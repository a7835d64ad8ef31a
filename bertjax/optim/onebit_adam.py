"""1-bit Adam: momentum in one bit per number once the variance has settled.

Tang et al. 2021, arXiv:2102.02888. Beside it stand the compressors that the
paper compares with: gradients in one bit, with and without error feedback.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from bertjax import fields, rules
from bertjax.optim import freezing, local, selection
from bertjax.optim.adamw import AdamState, add_weight_decay, scale_by_adam
from bertjax.parallel.error_feedback import ErrorFeedback, Workers
from bertjax.parallel.grids import Compression

# (name, leaf) -> None, or booleans shaped like the leaf: what may move.
MaskFn = Callable[[str, Any], Any]
# Of float32 sums that cancel: root mean square over that of the whole gradient.
ROUNDING = 1e-6


class OneBitAdamState(NamedTuple):
  """Moments, and what has not been sent.

  Attributes:
    count: updates of the first moment.
    nu_count: updates of the second.
    mu: first moment, the same on every worker.
    nu: second moment.
    errors: zero until the second phase.
    phase: which phase it is.
  """

  count: Int[Array, ""]
  nu_count: Int[Array, ""]
  mu: Any
  nu: Any
  errors: ErrorFeedback
  phase: freezing.PhaseState


def rows_mask(
  rows: Sequence[tuple[str, int]] | MaskFn | None, params: Any
) -> MaskFn | None:
  """What an option `mask` means; a function stays as it is.

  Args:
    rows: `[(regex, n)]`: of tensors whose path the expression is found in, the
      first n along their first axis may move; the first match counts.
    params: that the expressions are checked against.

  Raises:
    ValueError: no such list, an expression that matches nothing, or no positive
      n.
  """
  if rows is None or callable(rows):
    return rows
  if not fields.FACTORS.holds(rows):
    raise ValueError(
      f"optim.mask={rows!r} must be a list of pairs (regex, number of rows), or"
      " None."
    )
  for pattern, n in rows:
    if not fields.POSITIVE_INTEGER.holds(n):
      raise ValueError(
        f"optim.mask: {n!r} rows of {pattern!r} must be a positive int; to hold"
        " a whole tensor back list it in optim.freeze."
      )
  found = rules.match([*rows, (".*", 0)], params, "optim.mask")
  first = selection.by_name(found)

  def mask(name, leaf):
    if not first[name] or not leaf.ndim:
      return None
    moves = jnp.arange(leaf.shape[0]) < first[name]
    moves = moves.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.broadcast_to(moves, leaf.shape)

  return mask


def moving(nu: Any, mask: MaskFn | None) -> Any:
  """Where a frozen second moment lets parameters move: a tree of booleans.

  What never had a gradient (rows of positions or words that do not occur) has
  no variance to divide by, and one bit cannot say that its momentum is 0. The
  same goes for gradients of mere rounding: that of a key's bias, which shifts
  all logits alike, is 0 but for it, and a scale that others share would move it
  by scale / eps in every step.
  """
  leaves = jax.tree.leaves(nu)
  size = max(1, sum(v.size for v in leaves))
  total = sum((jnp.sum(v) for v in leaves), jnp.zeros((), jnp.float32))
  rounding = ROUNDING**2 * total / size

  def one(path, v):
    allowed = None if mask is None else mask(rules.path_name(path), v)
    moves = (v > 0) & (v > rounding)
    return moves if allowed is None else moves & jnp.asarray(allowed, bool)

  return jax.tree_util.tree_map_with_path(one, nu)


def adam_direction(mu, nu, count, nu_count, *, betas, eps, bias_correction):
  """m^ / (sqrt(v^) + eps), and 0 where v is 0."""

  def debias(x, b, steps):
    if not bias_correction:
      return x
    return x / (1 - b ** steps.astype(jnp.float32))

  def one(m, v):
    root = jnp.sqrt(debias(v, betas[1], nu_count))
    return jnp.where(v > 0, debias(m, betas[0], count) / (root + eps), 0.0)

  return jax.tree.map(one, mu, nu)


def scale_by_onebit_adam(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  *,
  freeze: freezing.FreezeRule,
  workers: Workers,
  compression: Compression | None,
  bias_correction: bool = True,
  mask: MaskFn | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adam's direction; its two phases send different things.

      first:   m, v as in Adam, of the gradient averaged in full precision
      second:  m <- compressed mean of b1 m + (1 - b1) g_i;  v stays

  Bias corrections go on smoothly over the switch: that of m by the number of
  its updates, that of v by the number at which it was frozen.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: outside the square root.
    freeze: ends the first phase.
    workers: who averages.
    compression: scales; None averages in full precision, to tell apart what
      freezing and what compression does.
    bias_correction: divide the moments by (1 - b^t).
    mask: what may move in the second phase, besides what has a variance.
  """
  adam = scale_by_adam(b1, b2, eps, bias_correction=bias_correction)
  betas = (b1, b2)

  def init(params):
    first = adam.init(params)
    none = Compression(error_feedback=False)
    return OneBitAdamState(
      count=first.count,
      nu_count=jnp.zeros((), jnp.int32),
      mu=first.mu,
      nu=first.nu,
      errors=workers.no_errors(params, compression or none),
      phase=freeze.init(),
    )

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    grads = local.float32(updates)

    def first():
      before = AdamState(state.count, state.mu, state.nu)
      directions, after = adam.update(workers.sum(grads), before)
      return directions, state._replace(
        count=after.count,
        nu_count=optax.safe_increment(state.nu_count),
        mu=after.mu,
        nu=after.nu,
        phase=freeze.advance(state.phase, after.nu),
      )

    def second():
      mu = jax.tree.map(
        lambda m, g: b1 * m + (1 - b1) * g, state.mu, workers.own(grads)
      )
      moves = moving(state.nu, mask)
      if compression is None:
        count = workers.count
        mu = jax.tree.map(lambda m: m / count, workers.sum(mu))
        mu = jax.tree.map(lambda m, ok: jnp.where(ok, m, 0.0), mu, moves)
        errors = state.errors
      else:
        mu, errors = workers.compressed_mean(
          mu, state.errors, compression, moves
        )
      after = state._replace(
        count=optax.safe_increment(state.count),
        mu=mu,
        errors=errors,
        phase=state.phase._replace(
          steps=optax.safe_increment(state.phase.steps)
        ),
      )
      return adam_direction(
        mu, state.nu, after.count, state.nu_count,
        betas=betas, eps=eps, bias_correction=bias_correction,
      ), after  # fmt: skip

    directions, after = jax.lax.cond(state.phase.frozen, second, first)
    return jax.tree.map(
      lambda u, like: u.astype(like.dtype), directions, updates
    ), after

  return optax.GradientTransformationExtraArgs(init, update)


def onebit_adam(
  learning_rate: float | optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  bias_correction: bool = True,
  freeze_step: int | float | str = 0.2,
  freeze_threshold: float = 0.96,
  freeze_interval: int | None = None,
  compress: bool = True,
  scale: str = "l1",
  granularity: str | int = "buffer",
  error_feedback: bool = True,
  mask: MaskFn | None = None,
  uncompressed: selection.Rule = (),
  no_decay: selection.Rule = selection.is_bias_or_norm,
  workers: Workers = Workers(),  # noqa: B008 frozen
  total_steps: int | None = None,
) -> local.LocalGradientTransformation:
  """AdamW that averages its momentum in one bit after a first phase.

      w <- w - lr_t (m^ / (sqrt(v^) + eps) + weight_decay w)

  Clipping (`clip_norm`) is each worker's own: the averaged gradient, whose norm
  it would take, does not exist in the second phase.

  Args:
    learning_rate: number or schedule.
    b1: see `scale_by_onebit_adam`; likewise b2, eps and bias_correction.
    b2: decay of the second moment.
    eps: outside the square root.
    weight_decay: decoupled.
    bias_correction: False in the paper's BERT runs.
    freeze_step: when the first phase ends: steps (int), fraction of all steps
      (float; the paper's hand-tuned ones are 0.15 to 0.25), "auto" by the rule
      below, "manual" by `freezing.freeze_now` alone (`bertjax.train` calls it
      once its workdir holds a file of that name). One that ends before the
      learning rate has warmed up is logged as a warning.
    freeze_threshold: "auto" ends it once the variance of `freeze_interval`
      steps ago has this share of its l1 norm, and the rate no longer rises.
    freeze_interval: steps; None for 1 / (1 - b2).
    compress: False averages the momentum in full precision, for ablations.
    scale: see `Compression`; likewise granularity and error_feedback.
    granularity: what shares a scale.
    error_feedback: False is for ablations.
    mask: (name, leaf) -> None, or booleans: what keeps a momentum in the second
      phase if it has a variance; decay goes on. In a config `[(regex, n)]`, as
      `[("position", 128)]` in a phase of rows of 128: see `rows_mask`.
    uncompressed: tensors that get Adam in full precision throughout.
    no_decay: tensors without weight decay.
    workers: set by the builder.
    total_steps: set by the builder.

  Raises:
    ValueError: an argument out of range.

  Reference: Tang et al. 2021, arXiv:2102.02888, algorithm 1. Departures: zero
    variance (and what is zero but for rounding) masks by itself, and bias
    corrections are applied if asked for. What is proved there, for
    smooth losses, gradients of bounded variance sigma^2, compression errors of
    at most epsilon and frozen variances above some v_min > 0: the mean squared
    gradient after T steps of n workers is O(sigma / sqrt(n T)) +
    O((epsilon / T)^(2/3)) + O(1 / T), whose leading term is that of training
    without compression. v_min is small in practice: a step moves a coordinate
    by scale / sqrt(v), so shared scales shake those of small variance most.
  """
  adam = scale_by_adam(b1, b2, eps, bias_correction=bias_correction)
  rule = freezing.build_rule(
    freeze_step,
    threshold=freeze_threshold,
    interval=freeze_interval,
    b2=b2,
    total_steps=total_steps,
    learning_rate=learning_rate,
  )
  compression = local.build_compression(scale, granularity, error_feedback)
  onebit = scale_by_onebit_adam(
    b1,
    b2,
    eps,
    freeze=rule,
    workers=workers,
    compression=compression if compress else None,
    bias_correction=bias_correction,
    mask=mask,
  )
  return local.local_chain(
    workers,
    local.with_uncompressed(onebit, adam, uncompressed, workers),
    add_weight_decay(weight_decay, no_decay),
    optax.scale_by_learning_rate(learning_rate),
  )


class CompressedGradientState(NamedTuple):
  """What of the gradient has not been sent."""

  errors: ErrorFeedback


def compress_gradient(
  workers: Workers, compression: Compression, trainable: MaskFn
) -> optax.GradientTransformation:
  """The workers' gradients, averaged in one bit; 0 where nothing trains."""

  def mask(path, g):
    allowed = trainable(rules.path_name(path), g)
    if allowed is None:
      return jnp.ones_like(g, bool)
    return jnp.asarray(allowed)

  def init(params):
    return CompressedGradientState(workers.no_errors(params, compression))

  def update(updates, state, params=None):
    del params
    grads = workers.own(local.float32(updates))
    mean, errors = workers.compressed_mean(
      grads,
      state.errors,
      compression,
      jax.tree_util.tree_map_with_path(mask, grads),
    )
    mean = jax.tree.map(lambda g, like: g.astype(like.dtype), mean, updates)
    return mean, CompressedGradientState(errors)

  return optax.GradientTransformation(init, update)


def onebit_sgd(
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.0,
  scale: str = "l1",
  granularity: str | int = "buffer",
  error_feedback: bool = True,
  workers: Workers = Workers(),  # noqa: B008 frozen
  trainable: MaskFn = lambda name, leaf: None,
) -> local.LocalGradientTransformation:
  """SGD, with momentum if asked for, on gradients averaged in one bit.

  Reference: Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019,
    arXiv:1901.09847.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"optim.momentum={momentum} must be in [0, 1).")
  compression = local.build_compression(scale, granularity, error_feedback)
  steps = [compress_gradient(workers, compression, trainable)]
  if momentum:
    steps.append(optax.trace(momentum))
  steps.append(optax.scale_by_learning_rate(learning_rate))
  return local.local_chain(workers, *steps)


def compressed_gradient_adam(
  learning_rate: float | optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  bias_correction: bool = True,
  scale: str = "l1",
  granularity: str | int = "buffer",
  error_feedback: bool = True,
  no_decay: selection.Rule = selection.is_bias_or_norm,
  workers: Workers = Workers(),  # noqa: B008 frozen
  trainable: MaskFn = lambda name, leaf: None,
) -> local.LocalGradientTransformation:
  """AdamW on gradients averaged in one bit: what 1-bit Adam is not.

  The square of a compressed gradient says nothing of a coordinate's variance:
  the paper's example of what fails (section 3.2), for comparison.
  """
  compression = local.build_compression(scale, granularity, error_feedback)
  return local.local_chain(
    workers,
    compress_gradient(workers, compression, trainable),
    scale_by_adam(b1, b2, eps, bias_correction=bias_correction),
    add_weight_decay(weight_decay, no_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
