"""Optimizers that average in one bit, through the train step on 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from bertjax import hardware, optim
from bertjax.hardware import hlo
from bertjax.optim import freezing, selection
from bertjax.optim.adamw import AdamState
from bertjax.optim.freezing import build_rule
from bertjax.optim.onebit_adam import OneBitAdamState, moving
from bertjax.optim.onebit_lamb import OneBitLambState
from bertjax.parallel import wire
from bertjax.parallel.error_feedback import ErrorFeedback, PerWorker
from bertjax.parallel.grids import LANES, Compression, grid_of
from bertjax.parallel.mesh import make_mesh
from tests.optim import onebit_state, workers
from tests.optim.workers import world
from tests.parallel import onebit_oracle

_ADAM, _ONEBIT = onebit_state.ADAM, onebit_state.ONEBIT


class OneBitAdamTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_equals_the_loop_over_workers(self, compress):
    """Without compression: momentum over the root of the frozen variance."""
    n, d, steps = 4, 4 * LANES, 8  # a line each: no padding
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(steps, n, d)) * rng.uniform(0.1, 2, d)
    params = {"w": jnp.zeros(d)}
    mesh = make_mesh(devices=jax.devices()[:n])
    transform = optim.build_optimizer(
      _ONEBIT
      | dict(learning_rate=0.1, bias_correction=False, compress=compress),
      total_steps=steps,
      params=params,
      mesh=mesh,
    ).transform
    state = transform.init(params)
    specs = optim.state_shardings(state, params, {"w": P()}, P())

    def update(g, state, params):
      # The workers' parts add up to the gradient.
      return transform.update({"w": g[0] / n}, state, params)

    update = jax.jit(
      jax.shard_map(
        update,
        mesh=mesh,
        in_specs=(P("data"), specs, P()),
        out_specs=(P(), specs),
        check_vma=False,
      )
    )
    path = []
    for g in grads:
      updates, state = update(jnp.asarray(g, jnp.float32), state, params)
      params = optax.apply_updates(params, updates)
      path.append(params["w"])
    expected = onebit_oracle.adam(
      grads, freeze_step=3, rate=0.1, compress=compress, **_ADAM
    )
    np.testing.assert_allclose(np.stack(path), expected, rtol=2e-4, atol=2e-5)

  def test_first_phase_is_adam_on_the_mean_gradient(self):
    onebit, adam = (
      world(**options, clip_norm=None)
      for options in (_ONEBIT | dict(freeze_step=9), dict(name="adam", **_ADAM))
    )
    states = [w.run(w.init(), 0, 5)[0] for w in (onebit, adam)]
    onebit_state.assert_close(states[0].params, states[1].params)

  def test_one_worker_has_only_its_own_scale_to_lose(self):
    """With a block of one number compression loses nothing."""
    exact, plain = (
      world(axes=(("data", 1),), **_ONEBIT, **options)
      for options in (dict(granularity=1), dict(compress=False))
    )
    states = [w.run(w.init(), 0, 7)[0] for w in (exact, plain)]
    onebit_state.assert_close(states[0].params, states[1].params)

  @parameterized.parameters(
    # Both axes hold both single ones: those take turns.
    ("buffer", (("fsdp", 2), ("model", 2))),
    ("layer", (("fsdp", 2), ("model", 2))),
  )
  def test_workers_of_several_devices_are_workers_of_one(
    self, granularity, axes
  ):
    self._assert_as_of_one(granularity, axes)

  @parameterized.parameters(
    ("tensor", (("fsdp", 2), ("model", 2))),
    ("tensor", (("model", 4),)),
    ("layer", (("fsdp", 2),)),
  )
  @pytest.mark.slow
  def test_workers_of_other_devices_are_workers_of_one(self, granularity, axes):
    self._assert_as_of_one(granularity, axes)

  def _assert_as_of_one(self, granularity, axes):
    """Shards are of the last axis, so chunks and scales are the same."""
    params, losses, debt = self.of_one_device(granularity)
    split = world(
      axes=(("data", 2), *axes), **_ONEBIT | dict(granularity=granularity)
    )
    state, same = split.run(split.init(), 0, 7)
    onebit_state.assert_close(state.params, params, rtol=1e-4)
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    onebit_state.assert_close(onebit_state.debt(state), debt, atol=1e-5)

  @staticmethod
  @functools.cache
  def of_one_device(granularity):
    """(parameters, losses, debt) of two workers after seven steps."""
    flat = world(axes=(("data", 2),), **_ONEBIT | dict(granularity=granularity))
    state, losses = flat.run(flat.init(), 0, 7)
    return jax.device_get(state.params), losses, onebit_state.debt(state)

  def test_state_is_sharded_within_a_worker_and_over_workers(self):
    state = world(axes=(("data", 2), ("fsdp", 2)), **_ONEBIT).init()
    (adam,) = onebit_state.nodes(state.opt_state, OneBitAdamState)
    for leaf in (state.params["up"], adam.mu["up"], adam.nu["up"]):
      self.assertEqual(leaf.sharding.spec, P(None, "fsdp"))
    worker, server = adam.errors.worker.tree["up"], adam.errors.server["up"]
    shape = (workers.INPUTS, workers.HIDDEN // 2)
    self.assertEqual(worker.addressable_shards[0].data.shape, (1, *shape))
    # Half of a worker's shard, in whole lines.
    piece = grid_of(shape, 2, Compression()).piece
    self.assertEqual(
      server.addressable_shards[0].data.shape, (1, 1, 1, 1, piece)
    )

  def test_accumulation_equals_the_big_batch(self):
    states = [
      w.run(w.init(), 0, 6)[0]
      for w in (world(**_ONEBIT), world(microbatches=2, **_ONEBIT))
    ]
    onebit_state.assert_close(
      states[0].params, states[1].params, rtol=1e-4, atol=1e-5
    )

  def test_replicas_are_equal_to_the_bit_and_errors_are_not(self):
    w = world(**_ONEBIT)
    state, _ = w.run(w.init(), 0, 6)
    for leaf in jax.tree.leaves(state.params):
      for shard in leaf.addressable_shards[1:]:
        np.testing.assert_array_equal(
          shard.data, leaf.addressable_shards[0].data
        )
    (errors,) = onebit_state.nodes(state.opt_state, ErrorFeedback)
    worker = np.asarray(errors.worker.tree["up"])
    self.assertGreater(np.abs(worker[0] - worker[1]).max(), 0)

  def test_what_never_had_a_gradient_never_moves(self):
    w = world(**_ONEBIT)
    state = w.init()
    before = np.array(state.params["dead"])
    state, _ = w.run(state, 0, 8)
    np.testing.assert_array_equal(state.params["dead"], before)
    (errors,) = onebit_state.nodes(state.opt_state, ErrorFeedback)
    self.assertFalse(np.any(errors.worker.tree["dead"]))

  def test_a_gradient_that_is_not_finite_changes_nothing_anywhere(self):
    w = world(**_ONEBIT)
    state, _ = w.run(w.init(), 0, 5)
    before = jax.device_get((state.params, onebit_state.debt(state)))

    def poison(step, rows):
      rows["y"][3] = np.nan  # one row, so one worker
      return rows

    state, _ = w.run(state, 5, 6, poison)
    after = jax.device_get((state.params, onebit_state.debt(state)))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, losses = w.run(state, 6, 8)
    self.assertTrue(np.isfinite(losses).all())

  def test_gradients_of_mere_rounding_do_not_move(self):
    """One bit would move them by the scale of the others over eps."""
    nu = {"a": jnp.array([1.0, 1e-10, 0.0]), "b": jnp.array([1e-14, 4.0])}
    moves = moving(nu, None)
    np.testing.assert_array_equal(moves["a"], [True, True, False])
    np.testing.assert_array_equal(moves["b"], [False, True])
    nothing = moving({"a": jnp.zeros(3)}, None)
    self.assertFalse(np.any(nothing["a"]))

  def test_a_mask_holds_back_what_it_names_in_the_second_phase(self):
    def mask(name, leaf):
      return None if name != "bias" else np.arange(leaf.size) > 0

    w = world(**_ONEBIT, mask=mask)
    state, _ = w.run(w.init(), 0, 3)
    before = np.array(state.params["bias"])
    state, _ = w.run(state, 3, 6)
    after = np.array(state.params["bias"])
    self.assertEqual(after[0], before[0])
    self.assertTrue(np.all(after[1:] != before[1:]))
    (errors,) = onebit_state.nodes(state.opt_state, ErrorFeedback)
    self.assertFalse(np.any(errors.worker.tree["bias"][:, 0]))

  @parameterized.parameters("onebit_adam", "onebit_lamb")
  def test_a_config_masks_by_rows(self, name):
    w = world(
      name=name,
      freeze_step=3,
      weight_decay=0.0,
      mask=(("up", 5), ("bias", 1)),
    )
    state, _ = w.run(w.init(), 0, 3)
    before = jax.device_get(state.params)
    state, _ = w.run(state, 3, 6)
    moved = jax.tree.map(lambda a, b: a != b, before, state.params)
    np.testing.assert_array_equal(
      moved["up"].all(1), np.arange(workers.INPUTS) < 5
    )
    np.testing.assert_array_equal(moved["bias"], np.arange(workers.OUTPUTS) < 1)
    self.assertTrue(moved["down"].all())

  def test_the_switch_leaves_the_rate_as_it_is(self):
    """Of constant gradients each step is as long as the one before."""
    transform = optim.build_optimizer(
      _ONEBIT | dict(learning_rate=0.1, granularity=1),
      total_steps=8,
      params={"w": jnp.zeros(5)},
    ).transform
    params = {"w": jnp.zeros(5)}
    state = transform.init(params)
    grads = {"w": np.float32([-3.0, 0.5, 2.0, 1e-2, -40.0])}
    update = jax.jit(transform.update)
    for _ in range(8):
      updates, state = update(grads, state, params)
      np.testing.assert_allclose(
        updates["w"], -0.1 * np.sign(grads["w"]), rtol=1e-4
      )

  def test_uncompressed_tensors_get_adam_throughout(self):
    w = world(**_ONEBIT, uncompressed=("bias",), granularity="tensor")
    state, _ = w.run(w.init(), 0, 6)
    (errors,) = onebit_state.nodes(state.opt_state, ErrorFeedback)
    self.assertNotIn("bias", selection.by_name(errors.server))
    (adam,) = onebit_state.nodes(state.opt_state, AdamState)
    self.assertEqual(adam.count, 6)

  def test_it_learns_as_adam_does_if_errors_come_back(self):
    def final(**options):
      w = world(
        learning_rate=0.01,
        total_steps=200,
        schedule=(("name", "linear"), ("warmup", 0.1)),
        **_ADAM,
        **options,
      )
      _, losses = w.run(w.init(), 0, 200)
      return np.mean(losses[-20:])

    adam = final(name="adam")
    options = dict(name="onebit_adam", weight_decay=0.0, granularity="tensor")
    onebit = final(freeze_step=40, **options)
    self.assertLess(onebit, 1.4 * adam)
    without = final(freeze_step=40, error_feedback=False, **options)
    with self.assertLogs("absl", "WARNING") as logs:
      too_early = final(freeze_step=2, **options)
    self.assertIn("optim.freeze_step=2 freezes", logs.output[0])
    self.assertLess(1.05 * onebit, without)
    self.assertLess(1.05 * onebit, too_early)

  @parameterized.parameters(
    (dict(clip_norm=1.0, clip_scope="global"), "clip_scope='global' has no"),
    (dict(scale="l2"), "optim.scale='l2' is unknown"),
    (dict(granularity="row"), "optim.granularity='row' is unknown"),
    (dict(freeze_step=0), "optim.freeze_step=0 would freeze"),
    (dict(freeze_step=41), "optim.freeze_step=41 must be between 0 and the 40"),
    (dict(freeze_step="soon"), "optim.freeze_step='soon' must be a number"),
    (dict(freeze_step="auto", freeze_threshold=1.0), "freeze_threshold=1.0"),
    (dict(mask=[("nowhere", 2)]), "optim.mask: pattern 'nowhere' matches no"),
    (dict(mask=[("up", 0)]), "optim.mask: 0 rows of 'up' must be a positive"),
    (dict(mask=["up"]), "optim.mask=.'up'. must be a list of pairs"),
    (dict(uncompressed=["nowhere"]), "optim.uncompressed: pattern 'nowhere'"),
  )
  def test_bad_options_are_refused(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      workers.World(**(_ONEBIT | options)).init()


class FreezeTest(parameterized.TestCase):
  def test_auto_waits_for_the_variance_and_the_learning_rate(self):
    # |v_t|_1 = 1 - 0.9^t; what it was 4 steps ago is 0.9 of it from step 15 on.
    norm = 1 - 0.9 ** np.arange(1, 60)
    ratio = norm[:-4] / norm[4:]
    settled = int(np.argmax(ratio >= 0.9)) + 4  # index of the step

    def frozen_after(learning_rate):
      rule = build_rule(
        "auto", threshold=0.9, interval=4, b2=0.9, total_steps=60,
        learning_rate=learning_rate,
      )  # fmt: skip
      state = rule.init()
      for step, value in enumerate(norm):
        state = rule.advance(state, {"w": jnp.full((1,), value)})
        if state.frozen:
          return step
      return None

    self.assertEqual(frozen_after(0.1), settled)
    rising = lambda step: jnp.minimum(step, 30)  # noqa: E731
    self.assertEqual(frozen_after(rising), 30)

  @parameterized.parameters((9, True), (10, False), (0.2, True), (0.25, False))
  def test_an_end_within_warm_up_is_named(self, freeze_step, early):
    schedule = optim.build_schedule(
      dict(name="linear", warmup=10), learning_rate=0.1, total_steps=40
    )
    with self.assertLogs("absl", "INFO") as logs:
      logging.info("so that there is a line")
      freezing.first_phase(freeze_step, 40, schedule)
    self.assertEqual("still warms up" in logs.output[-1], early)

  def test_by_callback(self):
    w = world(**(_ONEBIT | dict(freeze_step="manual")))
    state, _ = w.run(w.init(), 0, 4)
    self.assertFalse(np.any(onebit_state.debt(state)["up"]))
    state = state.replace(opt_state=optim.freeze_now(state.opt_state))
    state, _ = w.run(state, 4, 6)
    self.assertTrue(np.any(onebit_state.debt(state)["up"]))

  @parameterized.parameters("onebit_adam", "zero_one_adam")
  def test_not_before_there_is_a_variance(self, name):
    params = {"w": jnp.ones(5)}
    transform = _alone(params, name=name)
    state = fresh = transform.init(params)
    with self.assertRaisesRegex(ValueError, "first phase takes at least one"):
      optim.freeze_now(fresh)
    _, state = jax.jit(transform.update)(params, state, params)
    frozen = optim.freeze_now(state)
    (phase,) = onebit_state.nodes(frozen, freezing.PhaseState)
    self.assertTrue(phase.frozen)
    # Fresh moments have none again, whatever the schedule does.
    handed = optim.hand_over(
      frozen, fresh, reset_schedule=False, reset_moments=True
    )
    (phase,) = onebit_state.nodes(handed, freezing.PhaseState)
    self.assertFalse(phase.frozen)
    self.assertEqual(phase.steps, 0)


def _alone(params, **options):
  """Of one worker, outside of any mesh."""
  spec = dict(learning_rate=0.1, freeze_step=3) | options
  return optim.build_optimizer(spec, total_steps=9, params=params).transform


class BytesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("onebit_adam", (("data", 8),)),
    ("onebit_adam", (("data", 4), ("model", 2))),
    ("onebit_lamb", (("data", 4), ("fsdp", 2))),
  )
  def test_each_phase_sends_its_own(self, name, axes):
    w = world(axes=axes, name=name, freeze_step=3)
    with jax.set_mesh(w.mesh):
      text = w.lower().compile().as_text()
    found = [
      c
      for c in hardware.read_collectives(hlo.Module(text))
      if "data" in c.axes(w.mesh.shape)
    ]
    shapes = [
      leaf.sharding.shard_shape(leaf.shape)
      for leaf in jax.tree.leaves(w.abstract.params)
    ]
    phases = {
      frozen: [c for c in found if c.branch[:2] == (1, frozen)]
      for frozen in (0, 1)
    }
    # The mean gradient in float32 in the first, two messages in the second.
    count = w.mesh.shape["data"]
    self.assertEqual({c.kind for c in phases[0]}, {"all-reduce"})
    # The partitioner may halve what several devices of a worker have whole.
    ring = wire.ring_bytes(shapes, count, 32)
    sent = sum(c.sent_bytes for c in phases[0])
    self.assertBetween(sent, ring / 2, ring)
    self.assertCountEqual(
      [c.kind for c in phases[1]], ["all-to-all", "all-gather"]
    )
    self.assertEqual(
      sum(c.sent_bytes for c in phases[1]),
      wire.compressed_bytes(shapes, count),
    )
    # Whatever runs in both phases are scalars: losses and flags.
    for c in found:
      if len(c.branch) < 2:
        self.assertLess(c.operand_bytes, 64, c)


class OneBitLambTest(parameterized.TestCase):
  def test_without_ratios_and_scales_it_is_onebit_adam(self):
    shared = dict(freeze_step=3, weight_decay=0.1, **_ADAM)
    lamb = world(
      name="onebit_lamb", scale_momentum=False, no_adaptation=(".*",), **shared
    )
    adam = world(name="onebit_adam", **shared)
    states = [w.run(w.init(), 0, 7)[0] for w in (lamb, adam)]
    onebit_state.assert_close(states[0].params, states[1].params)

  def test_first_phase_is_lamb(self):
    shared = dict(trust_clip=(0.01, 10.0), clip_norm=None, **_ADAM)
    onebit = world(name="onebit_lamb", freeze_step=9, **shared)
    lamb = world(name="lamb", **shared)
    states = [w.run(w.init(), 0, 5)[0] for w in (onebit, lamb)]
    onebit_state.assert_close(states[0].params, states[1].params)

  def test_ratios_that_are_clipped_to_1_count(self):
    w = world(name="onebit_lamb", freeze_step=9, trust_clip=(1e-9, 1.0))
    state = w.init()
    # Weights this large have ratios above 1.
    large = jax.tree.map(lambda x: 99 * x, state.params)
    state, _ = w.run(state.replace(params=large), 0, 3)
    (lamb,) = onebit_state.nodes(state.opt_state, OneBitLambState)
    self.assertEqual(lamb.ratio_count["up"], 3)
    self.assertEqual(lamb.ratio_mean["up"], 1)
    self.assertEqual(lamb.ratio_count["bias"], 0)  # has none

  def test_one_magnitude_for_all_layers(self):
    w = world(name="onebit_lamb", freeze_step=5)
    state, _ = w.run(w.init(), 0, 5)
    (lamb,) = onebit_state.nodes(state.opt_state, OneBitLambState)
    mu, scale = jax.device_get((lamb.mu, lamb.momentum_scale))
    rms = [
      np.sqrt(np.mean(np.square(mu[k] * scale[k])))
      for k in ("up", "down", "bias")
    ]
    np.testing.assert_allclose(rms, rms[0], rtol=1e-5)

  def test_factors_stay_in_their_bounds(self):
    w = world(name="onebit_lamb", freeze_step=3, b2=0.9)
    state, old = w.init(), 1.0
    for step in range(9):
      state, _ = w.run(state, step, step + 1)
      (lamb,) = onebit_state.nodes(state.opt_state, OneBitLambState)
      factor = float(lamb.factor["up"])
      self.assertBetween(factor, 0.5, 4.0)
      self.assertBetween(factor / old, 0.9 - 1e-6, 1.1 + 1e-6)
      old = factor
    self.assertNotEqual(old, 1.0)
    self.assertIsInstance(lamb.errors.worker, PerWorker)

  @parameterized.parameters(
    (dict(trust_clip=(0.0, 1.0)), "optim.trust_clip=.0.0, 1.0. must be"),
    (dict(trust_clip=10), "optim.trust_clip=10 must be a pair"),
    (dict(trust_clip=None), "optim.trust_clip=None must be .lowest, highest"),
    (dict(factor_change=1.0), "optim.factor_change=1.0 must be in"),
  )
  def test_bad_options_are_refused(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      workers.World(name="onebit_lamb", **options)


class BaselineTest(absltest.TestCase):
  def test_sgd_steps_by_the_compressed_mean(self):
    w = world(name="onebit_sgd", granularity="tensor")
    state = w.init()
    before = jax.device_get(state.params)
    state, _ = w.run(state, 0, 1)
    for name in ("up", "down"):
      moved = np.abs(state.params[name] - before[name])
      # One magnitude per tensor and server.
      self.assertLessEqual(len(np.unique(np.round(moved, 6))), 4)

  def test_momentum_out_of_range_is_refused(self):
    with self.assertRaisesRegex(ValueError, "optim.momentum=1.0 must be in"):
      workers.World(name="onebit_sgd", momentum=1.0)

  def test_compression_without_feedback_has_no_state(self):
    compression = Compression(error_feedback=False)
    w = world(name="onebit_sgd", error_feedback=False)
    (errors,) = onebit_state.nodes(w.init().opt_state, ErrorFeedback)
    self.assertEqual(errors, ErrorFeedback(None, None))
    self.assertFalse(compression.error_feedback)


if __name__ == "__main__":
  absltest.main()
