"""A compressed average, lowered for devices that nobody here has."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bertjax.parallel.error_feedback import Workers
from bertjax.parallel.grids import Compression

COMPRESSION = Compression()


def average(devices, *, shape):
  """Of a tensor, over all devices; the errors' buffers are donated."""
  mesh = jax.make_mesh(
    (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
  )
  workers = Workers(mesh)
  vector = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  errors = jax.eval_shape(lambda: workers.no_errors(vector, COMPRESSION))
  whole, over = PartitionSpec(), PartitionSpec("data")

  def mean(vector, errors):
    return workers.compressed_mean(vector, errors, COMPRESSION)

  def placed(tree, spec):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
      ),
      tree,
    )

  function = jax.shard_map(
    mean,
    mesh=mesh,
    in_specs=(whole, over),
    out_specs=(whole, over),
    check_vma=False,
  )
  with jax.set_mesh(mesh):
    jitted = jax.jit(function, donate_argnums=1)
    return jitted.lower(placed(vector, whole), placed(errors, over))
