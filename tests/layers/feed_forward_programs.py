"""What `feed_forward_test` compiles for TPUs; another process imports it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from bertjax.layers.feed_forward import FeedForward
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import (
  logical_axes,
  parameter_shardings,
  spec,
)


def gradients(
  devices: Sequence[Any], *, shape: tuple[int, int, int], mlp_dim: int
) -> jax.stages.Lowered:
  """Of a feed-forward layer in bfloat16 whose inner width two devices share.

  Args:
    devices: four of them.
    shape: of the layer's input [b, t, e].
    mlp_dim: inner width.
  """
  mesh = make_mesh(data=2, model=2, devices=devices)
  layer = FeedForward(mlp_dim, dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct(
    shape,
    jnp.bfloat16,
    sharding=NamedSharding(mesh, spec(("batch", "length", None))),
  )
  boxed = jax.eval_shape(layer.init, jax.random.key(0), x)
  unboxed = nn.unbox(boxed)
  params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    unboxed,
    parameter_shardings(unboxed, logical_axes(boxed), mesh),
  )

  def loss(params, x):
    return jnp.sum(jnp.square(layer.apply(params, x).astype(jnp.float32)))

  with jax.set_mesh(mesh):
    return jax.jit(jax.grad(loss, (0, 1))).lower(params, x)
