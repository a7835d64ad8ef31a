"""Classes of clouds by the sum of votes of several random views.

A view is a row drawn and augmented as for training: for ModelNet40 other 1024
of 1200 farthest points, scaled and shifted (Yu et al. 2022, section 4.2). This
is one repetition: the published numbers are the best of nine on the test split.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from bertjax.data.shapes.dataset import Reading
from bertjax.evals.base import Evaluator, check_counts, gathered, size_of
from bertjax.parallel.sharding import feed


def _logits(objective, variables, batch):
  return objective.apply(variables, batch, method="logits"), batch["labels"]


def voting(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  split: str = "validation",
  views: int = 10,
  draw: str | None = None,
  augment: Sequence[Mapping[str, Any]] | None = None,
  batch_size: int | None = None,
) -> Evaluator:
  """Accuracy of the sum of logits over random views, and of one of them.

  Args:
    objective: a `PointClassification`.
    data: a `PointData`.
    mesh: the device mesh.
    split: of the source.
    views: how many.
    draw: key of `DRAWS`; that of training by default.
    augment: see `Reading`; as in training by default.
    batch_size: of the global batch; that of training by default.

  Raises:
    ValueError: data without clouds, a count below 1, or views that are all
      alike.
  """
  reading = _reading(data, draw, augment)
  check_counts(views=views, batch_size=batch_size)
  run = gathered(_logits, objective, mesh)

  def evaluate(variables, key) -> dict[str, float]:
    del key  # views are the same every time, as all rows of evaluations
    voted = single = rows = 0
    batches = data.dataset(split).views(
      views, reading, size_of(batch_size, data), None, *feed(mesh)
    )
    for batch in batches:
      each, (labels, *_) = zip(*(run(variables, view) for view in batch))
      voted += (sum(each).argmax(-1) == labels).sum()
      single += (each[0].argmax(-1) == labels).sum()
      rows += (labels >= 0).sum()
    if not rows:
      raise ValueError(f"split={split!r} has no labelled row to evaluate on.")
    return {
      "accuracy": float(voted / rows),
      "single_view_accuracy": float(single / rows),
    }

  return Evaluator(evaluate, lambda: data.baseline(split))


def _reading(
  data: Any, draw: str | None, augment: Sequence[Mapping[str, Any]] | None
) -> Reading:
  """How views are made.

  Raises:
    ValueError: of nothing, or all alike.
  """
  reading = getattr(data, "reading", None)
  if not isinstance(reading, Reading):
    raise ValueError(
      f"evals: voting needs data.name='points', not {type(data).__name__}."
    )
  reading = dataclasses.replace(
    reading,
    draw=reading.draw if draw is None else draw,
    augment=reading.augment if augment is None else tuple(augment),
  )
  if reading.draw == "first" and not reading.augment:
    raise ValueError(
      "evals: voting: draw='first' without augment makes all views alike; draw"
      " a 'subset', or augment."
    )
  return reading
