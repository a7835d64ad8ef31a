"""Adam and AdamW, with and without bias correction.

BERT was trained without the correction (Devlin et al. 2018): its first steps
are sqrt(1 - b2) / (1 - b1), about a third, as careful as Adam's, which warm-up
hides and small fine-tuning sets do not.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from bertjax.optim import schedules, selection


class AdamState(NamedTuple):
  """Moments; `mu` and `nu` are trees like the parameters."""

  count: Int[Array, ""]  # updates so far: only bias correction reads it
  mu: Any
  nu: Any


def scale_by_adam(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  *,
  bias_correction: bool = True,
  grad_averaging: bool = True,
  nesterov: Literal["none", "first", "both"] = "none",
  mu_dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
  """Adam's direction, every switch that LAMB's and BERT's codes differ in.

      m <- b1 m + a g          a = 1 - b1, or 1 without grad_averaging
      v <- b2 v + (1 - b2) g^2
      m^ = m / (1 - b1^t),  v^ = v / (1 - b2^t)      (t counts from 1)
      u = m^ / (sqrt(v^) + eps)

  Unlike `optax.scale_by_adam` this can leave out the correction and runs under
  strict dtype promotion. With the correction the two agree.

  Args:
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added outside the square root.
    bias_correction: divide by (1 - b^t).
    grad_averaging: weigh the gradient by (1 - b1) in the first moment.
    nesterov: "first" looks ahead in the first moment (N-LAMB, Nadam):
      m^ = b1 m / (1 - b1^(t+1)) + a g / (1 - b1^t); "both" does the same in the
      second (NN-LAMB).
    mu_dtype: storage of the first moment, "float32" or "bfloat16". The second
      moment is always float32: one step changes it by a thousandth, less than
      bfloat16 can represent.

  Raises:
    ValueError: an argument out of range.

  Reference: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; Dozat 2016 and
    You et al. 2020, appendix, for Nesterov.
  """
  _check(b1, b2, eps, nesterov, mu_dtype)
  a1 = 1 - b1 if grad_averaging else 1.0
  direction = functools.partial(
    _direction,
    b1=b1,
    a1=a1,
    b2=b2,
    eps=eps,
    bias_correction=bias_correction,
    nesterov=nesterov,
  )

  def init(params):
    return AdamState(
      count=jnp.zeros((), jnp.int32),
      mu=jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype), params),
      nu=jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params),
    )

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    count = optax.safe_increment(state.count)
    t = count.astype(jnp.float32)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    mu = jax.tree.map(
      lambda g, m: b1 * m.astype(jnp.float32) + a1 * g, grads, state.mu
    )
    # XLA's CPU backend would store the square that this shares with the global
    # norm; a factor that it can't see through makes it another expression.
    a2 = jax.lax.optimization_barrier(jnp.float32(1 - b2))
    nu = jax.tree.map(lambda g, v: b2 * v + a2 * g * g, grads, state.nu)
    directions = jax.tree.map(
      lambda g, m, v, like: direction(g, m, v, t).astype(like.dtype),
      grads,
      mu,
      nu,
      updates,
    )
    mu = jax.tree.map(lambda m: m.astype(mu_dtype), mu)
    return directions, AdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def _check(
  b1: float, b2: float, eps: float, nesterov: str, mu_dtype: str
) -> None:
  for field, value in (("b1", b1), ("b2", b2)):
    if not 0 <= value < 1:
      raise ValueError(f"optim.{field}={value} must be in [0, 1).")
  if eps < 0:
    raise ValueError(f"optim.eps={eps} must not be negative.")
  if nesterov not in ("none", "first", "both"):
    raise ValueError(
      f"optim.nesterov={nesterov!r} is unknown; choose from none, first, both."
    )
  if mu_dtype not in ("float32", "bfloat16"):
    raise ValueError(
      f"optim.mu_dtype={mu_dtype!r} is unknown; choose from float32, bfloat16."
    )


def _direction(
  g: jax.Array,
  m: jax.Array,
  v: jax.Array,
  t: jax.Array,
  *,
  b1: float,
  a1: float,
  b2: float,
  eps: float,
  bias_correction: bool,
  nesterov: str,
) -> jax.Array:
  """u of `scale_by_adam` from the gradient and the moments after step t."""

  def debias(x, b, steps):
    return x / (1 - b**steps) if bias_correction else x

  if nesterov == "none":
    m = debias(m, b1, t)
  else:
    m = b1 * debias(m, b1, t + 1) + a1 * debias(g, b1, t)
  if nesterov == "both":
    squares = (1 - b2) * debias(jnp.square(g), b2, t)
    v = b2 * debias(v, b2, t + 1) + squares
  else:
    v = debias(v, b2, t)
  root = jnp.sqrt(v) + eps
  if eps:
    return m / root
  # What never had a gradient does not move.
  return jnp.where(v > 0, m / jnp.where(v > 0, root, 1.0), 0.0)


def add_weight_decay(
  weight_decay: float, no_decay: selection.Rule
) -> optax.GradientTransformation:
  """u <- u + weight_decay * w, except where `no_decay` selects.

  Raises:
    ValueError: negative decay, or an expression that matches nothing.
  """
  if weight_decay < 0:
    raise ValueError(f"optim.weight_decay={weight_decay} must not be negative.")

  def decayed(params):
    excluded = selection.select(no_decay, params, "optim.no_decay")
    return jax.tree.map(lambda e: not e, excluded)

  return optax.add_decayed_weights(weight_decay, mask=decayed)


def adamw(
  learning_rate: float | optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  weight_decay_form: Literal["lr_scaled", "independent"] = "lr_scaled",
  bias_correction: bool = True,
  nesterov: Literal["none", "first", "both"] = "none",
  no_decay: selection.Rule = selection.is_bias_or_norm,
  mu_dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
  """Adam with decoupled weight decay.

      w <- w - lr_t (u + weight_decay w)                      "lr_scaled"
      w <- w - lr_t u - (lr_t / peak) weight_decay w          "independent"

  BERT's optimizer is `bias_correction=False` with the other defaults.

  Args:
    learning_rate: number, or schedule from `schedules.build_schedule` ("any
      function step -> rate" will do for "lr_scaled").
    b1: see `scale_by_adam`; likewise b2, eps, bias_correction, nesterov and
      mu_dtype.
    b2: decay of the second moment.
    eps: outside the square root.
    weight_decay: strength.
    weight_decay_form: "lr_scaled" as in BERT, torch and optax; "independent"
      of the peak rate, as the paper has it and MosaicBERT trains.
    bias_correction: off for BERT.
    nesterov: look ahead.
    no_decay: parameters without decay; regular expressions on path names or
      (name, leaf) -> bool.
    mu_dtype: storage of the first moment.

  Raises:
    ValueError: an argument out of range, or "independent" decay with a schedule
      that does not state its peak.

  Reference: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Devlin et
    al. 2018, arXiv:1810.04805, A.2.
  """
  if weight_decay_form == "independent":
    weight_decay = weight_decay / schedules.peak(learning_rate)
  elif weight_decay_form != "lr_scaled":
    raise ValueError(
      f"optim.weight_decay_form={weight_decay_form!r} is unknown; choose from"
      " lr_scaled, independent."
    )
  return optax.chain(
    scale_by_adam(
      b1,
      b2,
      eps,
      bias_correction=bias_correction,
      nesterov=nesterov,
      mu_dtype=mu_dtype,
    ),
    add_weight_decay(weight_decay, no_decay),
    optax.scale_by_learning_rate(learning_rate),
  )


def adam(
  learning_rate: float | optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  bias_correction: bool = True,
  nesterov: Literal["none", "first", "both"] = "none",
  mu_dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
  """Adam without weight decay: `optax.adam`, with our switches.

  See `scale_by_adam` for the arguments.

  Reference: Kingma & Ba 2015, arXiv:1412.6980.
  """
  return optax.chain(
    scale_by_adam(
      b1,
      b2,
      eps,
      bias_correction=bias_correction,
      nesterov=nesterov,
      mu_dtype=mu_dtype,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )
