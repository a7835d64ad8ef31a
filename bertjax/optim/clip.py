"""Global-norm clipping that remembers the norm it saw.

Where the clip stands is a choice of algorithm. BERT's own code clips the
gradient of each replica before the all-reduce; everybody else clips the
averaged gradient. `clip_per_shard` is the first form, `clip_by_global_norm` the
second; `clip_own` leaves the averaging to the optimizer. `clip_tree` is the
same thing without a state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bertjax.optim import trust_ratio


class GlobalNormState(NamedTuple):
  """The norm of the last gradient, before clipping."""

  norm: Float[Array, ""]


def global_norm(
  tree: Any, norm_axes: trust_ratio.MeshAxesFn | None = None
) -> Float[Array, ""]:
  """L2 norm of all leaves together, float32.

  Args:
    tree: gradients.
    norm_axes: inside `jax.shard_map`, (name, leaf) -> the mesh axes that shard
      the leaf; its square is summed over them.
  """
  squares = trust_ratio.sum_squares(tree, norm_axes=norm_axes)
  return jnp.sqrt(
    sum(
      (jnp.sum(s) for s in jax.tree.leaves(squares)),
      start=jnp.zeros((), jnp.float32),
    )
  )


def clip_tree(
  tree: Any,
  max_norm: float | None,
  norm_axes: trust_ratio.MeshAxesFn | None = None,
) -> tuple[Any, Float[Array, ""]]:
  """`tree * max_norm / max(norm, max_norm)` and the norm before it.

  Nothing changes, to the bit, while the norm is below `max_norm` or when that
  is None. A gradient whose norm is not finite is NaN: the loop must see it.
  """
  norm = global_norm(tree, norm_axes)
  if max_norm is None:
    return tree, norm
  factor = max_norm / jnp.maximum(norm, max_norm)
  return _scaled(tree, _seen(factor, norm)), norm


def normalize_tree(
  tree: Any, norm_axes: trust_ratio.MeshAxesFn | None = None
) -> tuple[Any, Float[Array, ""]]:
  """`tree / norm` (NVLAMB) and the norm; a zero tree stays zero."""
  norm = global_norm(tree, norm_axes)
  factor = 1.0 / jnp.where(norm > 0, norm, 1.0)
  return _scaled(tree, _seen(factor, norm)), norm


def _seen(factor: Float[Array, ""], norm: Float[Array, ""]) -> Array:
  """Of squares that overflow the factor were 0, and nobody would know."""
  return jnp.where(jnp.isfinite(norm), factor, jnp.nan)


def _scaled(tree: Any, factor: Float[Array, ""]) -> Any:
  return jax.tree.map(lambda x: x * factor.astype(x.dtype), tree)


def _remembering(
  rescale: Callable[[Any], tuple[Any, Float[Array, ""]]],
) -> optax.GradientTransformationExtraArgs:
  def init(params):
    del params
    return GlobalNormState(jnp.zeros((), jnp.float32))

  def update(updates, state, params=None, **extra_args):
    del state, params, extra_args
    updates, norm = rescale(updates)
    return updates, GlobalNormState(norm)

  return optax.GradientTransformationExtraArgs(init, update)


def clip_by_global_norm(
  max_norm: float | None,
  norm_axes: trust_ratio.MeshAxesFn | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Clips the global norm and keeps the unclipped norm in its state.

  Args:
    max_norm: largest global L2 norm to let through; None only measures.
    norm_axes: see `global_norm`.

  Raises:
    ValueError: `max_norm` is not positive.
  """
  if max_norm is not None and not max_norm > 0:
    raise ValueError(
      f"optim.clip_norm={max_norm} must be positive, or None for no clipping."
    )
  return _remembering(lambda tree: clip_tree(tree, max_norm, norm_axes))


def clip_per_shard(
  max_norm: float, axis: str = "data"
) -> optax.GradientTransformationExtraArgs:
  """Clips the gradient of each of n shards, then averages: BERT's own order.

  It must run inside `jax.shard_map` over `axis`, on gradients that add up to
  that of the batch, so that n times each is the gradient of a shard's own mean
  (exactly so when all shards have equally many labels). Without a gradient
  above `max_norm` it is the plain sum. The norm that it keeps is the mean one.

  Raises:
    ValueError: `max_norm` is not positive.

  Reference: Devlin et al. 2018, arXiv:1810.04805, their code on TPU; MLPerf.
  """
  clipper = clip_by_global_norm(max_norm)

  def rescale(grads):
    count = jax.lax.axis_size(axis)
    own = _scaled(grads, jnp.float32(count))
    clipped, state = clipper.update(own, None)
    return jax.lax.pmean((clipped, state.norm), axis)

  return _remembering(rescale)


def clip_own(
  max_norm: float | None, count: int, axis: str | None
) -> optax.GradientTransformationExtraArgs:
  """Clips each worker's gradient and averages nothing.

  Like `clip_per_shard`, but the gradients go on to an optimizer that reduces
  them itself: they still add up to that of the batch. The norm that it keeps is
  the mean one.

  Args:
    max_norm: largest norm of `count` times a worker's part; None only measures.
    count: workers.
    axis: mesh axis of the workers; None outside of `jax.shard_map`.

  Raises:
    ValueError: `max_norm` is not positive.
  """
  clipper = clip_by_global_norm(max_norm)

  def rescale(grads):
    own = _scaled(grads, jnp.float32(count))
    clipped, state = clipper.update(own, None)
    norm = state.norm if axis is None else jax.lax.pmean(state.norm, axis)
    return _scaled(clipped, jnp.float32(1 / count)), norm

  return _remembering(rescale)


def normalize_by_global_norm(
  norm_axes: trust_ratio.MeshAxesFn | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Divides by the global norm and keeps it in its state."""
  return _remembering(lambda tree: normalize_tree(tree, norm_axes))
