"""Parts of the points of clouds whose categories are known."""

from collections.abc import Sequence

import numpy as np

from bertjax.interop.heads import default_labels
from bertjax.loading import LoadedModel
from bertjax.predict import clouds as clouds_lib
from bertjax.registry import lookup


def segment_points(
  model: LoadedModel,
  clouds: Sequence[np.ndarray],
  category: str,
  *,
  batch_size: int = 32,
) -> list[np.ndarray]:
  """The likeliest part of every point, of those that the category has.

  The model reads as many points as it was trained on; the others get the part
  of the nearest of these.

  Args:
    model: of the objective "part_segmentation".
    clouds: [n, 3] each.
    category: of all of them, by its name.
    batch_size: clouds at a time.

  Returns:
    For each cloud numbers of parts, int32 [n].

  Raises:
    ValueError: another kind of model, no cloud, or an unknown category.
  """
  from scipy import spatial  # would make all commands start later

  clouds_lib.check_clouds(model, clouds, "part_segmentation", "segment_points")
  spec = model.objective_spec
  names = spec.get("labels") or default_labels(len(spec["class_parts"]))
  number = lookup({n: i for i, n in enumerate(names)}, category, "category")
  own = np.array(spec["class_parts"][number], np.int32)
  drawn = [clouds_lib.still(model, cloud) for cloud in clouds]
  rows = {
    "points": np.stack([x.row for x in drawn]),
    "category": np.full(len(drawn), number, np.int32),
  }
  logits = clouds_lib.run(model, "logits", rows, batch_size)
  guessed = own[logits[..., own].argmax(-1)]
  found = []
  for cloud, (_, source), parts in zip(clouds, drawn, guessed):
    _, nearest = spatial.cKDTree(source).query(cloud)
    found.append(parts[nearest])
  return found
