"""Training passes of attention, lowered for a device that is not here."""

import jax
import jax.numpy as jnp

from kernels.flash_attention import flash_attention

LENGTH = 500  # ends inside a tile


def lower(devices, *, dtype: str, width: int, options: dict):
  """The gradient by q, k, v and bias, lowered for the first device.

  Args:
    devices: to compile for.
    dtype: of q, k, v.
    width: of the heads.
    options: of `flash_attention`; "segment_ids" and "bias" may be True.
  """
  sharding = jax.sharding.SingleDeviceSharding(devices[0])

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  options = dict(options)
  inputs = {
    key: array((2, LENGTH, 4, width), jnp.dtype(dtype)) for key in "qkv"
  }
  extras = {}
  if options.pop("bias", False):
    inputs["bias"] = array((1, 4, LENGTH, LENGTH), jnp.dtype(dtype))
  if options.pop("segment_ids", False):
    extras["segment_ids"] = array((2, LENGTH), jnp.int32)

  def loss(inputs, extras):
    out = flash_attention(**inputs, **extras, **options)
    return out.astype(jnp.float32).sum()

  return jax.jit(jax.grad(loss)).lower(inputs, extras)
