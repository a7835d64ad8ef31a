"""Sequences split over devices: ring attention, and its all-gather twin.

Both run inside `jax.shard_map`, where every device holds consecutive queries
and keys, or those that another `Placement` gives it. `ring_attention` (Liu et
al. 2023, arXiv:2310.01889) passes the keys and values around and merges partial
results by lse; it holds one shard of them at a time, in both passes.
`gathered_attention` collects all keys first: one larger call and one larger
buffer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels.flash_attention.backend import RESIDUALS, Backend, attend
from kernels.flash_attention.capabilities import refuse
from kernels.flash_attention.layouts import Sizes, sizes
from kernels.flash_attention.options import (
  Extras,
  Options,
  Unsupported,
  block_size,
  check,
)
from kernels.flash_attention.placement import (
  Call,
  Contiguous,
  Moving,
  Placement,
  of_shard,
)
from kernels.flash_attention.relative import Relative


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


def _check_mask(n: Sizes, extras: Extras, options: Options, count: int) -> None:
  """Refuses blocks that do not end where the shards do."""
  whole = n._replace(t=n.t * count, s=n.s * count)
  rows, columns = block_size(extras, options, whole.t, whole.s)
  if n.t % rows or n.s % columns:
    raise ValueError(
      f"block_mask of shape {extras.block_mask.shape} in blocks of"
      f" {(rows, columns)} does not divide over {count} devices of a sequence"
      f" axis, which hold {(n.t, n.s)} queries and keys each."
    )


def _check_relative(n: Sizes, relative: Relative, count: int) -> None:
  """Refuses entries of fewer diagonals than all devices' scores have."""
  need = (n.t + n.s) * count - 1
  for name, x in relative._asdict().items():
    if x is not None and x.shape[-1] != need:
      raise ValueError(
        f"relative_{name} has {x.shape[-1]} entries; on every device it must"
        f" have all {need}."
      )


def _refuse(backend, axis, q, k, v, extras, options):
  if extras.offset is not None:
    raise Unsupported("offset is set by the ring itself.")
  count = jax.lax.axis_size(axis)
  n = sizes(q, k, v, options.layout)
  if extras.block_mask is not None:
    _check_mask(n, extras, options, count)
    extras = extras._replace(block_mask=jnp.asarray(extras.block_mask))
  if extras.bias is not None and extras.bias.shape[3] != n.s * count:
    raise ValueError(
      f"bias has shape {extras.bias.shape}; on every device its last axis must"
      f" span all {n.s * count} keys."
    )
  if extras.relative is not None:
    _check_relative(n, extras.relative, count)
  # Zeros of the right kinds: what one step of the ring will see.
  shard = of_shard(extras, options, n, *map(jnp.int32, (0, 0)), count)
  check(q, k, v, shard, options)
  refuse(backend.CAPABILITIES, q, k, v, shard, options)


