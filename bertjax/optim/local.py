"""What optimizers that do their own reduction have in common."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bertjax.optim import selection
from bertjax.parallel.error_feedback import Workers
from bertjax.parallel.grids import Compression


class LocalGradientTransformation(optax.GradientTransformationExtraArgs):
  """A transformation whose `update` takes this worker's own gradients.

  Those of all workers add up to the gradient of the batch. It must run inside
  `jax.shard_map` and does its own reduction; its updates are the same on every
  worker.
  """


def build_compression(
  scale: str, granularity: str | int, error_feedback: bool
) -> Compression:
  """The compression that a row's options describe.

  Raises:
    ValueError: names the option.
  """
  try:
    return Compression(scale, granularity, error_feedback)
  except ValueError as err:
    raise ValueError(f"optim.{err}") from err


def local_chain(
  workers: Workers,
  first: optax.GradientTransformation,
  *others: optax.GradientTransformation,
) -> LocalGradientTransformation:
  """A chain that skips a step when any worker's gradient is not finite.

  A skipped step changes nothing, errors and counters included, on any worker.

  Args:
    workers: who must agree.
    first: what averages; a skipped step does not run it. Its updates may be
      any tree that the next transformation understands.
    *others: what has no use for `extra_args`. They run in any case: outside of
      the conditional they are one with the update of the parameters.
  """
  first = optax.with_extra_args_support(first)
  rest = optax.chain(*others) if others else optax.identity()

  def init(params):
    return (first.init(params), *rest.init(params))

  def update(updates, state, params=None, **extra_args):
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(updates):
      finite &= jnp.all(jnp.isfinite(leaf))
    finite = workers.all(finite)

    def act():
      return first.update(updates, state[0], params, **extra_args)

    def skip():
      found, _ = jax.eval_shape(act)
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
      return zeros, state[0]

    def chosen(new, old):
      return jnp.where(finite, new, old)

    updates, begun = jax.lax.cond(finite, act, skip)
    updates, ended = rest.update(updates, state[1:], params)
    updates = jax.tree.map(lambda u: chosen(u, 0), updates)
    return updates, (begun, *jax.tree.map(chosen, ended, state[1:]))

  return LocalGradientTransformation(init, update)


def with_uncompressed(
  compressed: optax.GradientTransformation,
  plain: optax.GradientTransformation,
  rule: selection.Rule,
  workers: Workers,
) -> optax.GradientTransformationExtraArgs:
  """`compressed`, except on the tensors that `rule` selects.

  Those get `plain` on the sum of the workers' gradients.
  """
  if not callable(rule) and not rule:
    return optax.with_extra_args_support(compressed)

  def mask(value):
    def masked(tree):
      chosen = selection.select(rule, tree, "optim.uncompressed")
      return jax.tree.map(lambda selected: selected == value, chosen)

    return masked

  summed = optax.stateless(lambda updates, params: workers.sum(updates))
  return optax.chain(
    optax.masked(compressed, mask(False)),
    optax.masked(optax.chain(summed, plain), mask(True)),
  )


def float32(tree: Any) -> Any:
  """The tree in float32."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
