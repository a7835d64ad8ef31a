"""Sequences split over devices: ring attention, and its all-gather twin.

Both run inside `jax.shard_map`, where every device holds consecutive queries
and keys. `ring_attention` (Liu et al. 2023, arXiv:2310.01889) passes the keys
and values around and merges partial results by lse; it holds one shard of them
at a time, in both passes. `gathered_attention` collects all keys first: one
larger call and one larger buffer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.flash_attention.backend import RESIDUALS, Backend, attend
from kernels.flash_attention.capabilities import refuse
from kernels.flash_attention.options import (
  Extras,
  Options,
  Sizes,
  Unsupported,
  check,
  sizes,
)


def merge(
  first: tuple[jax.Array, jax.Array],
  second: tuple[jax.Array, jax.Array],
  layout: str = "bthd",
) -> tuple[jax.Array, jax.Array]:
  """Attention over the union of two sets of keys.

  Args:
    first: output (axes `layout`) and lse [b, h, t] over one set.
    second: likewise over the other.
    layout: of the outputs.

  Returns:
    Output, in the dtype of the first, and lse.
  """
  (out1, lse1), (out2, lse2) = first, second
  lse = jnp.logaddexp(lse1, lse2)
  base = jnp.where(lse == -jnp.inf, 0.0, lse)

  def weigh(out, part):
    order = [*layout.replace("d", "")]
    weight = jnp.exp(part - base).transpose(["bht".index(c) for c in order])
    return out * jnp.expand_dims(weight, layout.index("d"))

  return (weigh(out1, lse1) + weigh(out2, lse2)).astype(out1.dtype), lse


def _of_shard(extras: Extras, options: Options, n: Sizes, me, source, count):
  """The extras of the keys of device `source` for the queries of `me`."""
  changes = {}
  if extras.bias is not None:
    changes["bias"] = jax.lax.dynamic_slice_in_dim(
      extras.bias, source * n.s, n.s, axis=3
    )
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


def _refuse(backend, axis, q, k, v, extras, options):
  if extras.block_mask is not None:
    raise Unsupported("block_mask is not split over a sequence axis.")
  if extras.offset is not None:
    raise Unsupported("offset is set by the ring itself.")
  count = jax.lax.axis_size(axis)
  n = sizes(q, k, v, options.layout)
  if extras.bias is not None and extras.bias.shape[3] != n.s * count:
    raise ValueError(
      f"bias has shape {extras.bias.shape}; on every device its last axis must"
      f" span all {n.s * count} keys."
    )
  # Zeros of the right kinds: what one step of the ring will see.
  shard = _of_shard(extras, options, n, *map(jnp.int32, (0, 0)), count)
  check(q, k, v, shard, options)
  refuse(backend.CAPABILITIES, q, k, v, shard, options)


class _Moving(NamedTuple):
  """What travels: keys, values, their ids, and in time their gradients."""

  k: jax.Array
  v: jax.Array
  kv_segments: jax.Array | None
  dk: jax.Array | None = None
  dv: jax.Array | None = None

  def on(self, axis: str) -> "_Moving":
    """Hands everything to the next device."""
    count = jax.lax.axis_size(axis)
    to_next = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to_next), self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring(backend, options, axis, q, k, v, extras):
  count, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  n = sizes(q, k, v, options.layout)
  moving, found = _Moving(k, v, extras.kv_segments), None
  for turn in range(count):
    source = (me - turn) % count
    shard = _of_shard(extras, options, n, me, source, count)
    shard = shard._replace(kv_segments=moving.kv_segments)
    out, lse = backend.forward(q, moving.k, moving.v, shard, options)
    part = out.astype(jnp.float32), lse
    found = part if found is None else merge(found, part, options.layout)
    if turn < count - 1:
      moving = moving.on(axis)
  out, lse = found
  return out.astype(v.dtype), lse


def _ring_forward(backend, options, axis, q, k, v, extras):
  out, lse = _ring(backend, options, axis, q, k, v, extras)
  out, lse = map(checkpoint_name, (out, lse), RESIDUALS)
  return (out, lse), (q, k, v, extras, out, lse)


def _ring_backward(backend, options, axis, residuals, cotangents):
  q, k, v, extras, out, lse = residuals
  dout, dlse = cotangents
  dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)
  count, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  n = sizes(q, k, v, options.layout)

  def zeros(x):
    return None if x is None else jnp.zeros(x.shape, jnp.float32)

  moving = _Moving(k, v, extras.kv_segments, zeros(k), zeros(v))
  dq, dbias, dslopes = map(zeros, (q, extras.bias, extras.alibi_slopes))
  for turn in range(count):
    source = (me - turn) % count
    shard = _of_shard(extras, options, n, me, source, count)
    shard = shard._replace(kv_segments=moving.kv_segments)
    # The global lse makes each part's probabilities those of the whole.
    part = backend.backward(
      q, moving.k, moving.v, shard, options, out, lse, dout, dlse
    )
    dq += part.q
    if dbias is not None:
      dbias = jax.lax.dynamic_update_slice_in_dim(
        dbias, part.bias.astype(jnp.float32), source * n.s, axis=3
      )
    if dslopes is not None:
      dslopes += part.alibi_slopes
    moving = moving._replace(dk=moving.dk + part.k, dv=moving.dv + part.v)
    moving = moving.on(axis)  # after the last turn, gradients are home

  def like(x, y):
    return None if x is None else x.astype(y.dtype)

  grads = Extras(
    bias=like(dbias, extras.bias),
    alibi_slopes=like(dslopes, extras.alibi_slopes),
  )
  return like(dq, q), like(moving.dk, k), like(moving.dv, v), grads


_ring.defvjp(_ring_forward, _ring_backward)


def ring_attention(
  backend: Backend,
  axis: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of this device's queries over the keys of all devices.

  Args:
    backend: see `dispatch.attend`.
    axis: mesh axis over which positions are split, in order.
    q: this device's queries.
    k: this device's keys.
    v: this device's values.
    extras: this device's; bias spans the keys of all devices, and `seed` names
      the first row and column of the whole sequence.
    options: static choices.

  Raises:
    ValueError: shapes that do not fit, or `Unsupported`: a block mask.
  """
  _refuse(backend, axis, q, k, v, extras, options)
  return _ring(backend, options, axis, q, k, v, extras)


def gathered_attention(
  backend: Backend,
  axis: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """As `ring_attention`, by collecting the keys of all devices first."""
  _refuse(backend, axis, q, k, v, extras, options)
  count, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  n = sizes(q, k, v, options.layout)
  shard = _of_shard(extras, options, n, me, jnp.int32(0), count)
  shard = shard._replace(bias=extras.bias)

  def gather(x, dimension):
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True)

  t = options.layout.index("t")
  if extras.kv_segments is not None:
    shard = shard._replace(kv_segments=gather(extras.kv_segments, 1))
  return attend(backend, q, gather(k, t), gather(v, t), shard, options)
