"""A cloud as local patches around centres that are far from each other."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from bertjax.points.neighbours import gather, nearest
from bertjax.points.sampling import farthest_point_sampling


class Patches(NamedTuple):
  """A cloud in g patches of m points.

  Attributes:
    points: relative to their centre.
    centres: of the patches.
    index: of the points in the cloud.
  """

  points: Float[Array, "b g m 3"]
  centres: Float[Array, "b g 3"]
  index: Int[Array, "b g m"]


def group(
  cloud: Float[Array, "b n 3"],
  patches: int,
  size: int,
  *,
  skip_near_origin: bool = False,
) -> Patches:
  """Patches of the points nearest to the centres (Yu et al. 2022, section 3).

  No gradient flows to the cloud's choice of points, which has none.

  Args:
    cloud: of n points.
    patches: how many, g.
    size: points of each, m.
    skip_near_origin: see `farthest_point_sampling`.

  Raises:
    ValueError: more patches than points, or larger ones.
  """
  still = jax.lax.stop_gradient(cloud)
  chosen = farthest_point_sampling(
    still, patches, skip_near_origin=skip_near_origin
  )
  centres = gather(cloud, chosen)
  index, _ = nearest(jax.lax.stop_gradient(centres), still, size)
  return Patches(gather(cloud, index) - centres[:, :, None], centres, index)
