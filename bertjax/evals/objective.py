"""The objective's own metrics on held-out data, under masks that stay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bertjax.evals.base import Evaluator, check_counts, read_batches
from bertjax.objectives.base import Metrics, check_reads
from bertjax.parallel.sharding import put_batch
from bertjax.reuse import kept


@kept
def metrics(objective: Any) -> Callable[[Any, Any], Metrics]:
  """The objective's metrics of (variables, batch), without dropout, jitted."""

  @jax.jit
  def metrics_of(variables, batch):
    return objective.apply(variables, batch, train=False)[1]

  return metrics_of


@jax.jit
def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def objective_eval(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  split: str = "validation",
  num_batches: int | None = None,
  batch_size: int | None = None,
) -> Evaluator:
  """Metrics of `objective` over a split, each weighted by its own count.

  A metric whose weight is 0 is left out.

  Args:
    objective: what is evaluated, without dropout.
    data: the experiment's data.
    mesh: the device mesh.
    split: of the source.
    num_batches: at most so many; None reads the whole split.
    batch_size: of the global batch; that of training by default.

  Raises:
    ValueError: the objective reads what the data lack; no batch at all, asked
      for or found when it is called.
  """
  check_counts(num_batches=num_batches, batch_size=batch_size)
  # Of this very split: there may be no other.
  held = data.dataset(split).batch_spec(data.batch_size)
  name = f"evals: {type(objective).__name__}"
  check_reads(objective, held, name, f"the data of split={split!r}")
  metrics_of = metrics(objective)

  def evaluate(variables, key) -> dict[str, float]:
    del key
    total = None
    with jax.set_mesh(mesh):
      for batch in read_batches(data, mesh, split, num_batches, batch_size):
        found = metrics_of(variables, put_batch(batch, mesh))
        total = found if total is None else _add(total, found)
    return {
      name: float(value) / float(weight)
      for name, (value, weight) in jax.device_get(total).items()
      if weight != 0
    }

  return Evaluator(evaluate, lambda: data.baseline(split, num_batches))
