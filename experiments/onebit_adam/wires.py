"""Bytes that averaging a BERT's gradient or momentum sends."""

import itertools
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bertjax import hardware
from bertjax.checkpoint import load_params
from bertjax.models import bert
from bertjax.objectives import masked_lm
from bertjax.optim import freezing
from bertjax.parallel import wire
from bertjax.parallel.error_feedback import Workers
from bertjax.parallel.grids import Compression
from bertjax.train_state import abstract_params

COMPRESSION = Compression()
FULL, ONE_BIT, NOTHING = "full precision", "one bit", "nothing"


def parameters(size: str) -> Any:
  """Shapes of a BERT and its masked-word head, of the paper's vocabulary."""
  objective = masked_lm(encoder=bert(vocab_size=30_528, size=size))
  names = ("tokens", "segment_ids", "masked_positions", "labels")
  spec = {n: jax.ShapeDtypeStruct((1, 8), jnp.int32) for n in names}
  return abstract_params(objective, spec)[0]


def average(devices: Sequence[Any], *, size: str) -> jax.stages.Lowered:
  """One compressed average over all devices, lowered: for `compile_for`."""
  count = len(devices)
  mesh = jax.make_mesh(
    (count,), ("data",), axis_types=(AxisType.Auto,), devices=devices
  )
  workers = Workers(mesh)

  def mean(momentum, errors):
    return workers.compressed_mean(momentum, errors, COMPRESSION)

  params = parameters(size)
  errors = jax.eval_shape(lambda: workers.no_errors(params, COMPRESSION))
  over, whole = PartitionSpec("data"), PartitionSpec()
  function = jax.shard_map(
    mean,
    mesh=mesh,
    in_specs=(whole, over),
    out_specs=(whole, over),
    check_vma=False,
  )

  def placed(tree, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )

  arguments = placed(params, whole), placed(errors, over)
  with jax.set_mesh(mesh):
    return jax.jit(function, donate_argnums=(0, 1)).lower(*arguments)


def measure(folder: pathlib.Path, topology: str, size: str) -> dict[str, Any]:
  """Bytes that a device sends, as compiled for a pod; remembered in `folder`.

  Returns:
    A row: the topology, workers, bytes compiled and by formula, the bytes of a
    ring all-reduce in 16 bits, seconds of compiling.
  """
  record = folder / f"{size}-{topology.replace(':', '-')}.json"
  if not record.exists():
    start = time.monotonic()
    program = hardware.compile_for(topology, average, size=size)
    collectives = hardware.read_collectives(program.module)
    shapes = [leaf.shape for leaf in jax.tree.leaves(parameters(size))]
    workers = program.topology.num_devices
    row = {
      "arm": topology,
      "model": size,
      "workers": workers,
      "sent bytes": sum(c.sent_bytes for c in collectives),
      "formula bytes": wire.compressed_bytes(shapes, workers, COMPRESSION),
      "ring bytes": wire.ring_bytes(shapes, workers),
      "seconds": time.monotonic() - start,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(row))
    partial.replace(record)
  return json.loads(record.read_text())


def sent_bytes(
  workdir: str | os.PathLike,
  optimizer: Mapping[str, Any],
  steps: int,
  workers: int,
) -> list[float]:
  """What a worker has sent after each step of an arm, gradients in 16 bits.

  Args:
    workdir: of a run with the same parameters.
    optimizer: `config.optim` of the arm.
    steps: of the run.
    workers: that average.
  """
  shapes = [leaf.shape for leaf in jax.tree.leaves(load_params(workdir)[0])]
  compression = Compression(granularity=optimizer.get("granularity", "buffer"))
  costs = {
    FULL: wire.ring_bytes(shapes, workers),
    ONE_BIT: wire.compressed_bytes(shapes, workers, compression),
    NOTHING: 0.0,
  }
  kinds = step_kinds(optimizer, steps)
  return list(itertools.accumulate(costs[kind] for kind in kinds))


def step_kinds(optimizer: Mapping[str, Any], steps: int) -> list[str]:
  """What each step of an arm sends: FULL, ONE_BIT or NOTHING."""
  name = optimizer["name"]
  if name in ("adamw", "lamb"):
    return [FULL] * steps
  if name == "compressed_gradient_adam":
    return [ONE_BIT] * steps
  freeze = optimizer["freeze_step"]
  if name != "zero_one_adam":
    return [FULL] * freeze + [ONE_BIT] * (steps - freeze)
  intervals, kinds = freezing.Intervals.init(), []
  for step in range(freeze):
    due = bool(intervals.variance_due(step))
    kinds.append(FULL if due else ONE_BIT)
    if due:
      intervals = intervals.variance_done(optimizer.get("variance_updates", 16))
  alone = 0
  for step in range(freeze, steps):
    doublings = (step - freeze) // optimizer["local_step_scaler"]
    gap = min(2**doublings, optimizer["local_step_clipper"])
    alone = 0 if alone + 1 >= gap else alone + 1
    kinds.append(NOTHING if alone else ONE_BIT)
  return kinds
