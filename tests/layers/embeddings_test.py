"""The token table on a mesh: looked up and scored without moving rows."""

import os
import subprocess
import sys

from absl.testing import absltest

# The partitioner says so in C++, and only to a process that lets it speak.
_PROGRAM = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import flax.linen as nn
import jax.numpy as jnp
from bertjax.layers.embeddings import Embed
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import batch_sharding, constrain
from bertjax.parallel.sharding import logical_axes, parameter_shardings

mesh = make_mesh(data=2, fsdp=2, model=2)
embed = Embed(64, 16, "vocab")
ids = jax.ShapeDtypeStruct((8, 6), jnp.int32, sharding=batch_sharding(mesh, 2))
boxed = jax.eval_shape(
  embed.init, jax.random.key(0), jnp.zeros((8, 6), jnp.int32))["params"]
params = jax.tree.map(
  lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
  nn.meta.unbox(boxed),
  parameter_shardings(nn.meta.unbox(boxed), logical_axes(boxed), mesh))

def loss(params, ids):
  x = embed.apply({"params": params}, ids)
  x = constrain(x, ("batch", "length", None))
  logits = embed.apply(
    {"params": params}, jnp.tanh(x), jnp.float32, method="logits")
  return (logits ** 2).sum()

with jax.set_mesh(mesh):
  jax.jit(jax.grad(loss)).lower(params, ids).compile()
"""


class EmbedTest(absltest.TestCase):
  def test_a_sharded_table_moves_no_activations(self):
    quiet = {"TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
      [sys.executable, "-c", _PROGRAM],
      env={k: v for k, v in os.environ.items() if k not in quiet},
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertNotIn("full rematerialization", done.stderr)


if __name__ == "__main__":
  absltest.main()
