"""What `tensor_parallel_test` compiles for TPUs; another process imports it."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from bertjax.layers.attention import SelfAttention
from bertjax.layers.block import Block, no_norm
from bertjax.layers.feed_forward import FeedForward
from bertjax.layers.flash import FlashAttend
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import (
  logical_axes,
  parameter_shardings,
  spec,
)


def gradients(
  devices: Sequence[Any], *, shape: tuple[int, int, int], mlp_dim: int
) -> jax.stages.Lowered:
  """Of a block in bfloat16 whose heads and inner width two devices share.

  Args:
    devices: four of them.
    shape: of the block's input [b, t, e].
    mlp_dim: inner width.
  """
  mesh = make_mesh(data=2, model=2, devices=devices)
  block = Block(
    mixer=functools.partial(
      SelfAttention,
      num_heads=4,
      head_dim=shape[-1] // 4,
      attend=FlashAttend(),
      dtype=jnp.bfloat16,
    ),
    feed_forward=functools.partial(FeedForward, mlp_dim, dtype=jnp.bfloat16),
    norm=None,
    residual=no_norm,
  )
  apply = functools.partial(block.apply, segment_ids=None, train=False)
  init = functools.partial(block.init, segment_ids=None, train=False)
  x = jax.ShapeDtypeStruct(
    shape,
    jnp.bfloat16,
    sharding=NamedSharding(mesh, spec(("batch", "length", None))),
  )

  def loss(params, x):
    return jnp.sum(jnp.square(apply(params, x).astype(jnp.float32)))

  with jax.set_mesh(mesh):
    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    boxed = jax.eval_shape(init, key, x)
    unboxed = nn.unbox(boxed)
    params = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      unboxed,
      parameter_shardings(unboxed, logical_axes(boxed), mesh),
    )
    return jax.jit(jax.grad(loss, (0, 1))).lower(params, x)
