"""How well a tokenizer of points decodes what it codes, by category."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bertjax.evals.base import (
  Evaluator,
  check_counts,
  gathered,
  read_batches,
)
from bertjax.objectives.point_reconstruction import (
  PointReconstruction,
  perplexity,
)


def _measure(objective, variables, batch):
  clouds, counts = objective.apply(variables, batch, method="measure")
  return clouds, batch["labels"], counts


def reconstruction(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  split: str = "validation",
  num_batches: int | None = None,
  batch_size: int | None = None,
  by_class: bool = True,
) -> Evaluator:
  """Distances of decoded clouds from their originals, and use of the codes.

  Values are those of `PointReconstruction.measure`, averaged over clouds, each
  also as NAME/CLASS; `code_usage`, the share of codes that are some patch's
  likeliest one; `code_perplexity`, exp of the entropy of their shares.

  Args:
    objective: a `PointReconstruction`.
    data: the experiment's data.
    mesh: the device mesh.
    split: of the source.
    num_batches: at most so many; None reads the whole split.
    batch_size: of the global batch; that of training by default.
    by_class: also average over each class alone.

  Raises:
    ValueError: another objective or a count below 1; when called, a split
      without clouds.
  """
  if not isinstance(objective, PointReconstruction):
    raise ValueError(
      "evals: reconstruction needs objective.name='point_reconstruction', not"
      f" {type(objective).__name__}."
    )
  check_counts(num_batches=num_batches, batch_size=batch_size)
  run = gathered(_measure, objective, mesh)

  def evaluate(variables, key) -> dict[str, float]:
    del key
    total, classes = None, data.dataset(split).clouds.classes
    for batch in read_batches(data, mesh, split, num_batches, batch_size):
      found, labels, counts = run(variables, batch)
      # A row that fills a batch is of no class.
      member = np.equal.outer(labels, range(len(classes))).astype(np.float64)
      sums = {name: x @ member for name, x in found.items()}
      sums = sums, member.sum(0), counts.astype(np.float64)
      total = sums if total is None else jax.tree.map(np.add, total, sums)
    clouds, members, counts = total
    values = {
      name: float(x.sum() / members.sum()) for name, x in clouds.items()
    }
    values["code_usage"] = float((counts > 0).mean())
    values["code_perplexity"] = float(perplexity(jnp.asarray(counts)))
    if by_class:
      values |= {
        f"{name}/{label}": float(x[i] / members[i])
        for name, x in clouds.items()
        for i, label in enumerate(classes)
        if members[i]
      }
    return values

  return Evaluator(evaluate)
