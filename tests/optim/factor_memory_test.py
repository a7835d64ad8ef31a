"""Factors are sharded as parameters are, and given up after the switch."""

import pathlib

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from bertjax import optim
from bertjax.checkpoint import Checkpointer
from bertjax.optim import CurvatureState
from tests.optim.workers import Dense, world

_DENSE = Dense()
_MKOR = (("name", "mkor"), ("interval", 2), ("dtype", "float32"))


def _hybrid(step, window):
  return (*_MKOR, ("switch", (("step", step), ("window", window))))


def _world(precondition=_MKOR, **options):
  return world(
    objective=_DENSE,
    name="adamw",
    learning_rate=0.02,
    precondition=precondition,
    **options,
  )


def _curvature(state):
  leaves = jax.tree.leaves(
    state.opt_state, is_leaf=lambda x: isinstance(x, CurvatureState)
  )
  (found,) = [x for x in leaves if isinstance(x, CurvatureState)]
  return found


def _bytes(state):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(_curvature(state).factors))


def _assert_close(actual, expected, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance),
    jax.device_get(actual),
    jax.device_get(expected),
  )


class ShardingTest(parameterized.TestCase):
  def test_rows_are_sharded_where_they_divide(self):
    state = _world(axes=(("data", 1), ("fsdp", 4))).init()
    up = _curvature(state).factors["up"]
    self.assertEqual(up.left.shape, (12, 12))
    self.assertEqual(up.left.sharding.spec, P("fsdp"))
    self.assertEqual(up.left.addressable_shards[0].data.shape, (3, 12))
    self.assertEqual(up.right.shape, (9, 9))  # with the bias's column
    self.assertEqual(up.right.sharding.spec, P())

  def test_a_stack_is_sharded_by_layers(self):
    mesh = _world(axes=(("data", 1), ("fsdp", 4))).mesh
    params = {
      "layers": {"kernel": jax.ShapeDtypeStruct((8, 5, 6), np.float32)},
      "odd": {"kernel": jax.ShapeDtypeStruct((3, 5, 8), np.float32)},
    }
    axes = {key: {"kernel": ("layers", None, None)} for key in params}
    transform = optim.build_optimizer(
      dict(name="sgd", learning_rate=1.0, precondition=dict(_MKOR)),
      total_steps=1,
      params=params,
      logical_axes=axes,
    ).transform
    state = jax.eval_shape(transform.init, params)
    whole = jax.sharding.NamedSharding(mesh, P())
    found = optim.state_shardings(
      state, params, jax.tree.map(lambda _: whole, params), whole
    )
    specs = {
      jax.tree_util.keystr(path): sharding.spec
      for path, sharding in jax.tree_util.tree_leaves_with_path(found)
    }
    specs = {key: spec for key, spec in specs.items() if "factors" in key}
    self.assertLen(specs, 4)
    for key, spec in specs.items():
      if "'layers'" in key:
        self.assertEqual(spec, P("fsdp"))
      else:  # three layers; only the left factor's eight rows divide
        self.assertEqual(spec, P(None, "fsdp") if ".left" in key else P())

  def test_sharded_factors_are_those_of_one_device(self):
    options = (*_MKOR, ("wire_dtype", "float32"))
    whole, sharded = (
      _world(options, axes=axes)
      for axes in ((("data", 1),), (("data", 2), ("fsdp", 4)))
    )
    one, losses = whole.run(whole.init(), 0, 5)
    many, same = sharded.run(sharded.init(), 0, 5)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    _assert_close(many.params, one.params, rtol=1e-4, atol=1e-5)
    _assert_close(
      _curvature(many).factors, _curvature(one).factors, rtol=1e-4, atol=1e-5
    )


class ReleaseTest(parameterized.TestCase):
  @parameterized.parameters(((("data", 2),),), ((("data", 1), ("fsdp", 4)),))
  def test_memory_is_freed_and_nothing_else_changes(self, axes):
    kept, freed = (_world(_hybrid(3, window), axes=axes) for window in (50, 2))
    expected, losses = kept.run(kept.init(), 0, 8)
    state, first = freed.run(freed.init(), 0, 3)
    full = _bytes(state)
    self.assertEqual(full, _bytes(expected))
    self.assertTrue(_curvature(state).switch.on)
    state, rest = freed.run(state, 3, 8)
    np.testing.assert_allclose(first + rest, losses, rtol=1e-6)
    _assert_close(state.params, expected.params, rtol=1e-5, atol=1e-6)
    # Four factors; a number for each of their shards remains.
    self.assertLessEqual(_bytes(state), 4 * 4 * 4)
    self.assertGreater(full, 1000)

  def test_nothing_is_freed_before_the_switch(self):
    w = _world(_hybrid(30, 1), axes=(("data", 2),))
    state, _ = w.run(w.init(), 0, 3)
    self.assertFalse(_curvature(state).switch.on)
    self.assertGreater(_bytes(state), 1000)

  @parameterized.parameters(
    ((("data", 2),), (("data", 2),)),
    ((("data", 1), ("fsdp", 4)), (("data", 4),)),
    ((("data", 4),), (("data", 1), ("fsdp", 4))),
  )
  def test_a_checkpoint_without_factors_goes_on(self, axes, others):
    old, new = (_world(_hybrid(3, 2), axes=a) for a in (axes, others))
    state, _ = old.run(old.init(), 0, 6)
    folder = pathlib.Path(self.create_tempdir())
    with Checkpointer(folder) as checkpointer:
      checkpointer.save(6, state, iterator_state={}, config={})
      checkpointer.wait()
      restored = checkpointer.restore(new.abstract, adapt=optim.adapt).state
    for leaf, wanted in zip(
      jax.tree.leaves(restored), jax.tree.leaves(new.abstract)
    ):
      self.assertEqual(leaf.sharding, wanted.sharding)
    _assert_close(restored.params, state.params, rtol=0)
    _, rest = new.run(restored, 6, 8)
    _, expected = old.run(state, 6, 8)
    np.testing.assert_allclose(rest, expected, rtol=1e-5)

  def test_a_new_phase_begins_with_curvature_again(self):
    w = _world(_hybrid(3, 2), axes=(("data", 2),))
    state, _ = w.run(w.init(), 0, 6)
    fresh = w.init()
    handed = optim.hand_over(state.opt_state, fresh.opt_state)
    found = _curvature(fresh.replace(opt_state=handed))
    _assert_close(found, _curvature(fresh), rtol=0)

  def test_a_phase_that_goes_on_does_without_what_was_given_up(self):
    w = _world(_hybrid(3, 2), axes=(("data", 2),))
    state, _ = w.run(w.init(), 0, 6)
    handed = optim.hand_over(
      state.opt_state, w.init().opt_state, reset_schedule=False
    )
    _assert_close(handed, state.opt_state, rtol=0)


if __name__ == "__main__":
  absltest.main()