def _turns(mask: Any, count: int) -> tuple[bool, ...]:
  """By turn of the ring, whether a static block mask shows anything to anyone.

  In turn r device i holds the keys of device i - r.
  """
  if not isinstance(mask, np.ndarray):
    return (True,) * count
  shape = mask.shape[1] // count, mask.shape[2] // count
  parts = mask.reshape(-1, count, shape[0], count, shape[1]).any((0, 2, 4))
  index = np.arange(count)
  return tuple(
    bool(parts[index, (index - turn) % count].any()) for turn in range(count)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _ring(backend, options, axis, placement, turns, q, k, v, extras):
  call = Call(backend, options, axis, q, extras)
  moving, found = Moving(k, v, extras.kv_segments), None
  for turn, computes in enumerate(turns):
    if computes or (turn == len(turns) - 1 and found is None):
      part = placement.forward(call, turn, moving)
      found = part if found is None else merge(found, part, options.layout)
    if any(turns[turn + 1 :]) or found is None:
      moving = moving.on(axis)
  out, lse = found
  return out.astype(v.dtype), lse


def _ring_forward(backend, options, axis, placement, turns, q, k, v, extras):
  out, lse = _ring(backend, options, axis, placement, turns, q, k, v, extras)
  out, lse = map(checkpoint_name, (out, lse), RESIDUALS)
  return (out, lse), (q, k, v, extras, out, lse)


def _ring_backward(
  backend, options, axis, placement, turns, residuals, cotangents
):
  q, k, v, extras, out, lse = residuals
  dout, dlse = cotangents
  # The global lse makes each part's probabilities those of the whole.
  results = out, lse, dout, jnp.where(lse == -jnp.inf, 0.0, dlse)
  count, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  n = sizes(q, k, v, options.layout)
  call = Call(backend, options, axis, q, extras)

  def zeros(x):
    return None if x is None else jnp.zeros(x.shape, jnp.float32)

  moving = Moving(k, v, extras.kv_segments, zeros(k), zeros(v))
  dq, dbias, dslopes = map(zeros, (q, extras.bias, extras.alibi_slopes))
  drelative = jax.tree.map(zeros, extras.relative)
  for turn, computes in enumerate(turns):
    if computes:
      part = placement.backward(call, turn, moving, results)
      dq += part.q
      source = (me - turn) % count
      if dbias is not None:
        dbias = jax.lax.dynamic_update_slice_in_dim(
          dbias, part.bias.astype(jnp.float32), source * n.s, axis=3
        )
      if drelative is not None:
        place = (me * n.t, n.t), (source * n.s, n.s)
        drelative = drelative.with_part(part.relative, count * n.t, *place)
      if dslopes is not None:
        dslopes += part.alibi_slopes
      moving = moving._replace(dk=moving.dk + part.k, dv=moving.dv + part.v)
    moving = moving.on(axis)  # after the last turn, gradients are home

  def like(x, y):
    return None if x is None else x.astype(y.dtype)

  grads = Extras(
    bias=like(dbias, extras.bias),
    alibi_slopes=like(dslopes, extras.alibi_slopes),
    relative=jax.tree.map(like, drelative, extras.relative),
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
  placement: Placement = Contiguous,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of this device's queries over the keys of all devices.

  Args:
    backend: see `dispatch.attend`.
    axis: mesh axis over which positions are split, in order.
    q: this device's queries.
    k: this device's keys.
    v: this device's values.
    extras: this device's; bias spans the keys of all devices, the block mask
      and the terms of relative positions all of both, and `seed` names the
      first row and column of the whole sequence.
    options: static choices.
    placement: which positions the devices hold.

  Raises:
    ValueError: shapes that do not fit, or `Unsupported`.
  """
  _refuse(backend, axis, q, k, v, extras, options)
  turns = _turns(extras.block_mask, jax.lax.axis_size(axis))
  if extras.block_mask is not None:
    extras = extras._replace(block_mask=jnp.asarray(extras.block_mask))
  return _ring(backend, options, axis, placement, turns, q, k, v, extras)


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
  mask = extras.block_mask
  alone = extras._replace(block_mask=None, relative=None)
  shard = of_shard(alone, options, n, me, jnp.int32(0), count)
  shard = shard._replace(bias=extras.bias)
  if extras.relative is not None:
    place = (me * n.t, n.t), (0, count * n.s)
    relative = extras.relative.part(count * n.t, *place)
    shard = shard._replace(relative=relative)
  if mask is not None:
    rows = mask.shape[1] // count
    mask = jax.lax.dynamic_slice_in_dim(
      jnp.asarray(mask), me * rows, rows, axis=1
    )
    shard = shard._replace(block_mask=mask)

  def gather(x, dimension):
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True)

  t = options.layout.index("t")
  if extras.kv_segments is not None:
    shard = shard._replace(kv_segments=gather(extras.kv_segments, 1))
  return attend(backend, q, gather(k, t), gather(v, t), shard, options)
