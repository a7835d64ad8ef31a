"""Training passes of attention, ours and others', lowered for any device.

For `bertjax.hardware.compile_for`, which compiles them for chips that are not
here: `kernels.bench` prices them, `tests/kernels` looks into them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention import flash_attention

Shape = tuple[int, int, int, int]


class Implementation(NamedTuple):
  """Somebody's attention.

  Attributes:
    layout: of q, k, v, as its kernels read them.
    run: (q, k, v, segment_ids, tiles, **options) -> output.
    tiles: length -> choices of `tiles` worth trying; the first is a good guess.
  """

  layout: str
  run: Callable[..., jax.Array]
  tiles: Callable[[int], Sequence[Any]] = lambda length: (None,)


def _ours(q, k, v, segment_ids, tiles, *, layout, **options):
  return flash_attention(
    q, k, v, segment_ids=segment_ids, tiles=tiles, layout=layout, **options
  )


def _dense(q, k, v, segment_ids, tiles, **options):
  """XLA's attention, which writes the scores to memory."""
  del tiles
  mask = None
  if segment_ids is not None:
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, **options)


def _stock_flash(q, k, v, segment_ids, tiles):
  """`jax.experimental.pallas.ops.tpu.flash_attention`."""
  from jax.experimental.pallas.ops.tpu import flash_attention as stock

  rows, columns, batch = tiles
  ids = None
  if segment_ids is not None:
    ids = stock.SegmentIds(segment_ids, segment_ids)
  blocks = stock.BlockSizes(
    block_q=rows,
    block_k_major=columns,
    block_k=columns,
    block_b=batch,
    block_q_major_dkv=rows,
    block_k_major_dkv=columns,
    block_k_dkv=columns,
    block_q_dkv=rows,
    block_k_major_dq=columns,
    block_k_dq=columns,
    block_q_dq=rows,
  )
  return stock.flash_attention(
    q,
    k,
    v,
    segment_ids=ids,
    sm_scale=q.shape[-1] ** -0.5,
    block_sizes=blocks,
  )


def _stock_flash_tiles(length: int) -> list[tuple[int, int, int]]:
  sides = ((512, 512), (1024, 1024), (512, 1024), (1024, 512), (256, 512))
  found = [(*(min(n, length) for n in side), 1) for side in sides]
  if length <= 256:
    found = [(length, length, batch) for batch in (1, 2, 4)]
  return list(dict.fromkeys(found))


def _splash(q, k, v, segment_ids, tiles):
  """`jax.experimental.pallas.ops.tpu.splash_attention`; it does not scale."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  rows, columns, compute, fused, minor = tiles
  order = splash.QKVLayout[minor]
  _, heads, length, _ = q.shape
  mask = splash.MultiHeadMask(
    [splash.FullMask((length, length)) for _ in range(heads)]
  )
  kernel = splash.make_splash_mha(
    mask=mask,
    block_sizes=splash.BlockSizes(
      block_q=rows,
      block_kv=columns,
      block_kv_compute=compute,
      block_q_dkv=rows,
      block_kv_dkv=columns,
      block_kv_dkv_compute=compute,
      block_q_dq=None if fused else rows,
      block_kv_dq=None if fused else columns,
      use_fused_bwd_kernel=fused,
      q_layout=order,
      k_layout=order,
      v_layout=order,
    ),
    head_shards=1,
    q_seq_shards=1,
  )
  q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  if segment_ids is None:
    return jax.vmap(kernel)(q, k, v)
  ids = splash.SegmentIds(segment_ids, segment_ids)
  return jax.vmap(kernel)(q, k, v, ids)


def _splash_tiles(length: int) -> list[tuple[int, int, int, bool, str]]:
  sides = ((512, 512, 512), (1024, 1024, 512), (1024, 1024, 1024))
  # Of all mixtures of layouts this one is the fastest at lengths 128 and 512.
  forms = ((True, "SEQ_MINOR"), (False, "SEQ_MINOR"), (True, "HEAD_DIM_MINOR"))
  found = [
    (*(min(n, length) for n in side), *form) for form in forms for side in sides
  ]
  return list(dict.fromkeys(found))


def _stock_triton(q, k, v, segment_ids, tiles):
  """`jax.experimental.pallas.ops.gpu.attention.mha`."""
  from jax.experimental.pallas.ops.gpu import attention as stock

  del tiles  # its defaults
  return stock.mha(q, k, v, segment_ids, sm_scale=q.shape[-1] ** -0.5)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
  "ours": Implementation(
    "bhdt", functools.partial(_ours, layout="bhdt", backend="tpu")
  ),
  "ours_gpu": Implementation(
    "bthd", functools.partial(_ours, layout="bthd", backend="gpu")
  ),
  "blockwise": Implementation(
    "bthd", functools.partial(_ours, layout="bthd", backend="blockwise")
  ),
  "dense": Implementation("bthd", _dense),
  "stock_flash": Implementation("bhtd", _stock_flash, _stock_flash_tiles),
  "stock_splash": Implementation("bhtd", _splash, _splash_tiles),
  "stock_triton": Implementation("bthd", _stock_triton),
}


def lower(
  devices: Sequence[Any],
  *,
  sizes: Shape,
  name: str = "ours",
  dtype: str = "bfloat16",
  tiles: Any = None,
  options: Mapping[str, Any] = (),
) -> jax.stages.Lowered:
  """The gradient of a sum by all its arrays of floats, for the first device.

  Args:
    devices: to compile for.
    sizes: (batch, heads, length, width).
    name: key of `IMPLEMENTATIONS`.
    dtype: of q, k, v.
    tiles: for the implementation.
    options: for the implementation. True for "segment_ids" and the relative
      terms, "key" ([1, h, 1, t]) or "full" ([1, h, t, t]) for "bias" stand for
      arrays.
  """
  sharding = jax.sharding.SingleDeviceSharding(devices[0])

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  chosen = IMPLEMENTATIONS[name]
  b, h, t, d = sizes
  letters = {"b": b, "h": h, "t": t, "d": d}
  shape = tuple(letters[c] for c in chosen.layout)
  inputs = {key: array(shape, jnp.dtype(dtype)) for key in "qkv"}
  options = dict(options)
  bias, ids = options.pop("bias", None), options.pop("segment_ids", False)
  if bias is not None:
    rows = {"key": 1, "full": t}[bias]
    inputs["bias"] = array((1, h, rows, t), jnp.float32)
  entries = 2 * t - 1
  relative = {
    "relative_bias": array((1, h, entries), jnp.float32),
    "relative_keys": array((h, entries, d), jnp.dtype(dtype)),
    "relative_queries": array((h, entries, d), jnp.dtype(dtype)),
  }
  inputs |= {name: x for name, x in relative.items() if options.pop(name, 0)}
  ids = array((b, t), jnp.int32) if ids else None

  def loss(inputs, ids):
    out = chosen.run(**inputs, segment_ids=ids, tiles=tiles, **options)
    return out.astype(jnp.float32).sum()

  return jax.jit(jax.grad(loss)).lower(inputs, ids)
