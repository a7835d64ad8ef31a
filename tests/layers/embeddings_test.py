"""Tables: on a mesh no rows move; short ones are selected from."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers.embeddings import Embed

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


class ShortTableTest(parameterized.TestCase):
  @parameterized.parameters(2, 4, 5)
  def test_rows_and_gradient_are_those_of_a_lookup(self, num):
    embed = Embed(num, 3, "types")
    table = jax.random.normal(jax.random.key(0), (num, 3))
    ids = jax.random.randint(jax.random.key(1), (2, 7), 0, num)
    g = jax.random.normal(jax.random.key(2), (2, 7, 3))

    def look_up(table):
      return embed.apply({"params": {"embedding": table}}, ids)

    found, pull = jax.vjp(look_up, table)
    np.testing.assert_array_equal(found, np.asarray(table)[ids])
    want = np.zeros((num, 3), np.float32)
    np.add.at(want, ids, g)
    np.testing.assert_allclose(pull(g)[0], want, atol=1e-6)  # float32 sums
    made = str(jax.make_jaxpr(jax.grad(lambda t: look_up(t).sum()))(table))
    self.assertEqual("scatter" in made, num > 4)

  @parameterized.parameters(2, 5)
  def test_an_id_outside_a_table_gives_nan(self, num):
    embed = Embed(num, 3, "types")
    variables = {"params": {"embedding": jnp.ones((num, 3))}}
    found = embed.apply(variables, jnp.array([num - 1, num, -1, -num - 1]))
    np.testing.assert_array_equal(jnp.isnan(found).all(1), [False] + 3 * [True])


if __name__ == "__main__":
  absltest.main()
