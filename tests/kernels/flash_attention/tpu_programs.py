"""Training passes of attention, lowered for a TPU that is not here."""

import jax
import jax.numpy as jnp

from kernels.flash_attention import flash_attention


def lower(devices, *, sizes, dtype="bfloat16", options=()):
  """The gradient by q, k, v and bias, lowered for the first device.

  Args:
    devices: to compile for.
    sizes: (batch, heads, length, width).
    dtype: of q, k, v.
    options: of `flash_attention`; "segment_ids" and "bias" (per key) may be
      True.
  """
  sharding = jax.sharding.SingleDeviceSharding(devices[0])

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  b, h, t, d = sizes
  options, extras = dict(options), {}
  inputs = {key: array((b, h, d, t), jnp.dtype(dtype)) for key in "qkv"}
  if options.pop("bias", False):
    inputs["bias"] = array((1, h, 1, t), jnp.float32)
  if options.pop("segment_ids", False):
    extras["segment_ids"] = array((b, t), jnp.int32)

  def loss(inputs, extras):
    out = flash_attention(
      **inputs, **extras, **options, layout="bhdt", backend="tpu"
    )
    return out.astype(jnp.float32).sum()

  return jax.jit(jax.grad(loss)).lower(inputs, extras)
