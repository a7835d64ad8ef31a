"""Codes of point clouds, and the clouds that they decode to."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bertjax.data.shapes.procedural import frame
from bertjax.loading import LoadedModel
from bertjax.predict import clouds as clouds_lib


@dataclasses.dataclass(frozen=True, eq=False)
class PointTokens:
  """A cloud in words.

  Attributes:
    codes: of the patches, int32 [g].
    centres: of the patches [g, 3], where they are in the cloud.
    points: decoded [g m, 3], in the cloud's own coordinates.
  """

  codes: np.ndarray
  centres: np.ndarray
  points: np.ndarray


def tokenize_points(
  model: LoadedModel, clouds: Sequence[np.ndarray], *, batch_size: int = 32
) -> list[PointTokens]:
  """The likeliest code of every patch of some clouds, and what they decode to.

  A cloud's points are drawn as those of an evaluation (the farthest ones first,
  if `data.farthest` says so), always the same, and moved into the unit sphere.

  Args:
    model: of the objective "point_reconstruction".
    clouds: [n, 3] each.
    batch_size: clouds at a time.

  Raises:
    ValueError: another kind of model, or no cloud.
  """
  clouds_lib.check_clouds(
    model, clouds, "point_reconstruction", "tokenize_points"
  )
  drawn = [clouds_lib.still(model, cloud) for cloud in clouds]
  rows = {"points": np.stack([x.row for x in drawn])}
  said = clouds_lib.run(model, "outputs", rows, batch_size)
  moves = clouds_lib.reading_of(model).unit_sphere
  found = []
  for number, (_, source) in enumerate(drawn):
    centre, radius = frame(source) if moves else (np.zeros(3), 1.0)
    found.append(
      PointTokens(
        said["codes"][number].astype(np.int32),
        said["centres"][number] * radius + centre,
        said["points"][number] * radius + centre,
      )
    )
  return found
