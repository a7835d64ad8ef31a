"""Which positions a device of a ring holds, and what it computes in a turn.

In turn r of a ring device i holds the keys and values of device i - r.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from kernels.flash_attention.backend import Backend, Gradients
from kernels.flash_attention.layouts import Sizes, sizes
from kernels.flash_attention.options import Extras, Options


def of_shard(extras: Extras, options: Options, n: Sizes, me, source, count):
  """The extras of the keys of device `source` for the queries of `me`."""
  changes = {}
  if extras.block_mask is not None:
    rows, columns = (size // count for size in extras.block_mask.shape[1:])
    changes["block_mask"] = jax.lax.dynamic_slice(
      extras.block_mask,
      (0, me * rows, source * columns),
      (extras.block_mask.shape[0], rows, columns),
    )
  if extras.bias is not None:
    changes["bias"] = jax.lax.dynamic_slice_in_dim(
      extras.bias, source * n.s, n.s, axis=3
    )
  if extras.relative is not None:
    place = (me * n.t, n.t), (source * n.s, n.s)
    changes["relative"] = extras.relative.part(count * n.t, *place)
  if extras.seed is not None:
    first = jnp.stack([me * n.t, source * n.s]).astype(jnp.uint32)
    changes["seed"] = extras.seed.at[4:].add(first)
  if (
    options.causal
    or options.window is not None
    or extras.alibi_slopes is not None
  ):
    # The last query of all stands where the last key of all does.
    offset = me * n.t - source * n.s + count * (n.s - n.t)
    changes["offset"] = offset.astype(jnp.int32)
  return extras._replace(**changes)


class Moving(NamedTuple):
  """What travels: keys, values, their ids, and in time their gradients."""

  k: jax.Array
  v: jax.Array
  kv_segments: jax.Array | None
  dk: jax.Array | None = None
  dv: jax.Array | None = None

  def on(self, axis: str) -> "Moving":
    """Hands everything to the next device."""
    count = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to_next), self)


class Call(NamedTuple):
  """What does not change from turn to turn."""

  backend: Backend
  options: Options
  axis: str
  q: jax.Array
  extras: Extras

  def shard(self, turn: int, moving: Moving) -> Extras:
    """The extras of the keys that are here in a turn."""
    count, me = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
    n = sizes(self.q, moving.k, moving.v, self.options.layout)
    source = (me - turn) % count
    shard = of_shard(self.extras, self.options, n, me, source, count)
    return shard._replace(kv_segments=moving.kv_segments)

  def in_order(self, moving: Moving) -> bool:
    """Whether of positions only the order of the devices' parts counts."""
    n = sizes(self.q, moving.k, moving.v, self.options.layout)
    distances = self.options.window is not None
    distances = distances or self.extras.alibi_slopes is not None
    return self.options.causal and not distances and n.t == n.s


class Placement(Protocol):
  """Which positions a device holds, and so what it computes in a turn.

  An object that is hashable. Both methods serve all local queries and the keys
  in `moving`, whatever part of them sees each other.
  """

  def forward(
    self, call: Call, turn: int, moving: Moving
  ) -> tuple[jax.Array, jax.Array]:
    """(out, lse) over the keys that are here, out in float32."""

  def backward(
    self, call: Call, turn: int, moving: Moving, results: tuple
  ) -> Gradients:
    """Gradients over them; results are (out, lse, dout, dlse) of all keys."""


class Contiguous:
  """Device i holds the i-th part of the positions.

  Causal attention then sees all of an earlier device's keys and none of a
  later one's, which costs neither masks nor products.
  """

  @staticmethod
  def forward(call, turn, moving):
    return Contiguous._run("forward", call, turn, moving)

  @staticmethod
  def backward(call, turn, moving, results):
    return Contiguous._run("backward", call, turn, moving, *results)

  @staticmethod
  def _run(direction, call, turn, moving, *results):
    def solve(shard, options):
      run = getattr(call.backend, direction)
      found = run(call.q, moving.k, moving.v, shard, options, *results)
      if direction == "backward":
        return found
      return found[0].astype(jnp.float32), found[1]

    shard, options = call.shard(turn, moving), call.options
    if not call.in_order(moving):
      return solve(shard, options)
    shard = shard._replace(offset=None)
    if turn == 0:
      return solve(shard, options)
    options = dataclasses.replace(options, causal=False)
    shapes = jax.eval_shape(lambda: solve(shard, options))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    if direction == "forward":
      nothing = nothing[0], jnp.full_like(nothing[1], -jnp.inf)
    return jax.lax.cond(
      jax.lax.axis_index(call.axis) >= turn,
      lambda: solve(shard, options),
      lambda: nothing,
    )
