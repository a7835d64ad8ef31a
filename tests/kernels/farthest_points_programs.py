"""What `farthest_points_test` compiles for TPUs; another process imports it."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import batch_sharding
from bertjax.points import farthest_point_sampling
from kernels import farthest_points


def sampled(
  devices: Sequence[Any], *, clouds: int, points: int, count: int, kernel=True
) -> jax.stages.Lowered:
  """Farthest points of a batch that is split over all devices."""
  mesh = make_mesh(devices=devices)
  x = jax.ShapeDtypeStruct(
    (clouds, points, 3), jnp.float32, sharding=batch_sharding(mesh, 3)
  )
  fits = farthest_points.fits if kernel else lambda n: False
  with (
    jax.set_mesh(mesh),
    mock.patch.object(farthest_points, "fits", fits),
  ):
    return jax.jit(lambda x: farthest_point_sampling(x, count)).lower(x)
