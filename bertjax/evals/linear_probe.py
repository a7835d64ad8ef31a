"""A linear classifier on frozen features, for choosing among pre-trainings."""

from collections.abc import Callable
from typing import Any, NamedTuple

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
from bertjax.registry import lookup
from bertjax.reuse import Partial


class Feature(NamedTuple):
  """What of a row is probed.

  Attributes:
    method: of the objective; takes a batch.
    pool: what it says -> [b, f].
    condition: an attribute of the objective that must be true.
  """

  method: str
  pool: Callable[[jax.Array], jax.Array]
  condition: str = ""


# Of final states [b, t, e]; rows without padding, as those of point clouds.
FEATURES: dict[str, Feature] = {
  "cls": Feature("encode", lambda hidden: hidden[:, 0]),
  "cls_max": Feature(
    "encode",
    lambda hidden: jnp.concatenate(
      [hidden[:, 0], hidden[:, 1:].max(1)], axis=-1
    ),
  ),
  "contrast": Feature("project", lambda vectors: vectors, "contrasts"),
}


def _read(feature, objective, variables, batch):
  found = objective.apply(variables, batch, method=feature.method)
  return feature.pool(found).astype(jnp.float32), batch["labels"]


def linear_probe(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  train_split: str | None = None,
  split: str = "validation",
  features: str = "cls",
  regularisation: float = 1.0,
  num_batches: int | None = None,
  batch_size: int | None = None,
) -> Evaluator:
  """Accuracy of a linear SVM on the states of a frozen encoder.

  "cls" is [CLS] itself, which fine-tuning starts from; "cls_max" what
  Point-BERT's classifier reads; "contrast" what the contrast head makes of
  [CLS], by which the released run chose its checkpoint.

  Args:
    objective: has the method that the features come from.
    data: with `labels` int32 [b], -1 for none.
    mesh: the device mesh.
    train_split: that the SVM is fitted to; that of the run by default.
    split: that it is measured on.
    features: key of `FEATURES`.
    regularisation: C of `sklearn.svm.LinearSVC`.
    num_batches: of each split; None reads them whole.
    batch_size: of the global batch; that of training by default.

  Raises:
    ValueError: data without such labels, a count below 1, features that the
      objective does not have, or, when it is called, labels of one class or
      none.
  """
  feature = lookup(FEATURES, features, "features")
  if feature.condition and not getattr(objective, feature.condition, False):
    raise ValueError(
      f"evals: linear_probe: features={features!r} needs an objective that"
      " contrasts clouds, such as 'masked_points'; probe 'cls'."
    )
  check_counts(num_batches=num_batches, batch_size=batch_size)
  _check_labels(data.batch_spec(data.batch_size))
  # Every process fits to all rows.
  run = gathered(Partial(_read, feature), objective, mesh)

  def read(variables, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for batch in read_batches(data, mesh, name, num_batches, batch_size):
      x, labels = run(variables, batch)
      found.append((x[labels >= 0], labels[labels >= 0]))
    x, labels = (np.concatenate(parts) for parts in zip(*found))
    if not len(labels):
      raise ValueError(f"split={name!r} has no labelled row to evaluate on.")
    return x, labels

  def evaluate(variables, key) -> dict[str, float]:
    from sklearn import svm

    del key
    x, labels = read(variables, train_split or data.train_split)
    classes = len(np.unique(labels))
    if classes < 2:
      raise ValueError(
        f"linear_probe: split {train_split or data.train_split!r} has labels of"
        f" {classes} classes; it takes two."
      )
    model = svm.LinearSVC(C=regularisation, random_state=0).fit(x, labels)
    x, labels = read(variables, split)
    hits = model.predict(x) == labels
    return {"accuracy": float(hits.mean()), "rows": float(len(hits))}

  return Evaluator(evaluate, lambda: data.baseline(split))


def _check_labels(batch_spec: Any) -> None:
  labels = batch_spec.get("labels")
  whole = labels is not None and jnp.issubdtype(labels.dtype, jnp.integer)
  if not whole or len(labels.shape) != 1:
    raise ValueError(
      "evals: linear_probe needs a class of every row, labels int32 [b]; these"
      f" data have {'none' if labels is None else labels}."
    )
