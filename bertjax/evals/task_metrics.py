"""A downstream task's own metrics over a whole split."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax.evals.base import Evaluator, read_batches
from bertjax.parallel.sharding import put_batch


def predict_split(
  variables: Any,
  *,
  logits_of: Any,
  data: Any,
  mesh: Mesh,
  split: str,
  batch_size: int | None = None,
) -> np.ndarray:
  """Logits of all rows of a split, in the order of its features.

  Args:
    variables: the objective's collections.
    logits_of: `(variables, batch) -> logits, index`, replicated.
    data: a `TaskData`.
    mesh: the device mesh.
    split: of the source.
    batch_size: of the global batch; that of training by default.
  """
  logits = None
  with jax.set_mesh(mesh):
    for batch in read_batches(data, mesh, split, None, batch_size):
      found, index = jax.device_get(
        logits_of(variables, put_batch(batch, mesh))
      )
      if logits is None:
        count = data.dataset(split).rows_per_epoch(0)
        logits = np.zeros((count, *found.shape[1:]), found.dtype)
      real = index >= 0
      logits[index[real]] = found[real]
  return logits


def task_metrics(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  split: str = "validation",
  batch_size: int | None = None,
) -> Evaluator:
  """The metrics that the task's row of `TASKS` names.

  Args:
    objective: one of those in `objectives.fine_tuning`.
    data: a `TaskData`.
    mesh: the device mesh.
    split: of the source, with labels.
    batch_size: of the global batch; that of training by default.

  Raises:
    ValueError: the data are no task's.
  """
  if not hasattr(data, "task"):
    raise ValueError(
      f"evals: task_metrics needs data.name='task', not {type(data).__name__}."
    )

  def run(variables, batch):
    logits = objective.apply(variables, batch, method="logits")
    return logits, batch["index"]

  # Every process scores the whole split.
  logits_of = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def evaluate(variables, key) -> dict[str, float]:
    del key
    logits = predict_split(
      variables,
      logits_of=logits_of,
      data=data,
      mesh=mesh,
      split=split,
      batch_size=batch_size,
    )
    return data.task.kind.score(logits, data.dataset(split).features)

  return Evaluator(evaluate, lambda: data.baseline(split))
