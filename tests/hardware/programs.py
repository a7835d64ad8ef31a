"""Programs whose cost is known in closed form; compiled by another process."""

import os
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def _on_first(devices, shape, dtype=jnp.bfloat16):
  sharding = jax.sharding.SingleDeviceSharding(devices[0])
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def matmul_chain(devices, *, size, count):
  """x w w ... w: 2 size^3 FLOP `count` times."""

  def chain(x, w):
    for _ in range(count):
      x = x @ w
    return x

  x = _on_first(devices, (size, size))
  return jax.jit(chain).lower(x, x)


def copy(devices, *, rows):
  """Reads and writes rows x 1024 float32 values, hidden from the compiler."""
  x = _on_first(devices, (rows, 1024), jnp.float32)
  return jax.jit(lambda x: x * 1.5).lower(x)


def loop(devices, *, trips):
  """A body that stays a loop, `trips` times."""

  def body(_, x):
    return jnp.tanh(x @ x)

  x = _on_first(devices, (256, 256))
  return jax.jit(lambda x: jax.lax.fori_loop(0, trips, body, x)).lower(x)


def layers(devices, *, count):
  """Gradient of a scan over `count` layers."""

  def layer(x, w):
    return jnp.tanh(x @ w), None

  def loss(ws, x):
    x, _ = jax.lax.scan(layer, x, ws)
    return jnp.sum(x.astype(jnp.float32))

  ws = _on_first(devices, (count, 512, 512))
  return jax.jit(jax.grad(loss)).lower(ws, _on_first(devices, (1024, 512)))


def patches(devices, *, rows):
  """Vectors of the patches of clouds, as pre-training makes them."""
  # No other process is to spend a second on importing models.
  from bertjax.models.point_bert import MiniPointNet

  module = MiniPointNet()
  x = _on_first(devices, (rows, 64, 32, 3), jnp.float32)
  variables = jax.eval_shape(
    lambda x: module.init(jax.random.key(0), x, train=False), x
  )
  return jax.jit(lambda v, x: module.apply(v, x, train=False)).lower(
    variables, x
  )


def _mesh(devices):
  return jax.make_mesh(
    (4, 2, 2),
    ("data", "fsdp", "model"),
    axis_types=(AxisType.Auto,) * 3,
    devices=devices,
  )


def exchange(devices):
  """One collective of each kind; an all-reduce over "model" three times."""
  mesh = _mesh(devices)

  def local(x):
    x = jax.lax.psum(x, ("fsdp", "model"))
    y = jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)])
    y = jax.lax.fori_loop(
      0, 3, lambda _, y: jnp.sin(jax.lax.psum(y, "model")), y
    )
    return jax.lax.all_gather(y, "data"), jax.lax.psum_scatter(
      x, "fsdp", tiled=True
    )

  mapped = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  whole = NamedSharding(mesh, PartitionSpec())
  x = jax.ShapeDtypeStruct((256, 384), jnp.float32, sharding=whole)
  return jax.jit(mapped).lower(x), dict(mesh.shape)


def spared(devices):
  """Any program, and whether its process spares the compiler work."""
  x = _on_first(devices, (8, 128))
  spares = "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ
  return jax.jit(jnp.sin).lower(x), spares


def too_large(devices):
  """32 GB of arguments and as much of results."""
  x = _on_first(devices, (8, 2**30), jnp.float32)
  return jax.jit(lambda x: x + 1).lower(x)


def refused(devices):
  """A TPU kernel of which the compiler does not know one reshape."""
  from jax.experimental import pallas as pl

  def body(x, out):
    out[...] = x[...].reshape(60, 64)

  x = _on_first(devices, (30, 128), jnp.float32)
  shape = jax.ShapeDtypeStruct((60, 64), jnp.float32)
  return jax.jit(pl.pallas_call(body, out_shape=shape)).lower(x)


def fail(devices):
  raise ValueError(f"seen on {len(devices)} devices")


def die(devices, *, words, signal=None):
  del devices
  print(words, file=sys.stderr, flush=True)
  if signal is not None:
    os.kill(os.getpid(), signal)
  os._exit(3)


def softmax(devices):
  """A fused GPU kernel."""
  x = _on_first(devices, (1024, 1024), jnp.float32)
  return jax.jit(lambda x: jax.nn.softmax(x, axis=-1)).lower(x)
