"""Classes of point clouds, maybe by votes of several views."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bertjax.interop.heads import default_labels
from bertjax.loading import LoadedModel
from bertjax.predict import clouds as clouds_lib
from bertjax.tasks.kinds.base import likeliest


def classify_points(
  model: LoadedModel,
  clouds: Sequence[np.ndarray],
  *,
  votes: int = 0,
  batch_size: int = 32,
) -> list[dict[str, Any]]:
  """Classes of clouds with probabilities.

  Args:
    model: of the objective "point_classification".
    clouds: [n, 3] each.
    votes: views of each cloud, drawn and augmented as in training, whose logits
      are averaged; 0: the points that an evaluation draws, once.
    batch_size: rows at a time.

  Returns:
    For each cloud `label`, `probability` and `probabilities` by label.

  Raises:
    ValueError: another kind of model, no cloud, or a negative number of votes.
  """
  clouds_lib.check_clouds(
    model, clouds, "point_classification", "classify_points"
  )
  if votes < 0:
    raise ValueError(f"votes={votes} must not be negative.")
  rows = []
  for cloud in clouds:
    if votes:
      rows += [view.row for view in clouds_lib.views(model, cloud, votes)]
    else:
      rows.append(clouds_lib.still(model, cloud).row)
  logits = clouds_lib.run(
    model, "logits", {"points": np.stack(rows)}, batch_size
  )
  spec = model.objective_spec
  labels = tuple(spec.get("labels") or default_labels(spec["num_classes"]))
  means = logits.reshape(len(clouds), -1, logits.shape[-1]).mean(1)
  return likeliest(means, labels)
