"""Intersection over union of the parts of objects, as ShapeNetPart has it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from bertjax.evals.base import (
  Evaluator,
  check_counts,
  gathered,
  read_batches,
)


def shape_ious(
  logits: Float[Array, "b n p"],
  parts: Int[Array, "b n"],
  own: Bool[Array, "b p"],
) -> Float[Array, " b"]:
  """Mean over an object's parts of intersection over union.

  Points get the likeliest of the parts that the object's category has. A part
  that is neither guessed nor there counts 1.

  Args:
    logits: scores of all parts.
    parts: the right ones; a point with -1 is left out.
    own: parts of the category.
  """
  guessed = jnp.where(own[:, None], logits, -jnp.inf).argmax(-1)
  numbers = jnp.arange(logits.shape[-1])[None, None]
  known = (parts >= 0)[..., None]
  mine = (guessed[..., None] == numbers) & known
  right = (parts[..., None] == numbers) & known
  shared, either = (mine & right).sum(1), (mine | right).sum(1)
  each = jnp.where(either > 0, shared / jnp.maximum(either, 1), 1.0)
  return jnp.where(own, each, 0.0).sum(-1) / jnp.maximum(own.sum(-1), 1)


def _ious(objective, variables, batch):
  members = np.zeros((objective.num_categories, objective.num_parts), bool)
  for category, parts in enumerate(objective.class_parts):
    members[category, list(parts)] = True
  logits = objective.apply(variables, batch, method="logits")
  own = jnp.asarray(members)[batch["category"]]
  ious = shape_ious(logits, batch["parts"], own)
  # Rows that fill a batch have no part anywhere.
  return ious, batch["category"], (batch["parts"] >= 0).any(1)


def part_iou(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  split: str = "validation",
  batch_size: int | None = None,
) -> Evaluator:
  """Mean IoU over objects, and over categories of their objects' means.

  Args:
    objective: a `PartSegmentation`.
    data: with `points`, `category` and `parts`.
    mesh: the device mesh.
    split: of the source.
    batch_size: of the global batch; that of training by default.

  Raises:
    ValueError: another objective, a batch size below 1 or, when it is called,
      no labelled row.
  """
  if not getattr(objective, "class_parts", ()):
    raise ValueError(
      "evals: part_iou needs objective.name='part_segmentation', not"
      f" {type(objective).__name__}."
    )
  check_counts(batch_size=batch_size)
  run = gathered(_ious, objective, mesh)

  def evaluate(variables, key) -> dict[str, float]:
    del key
    found = []
    for batch in read_batches(data, mesh, split, None, batch_size):
      ious, category, valid = run(variables, batch)
      found.append((ious[valid], category[valid]))
    ious, category = (np.concatenate(parts) for parts in zip(*found))
    if not len(ious):
      raise ValueError(f"split={split!r} has no labelled row to evaluate on.")
    means = [ious[category == c].mean() for c in np.unique(category)]
    return {
      "instance_miou": float(ious.mean()),
      "class_miou": float(np.mean(means)),
    }

  return Evaluator(evaluate, lambda: data.baseline(split))
