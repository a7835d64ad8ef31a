"""States that look like the loop's, and how tests save them."""

import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bertjax import checkpoint

CONFIG = {"seed": 3, "model": {"name": "bert", "sizes": [5, 7]}}


class State(struct.PyTreeNode):
  step: jax.Array
  params: dict
  opt_state: tuple
  key: jax.Array
  extra: dict


def temporary(test):
  path = pathlib.Path(tempfile.mkdtemp())
  test.addCleanup(shutil.rmtree, path, ignore_errors=True)
  return path


def mesh(n):
  return jax.make_mesh(
    (n,), ("data",), (AxisType.Auto,), devices=jax.devices()[:n]
  )


def make_state(seed, devices=4, rows=8, dtype=jnp.float32):
  """A state like the loop's: sharded kernel, adam moments, typed key."""
  kernel = jax.random.normal(jax.random.key(seed), (rows, 6), dtype)
  params = {
    "encoder": {
      "kernel": jax.device_put(kernel, NamedSharding(mesh(devices), P("data"))),
      "bias": jnp.arange(5, dtype=jnp.bfloat16) / 3 + seed,
    }
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  opt_state = optimizer.init(params)
  _, opt_state = optimizer.update(params, opt_state, params)
  return State(
    step=jnp.int32(seed),
    params=params,
    opt_state=opt_state,
    key=jax.random.key(seed, impl="rbg"),
    extra={"queue": jnp.full((3,), seed, jnp.int8)},
  )


def abstract(state, devices):
  def one(x):
    spec = P("data") if x.ndim == 2 else P()
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh(devices), spec)
    )

  return jax.tree.map(one, state)


def bits(tree):
  def one(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    return np.asarray(x).tobytes()

  return [one(x) for x in jax.tree.leaves(tree)]


def saver(workdir, **kwargs):
  return checkpoint.Checkpointer(workdir, save_async=False, **kwargs)


def save(checkpointer, step, state=None, **kwargs):
  return checkpointer.save(
    step,
    make_state(step) if state is None else state,
    iterator_state={"next": step},
    config=CONFIG,
    **kwargs,
  )
