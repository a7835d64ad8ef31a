"""Momentum contrast (He et al. 2020, arXiv:1911.05722).

A query is to be nearer to the key that a slow copy of its encoder makes of the
same example than to keys of examples that came before, which wait in a queue.
Under jit arrays are those of all devices and hosts: the keys of the whole batch
enter every queue, and gathering them is the partitioner's business.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SLOW, QUEUE = "momentum", "queue"


class SlowCopy(nn.Module):
  """An exponential average of parameters, in a collection of its own.

  Attributes:
    momentum: share of itself that it keeps in a step.
  """

  momentum: float

  @nn.compact
  def __call__(self, params: Any, step: Int[Array, ""] | None) -> Any:
    """Moves towards `params` and returns the copy, without gradient.

    The first step copies: so a run may start from weights that come from
    elsewhere. Further calls in a step, by later microbatches, change nothing.

    Args:
      params: of the model that is trained.
      step: of the optimizer; None counts the calls.
    """
    params = jax.lax.stop_gradient(nn.meta.unbox(params))
    copy = self.variable(
      SLOW, "params", lambda: jax.tree.map(jnp.zeros_like, params)
    )
    updated = self.variable(SLOW, "updated", lambda: jnp.full((), -1, "int32"))
    if self.is_initializing():
      return params
    step = updated.value + 1 if step is None else step
    keep = jnp.where(step == updated.value, 1.0, self.momentum)
    keep = jnp.where(updated.value < 0, 0.0, keep)
    copy.value = jax.tree.map(
      lambda slow, fast: keep * slow + (1 - keep) * fast, copy.value, params
    )
    updated.value = jnp.asarray(step, jnp.int32)
    return copy.value


class Queue(nn.Module):
  """The newest keys, the oldest of which leave first.

  Attributes:
    size: how many.
    width: of a key.
  """

  size: int
  width: int

  def setup(self):
    self.keys = self.variable(
      QUEUE,
      "keys",
      lambda: unit(
        jax.random.normal(self.make_rng("params"), (self.size, self.width))
      ),
    )
    self.next = self.variable(QUEUE, "next", lambda: jnp.zeros((), jnp.int32))

  def __call__(self) -> Float[Array, "k c"]:
    """The keys; before there were any, random ones."""
    return self.keys.value

  def push(self, keys: Float[Array, "b c"]) -> None:
    """Puts keys in the place of the oldest.

    Raises:
      ValueError: their number does not divide the size.
    """
    count = keys.shape[0]
    if self.size % count:
      raise ValueError(
        f"objective.queue_size={self.size} must be a multiple of the {count}"
        " clouds that are seen at once (data.batch_size, divided by"
        " microbatches)."
      )
    if self.is_initializing():
      return
    start = self.next.value
    self.keys.value = jax.lax.dynamic_update_slice(
      self.keys.value,
      jax.lax.stop_gradient(keys).astype(jnp.float32),
      (start, jnp.zeros_like(start)),
    )
    self.next.value = (start + count) % self.size


def unit(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
  """Rows at length 1, float32; a row of zeros stays."""
  x = x.astype(jnp.float32)
  square = (x**2).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def contrast(
  queries: Float[Array, "b c"],
  keys: Float[Array, "b c"],
  queue: Float[Array, "k c"],
  temperature: float,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
  """Cross-entropy of each query's own key among it and the queue.

  Args:
    queries: unit rows.
    keys: unit rows, those of the same examples.
    queue: unit rows of other examples.
    temperature: that similarities are divided by.

  Returns:
    Losses in nats, and 1 where its own key is the nearest.
  """
  own = (queries * keys).sum(-1, keepdims=True)
  logits = jnp.concatenate([own, queries @ queue.T], axis=1) / temperature
  losses = jax.nn.logsumexp(logits, axis=1) - logits[:, 0]
  return losses, (logits.argmax(1) == 0).astype(jnp.float32)


def mixed_contrast(
  queries: Float[Array, "b c"],
  keys: Float[Array, "b c"],
  queue: Float[Array, "k c"],
  ratios: Float[Array, " b"],
  temperature: float,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
  """Cross-entropy of the keys of both examples that a mixture is made of.

  Mixture i is of example i, with its ratio, and of the one as far from the end.
  All keys of the batch are candidates, and so is the queue.

  Args:
    queries: unit rows, those of mixtures.
    keys: unit rows, those of whole examples.
    queue: unit rows of other examples.
    ratios: share of example i.
    temperature: that similarities are divided by.

  Returns:
    Losses in nats, and 1 where one of the two keys is the nearest.
  """
  logits = jnp.concatenate([queries @ keys.T, queries @ queue.T], axis=1)
  logits /= temperature
  log_probs = jax.nn.log_softmax(logits, axis=1)
  first = jnp.arange(len(keys))
  second = first[::-1]
  own = jnp.take_along_axis(log_probs, first[:, None], axis=1)[:, 0]
  partner = jnp.take_along_axis(log_probs, second[:, None], axis=1)[:, 0]
  nearest = logits.argmax(1)
  hits = ((nearest == first) | (nearest == second)).astype(jnp.float32)
  return -(ratios * own + (1 - ratios) * partner), hits
