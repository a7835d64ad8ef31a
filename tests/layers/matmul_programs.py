"""What `matmul_test` compiles for a TPU; another process imports it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bertjax.layers import matmul
from bertjax.parallel.mesh import make_mesh


def scanned(
  devices: Sequence[Any], *, layers: int, rows: int, width: int, held=True
) -> jax.stages.Lowered:
  """A stack of square layers in bfloat16, from float32 parameters."""
  mesh = make_mesh(devices=devices)
  everywhere = NamedSharding(mesh, PartitionSpec())

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

  def layer(x, params):
    kernel, bias = params
    if held:
      kernel = matmul.held(kernel, bias)
    y = matmul.einsum("te,ef->tf", x, kernel, x.dtype) + bias[None]
    return jnp.tanh(y).astype(x.dtype), None

  def run(x, params):
    return jax.lax.scan(layer, x, params)[0]

  params = array(layers, width, width), array(layers, width)
  with jax.set_mesh(mesh):
    return jax.jit(run).lower(array(rows, width, dtype=jnp.bfloat16), params)
