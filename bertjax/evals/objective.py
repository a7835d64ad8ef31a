"""The objective's own metrics on held-out data, under masks that stay."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bertjax.parallel.sharding import put_batch


def read_batches(
  data: Any, split: str, num_batches: int | None, batch_size: int | None
) -> Iterable[Mapping[str, Any]]:
  """This process's slices of a split's evaluation batches."""
  return data.dataset(split).evaluation_batches(
    batch_size or data.batch_size,
    num_batches,
    jax.process_index(),
    jax.process_count(),
  )


def objective_eval(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  split: str = "validation",
  num_batches: int | None = None,
  batch_size: int | None = None,
):
  """Metrics of `objective` over a split, each weighted by its own count.

  Args:
    objective: what is evaluated, without dropout.
    data: the experiment's data.
    mesh: the device mesh.
    split: of the source.
    num_batches: at most so many; None reads the whole split.
    batch_size: of the global batch; that of training by default.
  """

  @jax.jit
  def metrics_of(variables, batch):
    return objective.apply(variables, batch, train=False)[1]

  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

  def evaluate(variables, key) -> dict[str, float]:
    del key
    total = None
    with jax.set_mesh(mesh):
      for batch in read_batches(data, split, num_batches, batch_size):
        metrics = metrics_of(variables, put_batch(batch, mesh))
        total = metrics if total is None else add(total, metrics)
    return {
      name: float(value) / max(float(weight), 1.0)
      for name, (value, weight) in jax.device_get(total).items()
    }

  return evaluate
