"""Stochastic depth leaves out whole sublayers of a row."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn
from jax.sharding import PartitionSpec

from bertjax.layers.drop_path import DropPath, drop_path, linear_rates
from bertjax.models import bert
from bertjax.parallel.mesh import make_mesh

V, E, T, L = 11, 8, 5, 4


class DropPathTest(parameterized.TestCase):
  def test_rates_grow_from_none_to_the_last(self):
    np.testing.assert_allclose(
      linear_rates(12, 0.1), np.linspace(0, 0.1, 12), rtol=1e-6
    )
    np.testing.assert_allclose(linear_rates(1, 0.1), [0.1], rtol=1e-6)
    self.assertIsNone(linear_rates(12, 0.0))

  @parameterized.product(rate=(0.1, 0.5), dtype=(jnp.float32, jnp.bfloat16))
  def test_rows_go_as_a_whole_and_the_mean_stays(self, rate, dtype):
    x = jnp.ones((4001, 3, 2), dtype)
    y = np.asarray(drop_path(x, jax.random.key(0), rate), np.float32)
    rows = y.reshape(len(y), -1)
    np.testing.assert_array_equal(rows.min(1), rows.max(1))
    # 4 standard deviations of 4001 draws
    self.assertAlmostEqual((rows[:, 0] == 0).mean(), rate, delta=2 / 63)
    kept = float(jnp.asarray(1 / (1 - rate), dtype))
    np.testing.assert_allclose(rows[rows > 0], kept, rtol=1e-6)

  def test_workers_leave_out_the_rows_that_one_would(self):
    x, key = jnp.ones((32, 3)), jax.random.key(1)
    mesh = make_mesh(data=4, fsdp=2, devices=jax.devices())
    split = jax.shard_map(
      lambda x, key: drop_path(x, key, 0.4),
      in_specs=(PartitionSpec("data"), PartitionSpec()),
      out_specs=PartitionSpec("data"),
      axis_names={"data"},
      check_vma=False,
    )
    with jax.set_mesh(mesh):
      found = jax.jit(split)(x, key)
    np.testing.assert_array_equal(found, drop_path(x, key, 0.4))

  def test_evaluation_is_the_identity_and_needs_no_key(self):
    x = jnp.arange(6.0).reshape(2, 3)
    layer = DropPath()
    rate = jnp.float32(0.9)
    np.testing.assert_array_equal(layer.apply({}, x, rate, train=False), x)
    np.testing.assert_array_equal(layer.apply({}, x, None, train=True), x)


class EncoderTest(parameterized.TestCase):
  """In a stack, where the scan hands each layer its rate."""

  def outcomes(self, rate, scan):
    encoder = bert(
      vocab_size=V,
      emb_dim=E,
      num_heads=2,
      num_layers=L,
      max_positions=T,
      dropout_rate=0.0,
      drop_path_rate=rate,
      norm="pre",
      keep_layers=True,
      scan=scan,
    )
    batch = {"tokens": jnp.ones((64, T), jnp.int32)}
    variables = nn.meta.unbox(encoder.init(jax.random.key(0), batch))
    variables = jax.tree.map(lambda x: 9 * x, variables)
    run = jax.jit(
      lambda key: (
        encoder.apply(
          variables, batch, train=True, rngs={"dropout": key}
        ).layers
      )
    )
    return np.asarray(run(jax.random.key(1)))[:, :, 0, 0]

  @parameterized.parameters(True, False)
  def test_later_layers_are_left_out_more_often(self, scan):
    layers = self.outcomes(0.9, scan)
    # All rows are equal: what differs are the sublayers that they skip. In the
    # first layer none does, in the last most skip both.
    kinds = [len(np.unique(states)) for states in layers]
    self.assertEqual(kinds[:2], [1, 1])
    self.assertGreater(kinds[2], 1)
    still = (layers[1:] == layers[:-1]).mean(1)
    self.assertEqual(still[0], 0)
    self.assertGreater(still[3], still[1])
    # 0.9 squared, of 64 rows: 4 standard deviations
    self.assertAlmostEqual(still[3], 0.81, delta=0.2)

  def test_without_a_rate_nothing_is_left_out(self):
    layers = self.outcomes(0.0, True)
    np.testing.assert_allclose(layers, layers[:, :1] + 0 * layers, rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
