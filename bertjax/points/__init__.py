"""Geometry of point clouds: sampling, neighbourhoods, distances.

Arrays of points are [b, n, 3], any float dtype; distances are computed in
float32 and squared distances by differences, so that no cancellation spoils
what lies close together.
"""

from bertjax.points.chamfer import Chamfer as Chamfer
from bertjax.points.chamfer import chamfer as chamfer
from bertjax.points.grouping import Patches as Patches
from bertjax.points.grouping import group as group
from bertjax.points.neighbours import gather as gather
from bertjax.points.neighbours import interpolate as interpolate
from bertjax.points.neighbours import nearest as nearest
from bertjax.points.neighbours import squared_distances as squared_distances
from bertjax.points.sampling import (
  farthest_point_sampling as farthest_point_sampling,
)
