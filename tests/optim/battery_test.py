"""What every optimizer of the table must do. A new row is tested by being one.

Also what the builder adds around all of them: rates, freezing, hand-over.
"""

import functools
import tempfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl.testing import absltest, parameterized

from bertjax.optim import (
  OPTIMIZERS,
  PRECONDITIONERS,
  build_optimizer,
  gradient_norm,
  hand_over,
  layer_statistics,
  selection,
)

# Options that a preconditioner requires.
_REQUIRED = {"hylo": dict(rank=2), "sngd": dict(rank=4)}
SPECS = {name: dict(name=name) for name in sorted(OPTIMIZERS)} | {
  f"{name}+lamb": dict(
    name="lamb",
    precondition=dict(name=name, switch=dict(), **_REQUIRED.get(name, {})),
  )
  for name in sorted(PRECONDITIONERS)
}
ROWS = list(SPECS)
NUM_LAYERS = 2


def unstacked():
  keys = iter(jax.random.split(jax.random.key(0), 20))

  def layer():
    return {
      "up": {
        "kernel": jax.random.normal(next(keys), (4, 6)),
        "bias": jax.random.normal(next(keys), (6,)),
      },
      "norm": {"scale": jax.random.normal(next(keys), (4,))},
    }

  return {
    "encoder": {
      "embeddings": {
        "token": {"embedding": jax.random.normal(next(keys), (11, 4))}
      },
      **{f"layers_{i}": layer() for i in range(NUM_LAYERS)},
    },
    "head": {"kernel": jax.random.normal(next(keys), (4, 2))},
    "none": {},
    "empty": jnp.zeros((0, 3)),
  }


