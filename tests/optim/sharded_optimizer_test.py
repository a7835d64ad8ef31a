"""An optimizer on eight devices, fsdp x model, is the one of one device."""

import functools

import jax
import jax.numpy as jnp
import optax
from absl.testing import absltest, parameterized

from bertjax.optim import (
  build_optimizer,
  layer_statistics,
  state_shardings,
  trust_ratio,
)
from tests.optim.toy import STEPS, assert_close, gradients, run

LOGICAL = {
  "layers": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
  "embedding": ("vocab", "embed"),
}


class ShardedTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.mesh = jax.make_mesh(
      (4, 2),
      ("fsdp", "model"),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    key = jax.random.key(0)
    cls.params = {
      "layers": {
        "kernel": jax.random.normal(key, (3, 8, 6)),
        "bias": jax.random.normal(key, (3, 6)),
      },
      "embedding": 5.0 * jax.random.normal(key, (16, 8)),
    }
    spec = jax.sharding.PartitionSpec
    cls.specs = {
      "layers": {
        "kernel": spec(None, "fsdp", "model"),
        "bias": spec(None, "model"),
      },
      "embedding": spec(("fsdp", "model")),
    }
    cls.config = dict(
      name="lamb", learning_rate=0.01, clip_norm=1.0, pre_norm="divide"
    )
    cls.expected = run(cls.optimizer().transform, cls.params)

  @classmethod
  def optimizer(cls, **options):
    return build_optimizer(
      cls.config,
      total_steps=STEPS,
      params=cls.params,
      logical_axes=LOGICAL,
      **options,
    )

  def check(self, params, state):
    # Ten steps of sums in another order.
    assert_close(params, self.expected[0][-1], rtol=1e-5, atol=1e-5)
    assert_close(
      layer_statistics(state),
      layer_statistics(self.expected[1]),
      rtol=1e-5,
    )

  def shard(self, tree):
    return jax.tree.map(
      lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(self.mesh, s)),
      tree,
      self.specs,
    )

  def test_jit(self):
    path, state = run(self.optimizer().transform, self.shard(self.params))
    self.check(path[-1], state)
    adam_state = state[2][1]
    for moment in (adam_state.mu, adam_state.nu):
      self.assertEqual(
        moment["layers"]["kernel"].sharding.spec,
        self.specs["layers"]["kernel"],
      )

  def test_shard_map(self):
    transform = self.optimizer(param_specs=self.specs).transform
    state = self.optimizer().transform.init(self.params)
    replicated = jax.sharding.PartitionSpec()
    state_specs = state_shardings(state, self.params, self.specs, replicated)
    self.assertEqual(state_specs[2][1].mu["embedding"], self.specs["embedding"])

    @jax.jit
    @functools.partial(
      jax.shard_map,
      mesh=self.mesh,
      in_specs=(self.specs, state_specs, replicated),
      out_specs=(self.specs, state_specs),
    )
    def one(params, state, step):
      updates, state = transform.update(gradients(params, step), state, params)
      return optax.apply_updates(params, updates), state

    params = self.shard(self.params)
    for step in range(STEPS):
      params, state = one(params, state, jnp.float32(step))
    self.check(params, state)

  def test_a_sharded_stack_axis_holds_other_layers(self):
    spec = jax.sharding.PartitionSpec
    norm_axes = trust_ratio.norm_axes_from_specs(
      {"w": spec("fsdp", ("model", "seq"))}, lambda name, leaf: (0,)
    )
    self.assertEqual(norm_axes("w", jnp.ones((4, 2))), ("model", "seq"))


if __name__ == "__main__":
  absltest.main()
