"""The one training step: loss, accumulation, gradient reduction, update."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax.accumulation import Batch, accumulate, summed_once
from bertjax.layers import statistics
from bertjax.objectives.base import Metrics, Objective, total_loss
from bertjax.objectives.frozen import FROZEN
from bertjax.objectives.step import clock, streams
from bertjax.optim import (
  Optimizer,
  curvature_metrics,
  gradient_norm,
  loss_scale,
  schedule_step,
)
from bertjax.parallel.error_feedback import local_params
from bertjax.parallel.sharding import batch_sharding, batch_shards, by_hand
from bertjax.train_state import TrainState

# What the compiler is asked for, by platform. TPU: a loop that fills a stack
# from its end, as the backward pass fills one of gradients, spares it zeros as
# one that fills it from the start does.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
  "tpu": {"xla_tpu_enable_advanced_while_initializer_removal": True},
}

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
  """Refuses a batch that does not divide.

  Raises:
    ValueError: microbatches or batch shards do not divide the batch size.
  """
  shards = batch_shards(mesh)
  if microbatches < 1 or batch_size % microbatches:
    raise ValueError(
      f"microbatches={microbatches} does not divide"
      f" data.batch_size={batch_size}; use a positive divisor of it."
    )
  if (batch_size // microbatches) % shards:
    raise ValueError(
      f"data.batch_size={batch_size} in microbatches={microbatches} gives"
      f" {batch_size // microbatches} rows, which do not divide over"
      f" {shards} batch shards (mesh.data x mesh.fsdp); use a batch size that"
      f" is a multiple of {microbatches * shards}."
    )


# Collections that come out the same on every worker of a step split by hand.
_SHARED = ("batch_stats", FROZEN)


def check_collections(optimizer: Optimizer, collections: Iterable[str]) -> None:
  """Refuses state of which every worker would keep its own version.

  Args:
    optimizer: how.
    collections: of the objective, besides the parameters.

  Raises:
    ValueError: the optimizer has workers that see only their part of a batch,
      and a collection follows what they see.
  """
  own = sorted(set(collections) - set(_SHARED))
  if optimizer.local_gradients and own:
    raise ValueError(
      f"optim: with an optimizer that averages by itself every worker would"
      f" have its own {', '.join(own)} of the objective, and save only one;"
      " choose another optim.name, such as 'adamw' or 'lamb'."
    )


def sums_once(
  objective: Objective, optimizer: Optimizer, microbatches: int, mesh: Mesh
) -> bool:
  """Whether gradients are summed over "data" after the last microbatch.

  Of a single one they are summed layer by layer, while others are computed;
  and rows that see each other need what others bring in every microbatch.
  """
  return (
    microbatches > 1
    and mesh.shape["data"] > 1
    and objective.independent_rows
    and not optimizer.local_gradients
  )


def train_step(
  objective: Objective,
  optimizer: Optimizer,
  microbatches: int = 1,
  sum_once: bool = False,
) -> Step:
  """The pure step function `(state, batch) -> (state, metrics)`.

  Metrics are (sum, weight) pairs. With an optimizer that wants local gradients
  it must run inside `shard_map` over "data"; `compile_step` does that.

  Args:
    objective: what is minimised.
    optimizer: how.
    microbatches: parts that the batch is split into.
    sum_once: see `sums_once` and `accumulation.summed_once`.
  """
  local, wanted = optimizer.local_gradients, optimizer.statistics

  def over_shards(tree):
    return jax.tree.map(lambda x: jax.lax.psum(x, "data"), tree)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    # Global, before splitting: every part divides by the same weight.
    weights = objective.weights(batch)
    if local:
      weights = over_shards(weights)
      if not objective.independent_rows:
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))

    def loss_fn(variables, extra, batch, key):
      with statistics.capture(wanted, batch):
        (sums, metrics), extra = objective.apply(
          {**variables, **extra, **clock(state.step)},
          batch,
          train=True,
          rngs=streams(key),
          mutable=list(extra),
        )
      loss = total_loss(sums, weights, objective.coefficients)
      return loss, (metrics, extra)

    params = state.params
    if local:
      params = local_params(params, state.opt_state)
    scale = loss_scale.scale_of(state.opt_state)

    def gradients(params, extra, batch, key):
      variables = {"params": params}
      if wanted is not None:
        rows = statistics.rows_of(batch)
        variables |= wanted.probes(rows // microbatches)
      return accumulate(
        loss_fn, variables, extra, batch, key, microbatches, scale
      )

    if sum_once:
      gradients = summed_once(gradients, wanted)
    loss, grads, metrics, extra = gradients(params, state.extra, batch, key)
    if local:
      loss, metrics = over_shards((loss, metrics))
    found = {}
    if wanted is not None:
      found = {"statistics": wanted.collect(grads)}
    rate = optimizer.schedule(schedule_step(state.opt_state))
    params, opt_state = optimizer.apply(
      grads["params"], state.opt_state, state.params, value=loss, **found
    )
    norm = gradient_norm(opt_state)
    if local:
      norm = jax.lax.pmean(norm, "data")
    one = jnp.ones((), jnp.float32)
    metrics |= {
      "loss": (loss, one),
      "grad_norm": (norm, one),
      "label_weight": (sum(weights.values()), one),
      "learning_rate": (rate, one),
      **{
        name: (value, one)
        for name, value in (
          *curvature_metrics(opt_state).items(),
          *loss_scale.loss_scale_metrics(opt_state).items(),
        )
      },
    }
    if "segment_ids" in batch:
      tokens = (batch["segment_ids"] > 0).sum().astype(jnp.float32)
      metrics["tokens"] = (over_shards(tokens) if local else tokens, one)
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      extra=extra,
    )
    return state, metrics

  return step


def _over_data(sharding: NamedSharding) -> PartitionSpec:
  """The part of a sharding that concerns the axis "data"."""
  return PartitionSpec(
    *("data" if entry == "data" else None for entry in sharding.spec)
  )


def jit_step(
  objective: Objective,
  optimizer: Optimizer,
  mesh: Mesh,
  shardings: TrainState,
  batch_spec: Mapping[str, jax.ShapeDtypeStruct],
  microbatches: int = 1,
) -> Any:
  """`train_step` jitted for the mesh; the state's buffers are donated.

  Args:
    objective: what is minimised.
    optimizer: how.
    mesh: the device mesh.
    shardings: of the state, from `state_shardings`.
    batch_spec: shapes of the global batch.
    microbatches: parts that the batch is split into.

  Raises:
    ValueError: the batch does not divide (`check_batch`), or the optimizer has
      no use for the objective's state (`check_collections`).
  """
  batch_size = next(iter(batch_spec.values())).shape[0]
  check_batch(batch_size, microbatches, mesh)
  check_collections(optimizer, shardings.extra)
  once = sums_once(objective, optimizer, microbatches, mesh)
  step = train_step(objective, optimizer, microbatches, once)
  if optimizer.local_gradients:
    # Of each worker's own; the axes within a worker stay automatic.
    specs = jax.tree.map(_over_data, shardings)
    step = jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(specs, PartitionSpec("data")),
      out_specs=(specs, PartitionSpec()),
      axis_names=by_hand("data", mesh),
      # The update is the same on every shard, which types can't show.
      check_vma=False,
    )
  batches = {k: batch_sharding(mesh, v.ndim) for k, v in batch_spec.items()}
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings, batches),
    out_shardings=(shardings, None),
    compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
  )


def runner(jitted: Any, optimizer: Optimizer, mesh: Mesh) -> Step:
  """The steps of one run, from `jit_step`.

  Every `optimizer.compact_every` calls they let the optimizer give up a part of
  its state, and are then compiled anew.
  """
  calls = itertools.count(1)

  def run(state, batch):
    every = optimizer.compact_every
    # By count and not by readiness: all processes must run the same program.
    if every is not None and next(calls) % every == 0:
      state = state.replace(opt_state=optimizer.compact(state.opt_state))
    with jax.set_mesh(mesh):
      return jitted(state, batch)

  run.jitted = jitted
  return run


def compile_step(
  objective: Objective,
  optimizer: Optimizer,
  mesh: Mesh,
  *args: Any,
  **options: Any,
) -> Step:
  """`runner` of `jit_step`, whose arguments it takes."""
  jitted = jit_step(objective, optimizer, mesh, *args, **options)
  return runner(jitted, optimizer, mesh)
