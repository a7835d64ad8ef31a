"""Loss scaling: what float16 cannot hold does not become 0, or is not used.

float16 rounds what is below 6e-8 to 0, as most gradients of a large batch are,
and has nothing above 65,504. The loss is multiplied by a scale before it is
differentiated, gradients are divided by it in float32. A step whose gradient
overflows changes nothing but the scale, which halves; after `interval` steps
without one it doubles.

Reference: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bertjax.layers import statistics
from bertjax.optim.optimizer import Optimizer

# At which an overflow is no matter of range any more.
LEAST = 1.0
_LARGEST = 2.0**24


class LossScaleState(NamedTuple):
  """Around an optimizer's own state.

  Attributes:
    scale: of the next step's loss, a power of two.
    good_steps: since it last changed.
    skipped: steps so far that changed nothing.
    inner: the optimizer's state.
  """

  scale: Float[Array, ""]
  good_steps: Int[Array, ""]
  skipped: Int[Array, ""]
  inner: Any


def scaled(
  optimizer: Optimizer, *, initial: float = 2.0**15, interval: int = 2000
) -> Optimizer:
  """An optimizer whose state holds a scale, for `value_and_grad`.

  At a scale of 1 an overflow is handed on: it is the loss that diverges, and
  the loop must see it.

  Args:
    optimizer: that takes gradients, no longer scaled. It sees no step that is
      skipped: moments, errors, curvature and counters stay as they are.
    initial: scale of the first step, a power of two.
    interval: steps without an overflow after which the scale doubles.

  Raises:
    ValueError: names the option.
  """
  _check(initial, interval)

  def init(params):
    return LossScaleState(
      scale=jnp.asarray(initial, jnp.float32),
      good_steps=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
      inner=optimizer.transform.init(params),
    )

  def guarded(act, unchanged, grads, state):
    """`act`, or what `unchanged` is; the state of either."""
    good = _finite(grads)
    if optimizer.local_gradients:
      good = jax.lax.pmin(good.astype(jnp.int32), "data") > 0
    acts = good | (state.scale <= LEAST)
    found, inner = jax.lax.cond(acts, act, lambda: (unchanged, state.inner))
    return found, _advanced(state, good, acts, interval)._replace(inner=inner)

  def update(grads, state, params=None, **extra_args):
    return guarded(
      lambda: optimizer.transform.update(
        grads, state.inner, params, **extra_args
      ),
      jax.tree.map(jnp.zeros_like, grads),
      grads,
      state,
    )

  def layerwise(grads, state, params):
    inner = optimizer.layerwise
    assert inner is not None
    return guarded(
      lambda: inner(grads, state.inner, params), params, grads, state
    )

  return dataclasses.replace(
    optimizer,
    transform=optax.GradientTransformationExtraArgs(init, update),
    layerwise=None if optimizer.layerwise is None else layerwise,
  )


def scale_of(opt_state: Any) -> Float[Array, ""] | None:
  """The scale of the next step; None of an optimizer without one."""
  if isinstance(opt_state, LossScaleState):
    return opt_state.scale
  return None


def loss_scale_metrics(opt_state: Any) -> dict[str, Float[Array, ""]]:
  """ "loss_scale" and "skipped_steps" so far, float32; {} without a scale."""
  if not isinstance(opt_state, LossScaleState):
    return {}
  return {
    "loss_scale": opt_state.scale,
    "skipped_steps": opt_state.skipped.astype(jnp.float32),
  }


def value_and_grad(
  loss_fn: Callable[..., tuple[Float[Array, ""], Any]],
  scale: Float[Array, ""] | None,
) -> Callable[..., tuple[tuple[Float[Array, ""], Any], Any]]:
  """`jax.value_and_grad` of (loss, aux), by way of the scaled loss.

  Args:
    loss_fn: of a dict of collections first, by which is differentiated; probes
      of `layers.statistics` may be among them.
    scale: of the loss; None: not scaled.
  """
  if scale is None:
    return jax.value_and_grad(loss_fn, has_aux=True)

  def larger(*args):
    loss, aux = loss_fn(*args)
    return loss * scale, (loss, aux)

  def divided(*args):
    (_, found), grads = jax.value_and_grad(larger, has_aux=True)(*args)
    return found, statistics.divide_gradients(grads, scale)

  return divided


def _check(initial: float, interval: int) -> None:
  number = isinstance(initial, int | float) and not isinstance(initial, bool)
  # Of another scale products and quotients round.
  if not (
    number and LEAST <= initial <= _LARGEST and math.frexp(initial)[0] == 0.5
  ):
    raise ValueError(
      f"optim.loss_scale.initial={initial!r} must be a power of two in"
      f" [{LEAST:g}, {_LARGEST:g}]."
    )
  whole = isinstance(interval, int) and not isinstance(interval, bool)
  if not (whole and interval >= 1):
    raise ValueError(
      f"optim.loss_scale.interval={interval!r} must be an int of at least 1."
    )


def _finite(tree: Any) -> Bool[Array, ""]:
  found = jnp.array(True)
  for leaf in jax.tree.leaves(tree):
    found &= jnp.all(jnp.isfinite(leaf))
  return found


def _advanced(
  state: LossScaleState,
  good: Bool[Array, ""],
  acts: Bool[Array, ""],
  interval: int,
) -> LossScaleState:
  """Scale and counters after a step."""
  count = jnp.where(good, state.good_steps + 1, 0)
  doubles = count >= interval
  grown = jnp.where(doubles, state.scale * 2.0, state.scale)
  scale = jnp.where(good, grown, state.scale / 2.0)
  return state._replace(
    scale=jnp.clip(scale, LEAST, _LARGEST),
    good_steps=jnp.where(doubles, 0, count),
    skipped=state.skipped + (~acts).astype(jnp.int32),
  )
