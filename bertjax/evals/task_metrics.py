"""A downstream task's own metrics over a whole split."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from bertjax.evals.base import (
  Evaluator,
  check_counts,
  gathered,
  read_batches,
)


def _logits(objective, variables, batch):
  logits = objective.apply(variables, batch, method="logits")
  return logits, batch["index"]


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
    ValueError: the data are no task's, a batch size below 1 or, when it is
      called, a split without rows.
  """
  if not hasattr(data, "task"):
    raise ValueError(
      f"evals: task_metrics needs data.name='task', not {type(data).__name__}."
    )
  check_counts(batch_size=batch_size)
  # Every process scores the whole split.
  run = gathered(_logits, objective, mesh)

  def evaluate(variables, key) -> dict[str, float]:
    del key
    logits = None
    for batch in read_batches(data, mesh, split, None, batch_size):
      found, index = run(variables, batch)
      if logits is None:
        count = data.dataset(split).rows_per_epoch(0)
        logits = np.zeros((count, *found.shape[1:]), found.dtype)
      real = index >= 0
      logits[index[real]] = found[real]
    return data.task.kind.score(logits, data.dataset(split).features)

  return Evaluator(evaluate, lambda: data.baseline(split))