def stack(tree):
  encoder = dict(tree["encoder"])
  layers = [encoder.pop(f"layers_{i}") for i in range(NUM_LAYERS)]
  encoder["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  return {**tree, "encoder": encoder}


LOGICAL = {
  "encoder": {
    "embeddings": {"token": {"embedding": ("vocab", "embed")}},
    "layers": {
      "up": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
      "norm": {"scale": ("layers", "embed")},
    },
  },
  "head": {"kernel": ("embed", None)},
  "none": {},
  "empty": (None, None),
}


@jax.jit
def gradients(params, step=0):
  return jax.tree.map(lambda p: jnp.sin(3.0 * p + step) + 0.1 * p, params)


def build(params, name, stacked=False, **options):
  spec = SPECS.get(name, dict(name=name))
  spec = dict(learning_rate=0.01, clip_norm=5.0) | spec | options
  optimizer = build_optimizer(
    spec,
    total_steps=10,
    params=params,
    logical_axes=LOGICAL if stacked else None,
  )
  return feed(optimizer) if optimizer.statistics else optimizer.transform


# A rate that is 0 at first.
_WARMUP = dict(name="linear", warmup=2, end_factor=0.5)


class Optimizer:
  """A transformation whose update is compiled once, whichever tests take it.

  Attributes:
    params: the first ones.
    transform: the transformation itself.
    update: (gradients, state, params) -> (updates, state), traced without any
      promotion of types.
  """

  def __init__(self, params, *arguments, **options):
    self.params = params
    self.transform = build(params, *arguments, **options)
    self.init = self.transform.init
    self.update = jax.jit(self._update)

  def _update(self, updates, state, params):
    with jax.numpy_dtype_promotion("strict"):
      return self.transform.update(updates, state, params)

  def run(self, steps=4):
    """Parameters and state after as many steps."""
    params, state = self.params, self.init(self.params)
    for step in range(steps):
      grads = gradients(params, float(step))
      updates, state = self.update(grads, state, params)
      params = _moved(params, updates)
    return params, state


_moved = jax.jit(optax.apply_updates)


@functools.cache
def _optimizer(name, stacked, options):
  params = stack(unstacked()) if stacked else unstacked()
  return Optimizer(
    params, name, stacked=stacked, schedule=_WARMUP, **dict(options)
  )


def plain(name, **options):
  """The optimizer of layers by themselves; options that can be hashed."""
  return _optimizer(name, False, tuple(options.items()))


def scanned(name, **options):
  """The same of a stack of layers."""
  return _optimizer(name, True, tuple(options.items()))


def tearDownModule():
  _optimizer.cache_clear()


def feed(optimizer):
  """The transformation, given the statistics of four tokens per layer."""

  def update(updates, state, params=None, **extra):
    leaves = selection.by_name(params)
    found = {}
    for path, names in optimizer.statistics.names.items():
      kernel = jnp.sin(leaves[f"{path}/kernel"])
      found[path] = _statistics(
        jnp.matmul(kernel, jnp.swapaxes(kernel, -1, -2)), kernel, names
      )
    return optimizer.transform.update(
      updates, state, params, statistics=found, value=jnp.float32(1.0), **extra
    )

  return optax.GradientTransformationExtraArgs(optimizer.transform.init, update)


def _statistics(x, g, names):
  """Of inputs and output gradients [..., 4, d] on one shard, in one group."""
  ones = jnp.ones_like(x[..., :1])
  transposed = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
  found = dict(
    token_count=ones.sum(-2, keepdims=True),
    input_sum=x.sum(-2)[..., None, None, :],
    output_sum=g.sum(-2)[..., None, None, :],
    input_gram=(transposed(x) @ x)[..., None, :, :],
    output_gram=(transposed(g) @ g)[..., None, :, :],
    input_rows=x,
    output_rows=g,
  )
  return {name: found[name] for name in (*names, "output_sum")}


def assert_close(actual, expected, rtol=1e-6, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    actual,
    expected,
  )


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class BatteryTest(parameterized.TestCase):
  @parameterized.parameters(ROWS)
  def test_scanned_equals_unscanned(self, name):
    alone, _ = plain(name).run()
    together, _ = scanned(name).run()
    assert_close(together, stack(alone))  # other summation order

  @parameterized.parameters(ROWS)
  def test_states_keep_their_types(self, name):
    optimizer = plain(name)
    _, state = optimizer.run(steps=1)
    describe = functools.partial(
      jax.tree.map, lambda x: (x.shape, x.dtype, x.weak_type)
    )
    first = optimizer.init(optimizer.params)
    self.assertEqual(describe(state), describe(first))

  # That values are right is tested of the compiled ones.
  @parameterized.parameters(ROWS)
  @pytest.mark.slow
  def test_jit_equals_eager(self, name):
    optimizer = plain(name)
    params, state = optimizer.run(steps=2)
    eager = optimizer.transform.update(gradients(params), state, params)
    jitted = optimizer.update(gradients(params), state, params)
    assert_close(jitted, eager)  # fusion reorders float32 operations

  @parameterized.parameters(ROWS)
  def test_optax_accumulates_around_it(self, name):
    optimizer = plain(name)
    steps = optax.MultiSteps(optimizer.transform, every_k_schedule=3)
    state = jax.eval_shape(steps.init, optimizer.params)
    updates, after = jax.eval_shape(
      steps.update, optimizer.params, state, optimizer.params
    )
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    self.assertEqual(describe(updates), describe(optimizer.params))
    self.assertEqual(describe(after), describe(state))

  @parameterized.parameters("lamb", "kfac+lamb")
  def test_accumulation_equals_the_big_batch(self, name):
    optimizer = plain(name)
    params = optimizer.params
    grads = [gradients(params, float(step)) for step in range(3)]
    mean = jax.tree.map(lambda *g: np.mean(g, 0), *grads)
    updates, _ = optimizer.update(mean, optimizer.init(params), params)
    steps = optax.MultiSteps(optimizer.transform, every_k_schedule=3)
    state, update = steps.init(params), jax.jit(steps.update)
    for part in grads:
      accumulated, state = update(part, state, params)
    assert_close(accumulated, updates, rtol=1e-5)  # mean in another order

  @parameterized.product(name=ROWS, dtype=(jnp.bfloat16, jnp.int32))
  def test_parameters_that_are_not_float32_are_refused(self, name, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), unstacked())
    with self.assertRaisesRegex(ValueError, "empty is .*; an optimizer"):
      build(params, name)

  @parameterized.product(name=ROWS, freeze=((), ("embeddings", "layers_0/up")))
  def test_state_round_trips(self, name, freeze):
    optimizer = plain(name, freeze=freeze) if freeze else plain(name)
    _, state = optimizer.run(steps=2)
    fresh = optimizer.init(optimizer.params)
    encoded = flax.serialization.to_bytes(state)
    assert_same(flax.serialization.from_bytes(fresh, encoded), state)
    # Orbax saves no empty arrays.
    fresh, state = (
      jax.tree.map(lambda x: x if x.size else jnp.ones(1), tree)
      for tree in (fresh, state)
    )
    with (
      tempfile.TemporaryDirectory() as folder,
      ocp.StandardCheckpointer() as checkpointer,
    ):
      checkpointer.save(f"{folder}/state", state)
      checkpointer.wait_until_finished()
      target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        fresh,
      )
      assert_same(checkpointer.restore(f"{folder}/state", target), state)

  @parameterized.parameters(ROWS)
  def test_empty_leaves_leave_all_finite(self, name):
    after, state = plain(name).run()
    self.assertEqual(after["empty"].shape, (0, 3))
    self.assertTrue(all(np.isfinite(x).all() for x in jax.tree.leaves(after)))
    self.assertTrue(all(np.isfinite(x).all() for x in jax.tree.leaves(state)))

  @parameterized.parameters(ROWS)
  def test_abstract_parameters_suffice(self, name):
    params = unstacked()
    transform = build(jax.eval_shape(lambda: params), name)
    assert_same(transform.init(params), build(params, name).init(params))

  @parameterized.parameters(ROWS)
  def test_first_step_of_a_warm_up_moves_nothing(self, name):
    after, _ = plain(name).run(steps=1)
    assert_same(after, unstacked())

  @parameterized.parameters(ROWS)
  def test_frozen_parameters_stay_and_have_no_state(self, name):
    after, state = plain(name, freeze=("embeddings", "layers_0/up")).run()
    for pick in (
      lambda t: t["encoder"]["embeddings"],
      lambda t: t["encoder"]["layers_0"]["up"],
    ):
      assert_same(pick(after), pick(unstacked()))
    self.assertFalse(
      np.array_equal(after["head"]["kernel"], unstacked()["head"]["kernel"])
    )
    paths = [
      jax.tree_util.keystr(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    self.assertFalse([path for path in paths if "embeddings" in path])

  # The builder freezes around the optimizer, whose parts are tested without.
  @parameterized.parameters("adamw", "lamb", "onebit_adam", "mkor+lamb")
  def test_lowest_layers_freeze_alike_scanned_and_not(self, name):
    self._assert_lowest_freeze_alike(name)

  @parameterized.parameters(ROWS)
  @pytest.mark.slow
  def test_lowest_layers_of_any_optimizer_freeze_alike(self, name):
    self._assert_lowest_freeze_alike(name)

  def _assert_lowest_freeze_alike(self, name):
    options = dict(freeze_lowest=1, layerwise_decay=0.9, clip_norm=0.5)
    alone, alone_state = plain(name, **options).run()
    together, state = scanned(name, **options).run()
    assert_close(together, stack(alone))
    assert_same(
      alone["encoder"]["layers_0"], unstacked()["encoder"]["layers_0"]
    )
    # The frozen layer does not count in the clipped norm either.
    np.testing.assert_allclose(
      gradient_norm(state), gradient_norm(alone_state), rtol=1e-6
    )

  @parameterized.parameters(ROWS)
  def test_hand_over_restarts_the_schedule_and_keeps_moments(self, name):
    optimizer = plain(name)
    params = optimizer.params
    _, old = optimizer.run(steps=3)
    fresh = optimizer.init(params)
    handed = hand_over(old, fresh)
    updates, _ = optimizer.update(gradients(params), handed, params)
    self.assertTrue(all(not x.any() for x in jax.tree.leaves(updates)))
    same = hand_over(old, fresh, reset_schedule=False)
    assert_same(same, old)
    assert_same(hand_over(old, fresh, reset_moments=True), fresh)
    adams = [
      node
      for node in jax.tree.leaves(handed, is_leaf=lambda x: hasattr(x, "mu"))
      if hasattr(node, "mu") and "count" in node._fields
    ]
    for node in adams:
      self.assertEqual(node.count, 3)


class BuilderTest(parameterized.TestCase):
  def test_layerwise_decay_reaches_every_parameter(self):
    params = stack(unstacked())
    whole = build(params, "sgd", stacked=True, clip_norm=None)
    decayed = build(
      params, "sgd", stacked=True, clip_norm=None, layerwise_decay=0.5
    )
    grads = jax.tree.map(jnp.ones_like, params)
    a, _ = whole.update(grads, whole.init(params), params)
    b, _ = decayed.update(grads, decayed.init(params), params)
    factor = jax.tree.map(lambda x, y: y / x, a, b)
    encoder = factor["encoder"]
    np.testing.assert_allclose(
      encoder["embeddings"]["token"]["embedding"], 0.25
    )
    np.testing.assert_allclose(
      encoder["layers"]["up"]["kernel"][:, 0, 0], [0.5, 1.0]
    )
    np.testing.assert_allclose(
      encoder["layers"]["norm"]["scale"][:, 0], [0.5, 1.0]
    )
    np.testing.assert_allclose(factor["head"]["kernel"], 1.0)

  def test_multipliers_first_match_wins(self):
    params = unstacked()
    grads = jax.tree.map(jnp.ones_like, params)
    rules = [("layers_0/.*bias", 3.0), ("layers_0", 0.5)]
    transform = build(params, "sgd", clip_norm=None, lr_multipliers=rules)
    updates, _ = transform.update(grads, transform.init(params), params)
    layer = updates["encoder"]["layers_0"]
    np.testing.assert_allclose(layer["up"]["bias"], -0.03, rtol=1e-6)
    np.testing.assert_allclose(layer["up"]["kernel"], -0.005, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.01, rtol=1e-6)

  def test_what_is_not_compressed_may_freeze(self):
    params, rule = unstacked(), ["embeddings"]
    transform = build(params, "onebit_adam", uncompressed=rule, freeze=rule)
    updates, _ = transform.update(params, transform.init(params), params)
    self.assertFalse(
      np.any(updates["encoder"]["embeddings"]["token"]["embedding"])
    )

  def test_rules_may_name_frozen_parameters(self):
    params = unstacked()
    transform = build(
      params, "lamb", no_decay=["embeddings"], freeze=["embeddings"]
    )
    _, state = transform.update(
      gradients(params), transform.init(params), params
    )
    self.assertNotIn(
      "encoder/embeddings/token/embedding", layer_statistics(state)
    )

  @parameterized.parameters(
    (dict(name="lam"), "optim.name='lam' is unknown.*'lamb'"),
    (dict(clip_nrom=1.0), "optim.clip_nrom .*'clip_norm'"),
    (dict(clip_norm=0.0), "optim.clip_norm=0.0 must be a positive number"),
    (dict(trust_clip=10), "optim.trust_clip=10 must be a pair"),
    (dict(precondition="mkor"), "optim.precondition='mkor' must be a mapping"),
    (dict(stacked_axes=()), "optim.stacked_axes is set by the library"),
    (dict(learning_rate=-1.0), "optim.learning_rate=-1.0"),
    (dict(freeze=["nowhere"]), "optim.freeze: pattern 'nowhere'"),
    (dict(freeze=".*"), "optim.freeze='.*' is a string"),
    (dict(freeze=["encoder", "head", "empty"]), "leaves no parameter to train"),
    (dict(freeze_lowest=4), "optim.freeze_lowest=4 must be between"),
    (dict(layerwise_decay=0.0), "optim.layerwise_decay=0.0"),
    (dict(lr_multipliers=[("head", 0.0)]), "factor 0.0 of 'head'"),
    (dict(schedule=dict(name="lin")), "optim.schedule.name='lin'"),
  )
  def test_bad_options_are_refused(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      build(unstacked(), **(dict(name="lamb") | options))

  def test_a_scanned_stack_without_logical_axes_is_refused(self):
    with self.assertRaisesRegex(ValueError, "pass logical_axes"):
      build(stack(unstacked()), "lamb", layerwise_decay=0.9)

  def test_hand_over_to_another_optimizer_is_refused(self):
    params = unstacked()
    old, fresh = (build(params, n).init(params) for n in ("lamb", "adamw"))
    with self.assertRaisesRegex(ValueError, "does not fit this phase's"):
      hand_over(old, fresh)


if __name__ == "__main__":
  absltest.main()
