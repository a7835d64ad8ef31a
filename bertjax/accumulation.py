"""The gradient of a batch: in parts, and summed over the mesh once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bertjax.layers import statistics
from bertjax.objectives.base import Metrics
from bertjax.optim import loss_scale
from bertjax.parallel.sharding import by_hand

Batch = Mapping[str, jax.Array]
# (params, extra, batch, key) -> loss, gradients by collection, metrics, extra
Gradients = Callable[
  [Any, Any, Batch, jax.Array], tuple[jax.Array, Any, Metrics, Any]
]


def split_batch(batch: Batch, microbatches: int) -> Batch:
  """[b, ...] -> [microbatches, b / microbatches, ...], strided.

  Microbatch i holds rows i, i + n, i + 2n...: every device keeps the rows that
  it has, so that splitting a sharded batch moves nothing.
  """

  def split(x):
    x = x.reshape(-1, microbatches, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  return jax.tree.map(split, dict(batch))


def accumulate(
  loss_fn: Callable[..., tuple[jax.Array, tuple[Metrics, Any]]],
  params: Any,
  extra: Any,
  batch: Batch,
  key: jax.Array,
  microbatches: int,
  scale: jax.Array | None = None,
) -> tuple[jax.Array, Any, Metrics, Any]:
  """Loss, gradient (float32) and metrics of a batch, summed over microbatches.

  Args:
    loss_fn: `(params, extra, batch, key) -> loss, (metrics, extra)`, where the
      losses of the microbatches add up to that of the batch.
    params: collections of variables to differentiate by; gradients by row
      probes (`layers.statistics`) are stacked instead of summed.
    extra: other collections, handed from one microbatch to the next.
    batch: arrays with a leading batch axis.
    key: PRNG key.
    microbatches: number of parts.
    scale: see `optim.loss_scale`.
  """
  grad_fn = loss_scale.value_and_grad(loss_fn, scale)
  if microbatches == 1:
    (loss, (metrics, extra)), grads = grad_fn(params, extra, batch, key)
    return loss, grads, metrics, extra

  parts = split_batch(batch, microbatches)

  def one(carry, part):
    extra, sums = carry
    index, part = part
    (loss, (metrics, extra)), grads = grad_fn(
      params, extra, part, jax.random.fold_in(key, index)
    )
    rows = grads.pop(statistics.ROWS, {})
    sums = jax.tree.map(jnp.add, sums, (loss, grads, metrics))
    return (extra, sums), rows

  first = jax.tree.map(lambda x: x[0], parts)
  # Of the loss alone: its gradient, traced below, takes longer to trace.
  loss, (metrics, _) = jax.eval_shape(loss_fn, params, extra, first, key)
  grads = {k: v for k, v in params.items() if k != statistics.ROWS}
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (loss, grads, metrics)
  )
  (extra, (loss, grads, metrics)), rows = jax.lax.scan(
    one, (extra, zeros), (jnp.arange(microbatches), parts)
  )
  return loss, grads | {statistics.ROWS: rows}, metrics, extra


def summed_once(
  gradients: Gradients, wanted: statistics.Wanted | None = None
) -> Gradients:
  """The same, by each shard of "data" alone, and one sum over them in the end.

  The partitioner would sum every layer's gradients as soon as they are made, so
  those of every microbatch. The other axes of the context's mesh stay its own.

  Args:
    gradients: of rows that do not see each other (`Objective.independent_rows`)
      and of collections that no row changes.
    wanted: the statistics among the gradients; they keep their axis of shards.
  """

  def own(params, extra, batch, key):
    loss, grads, metrics, extra = gradients(params, extra, batch, key)
    sums = loss, grads["params"], metrics
    loss, summed, metrics = jax.lax.psum(sums, "data")
    return loss, grads | {"params": summed}, metrics, extra

  whole = PartitionSpec()
  found = {"params": whole, statistics.ROWS: whole}
  if wanted is not None:
    found |= wanted.specs("data")
  return jax.shard_map(
    own,
    in_specs=(whole, whole, PartitionSpec("data"), whole),
    out_specs=(whole, found, whole, whole),
    axis_names=by_hand("data", jax.sharding.get_abstract_mesh()),
    # Sums are the same on every shard, which types can't show.
    check_vma=False,
  )
