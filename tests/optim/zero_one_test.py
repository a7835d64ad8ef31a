"""0/1 Adam: what is sent when, and that it is 1-bit Adam in the limit."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import hardware, optim
from bertjax.checkpoint import Checkpointer
from bertjax.hardware import hlo
from bertjax.optim import freezing
from bertjax.optim.zero_one_adam import ZeroOneAdamState
from bertjax.parallel import elastic, wire
from bertjax.parallel.error_feedback import local_params
from tests.optim import workers
from tests.optim.workers import world

_SHARED = dict(weight_decay=0.0, b1=0.9, b2=0.99, eps=1e-6, freeze_step=3)
_RARE = dict(local_step_scaler=2, local_step_clipper=4, **_SHARED)


def _state(state) -> ZeroOneAdamState:
  is_node = lambda x: isinstance(x, ZeroOneAdamState)  # noqa: E731
  (node,) = filter(is_node, jax.tree.leaves(state, is_leaf=is_node))
  return node


def _alone(freeze_at=None, **options):
  """The path of one worker's parameters over a noisy valley."""
  valley = {"a": jnp.linspace(0.1, 3, 8), "b": jnp.full(6, 2.0)}
  params = {"a": jnp.linspace(-1, 1, 8), "b": jnp.ones(6)}
  valley["dead"], params["dead"] = jnp.zeros(3), jnp.ones(3)
  spec = dict(name="zero_one_adam", b2=0.99, granularity="tensor") | options
  transform = optim.build_optimizer(
    dict(local_step_scaler=2, local_step_clipper=4) | spec,
    total_steps=40,
    params=params,
  ).transform
  state, update, path = transform.init(params), jax.jit(transform.update), []
  for step in range(24):
    if step == freeze_at:
      state = optim.freeze_now(state)
    grads = jax.tree.map(
      lambda v, w: v * (w + jnp.sin(step + w)),  # noqa: B023
      valley,
      local_params(params, state),
    )
    updates, state = update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    path.append(params)
  return jax.tree.map(lambda *x: np.stack(x), *path)


class ZeroOneAdamTest(parameterized.TestCase):
  def test_without_intervals_it_is_onebit_adam(self):
    """The errors of the one are those of the other times the rate."""
    zero_one = world(name="zero_one_adam", variance_updates=99, **_SHARED)
    onebit = world(name="onebit_adam", bias_correction=False, **_SHARED)
    states = [w.run(w.init(), 0, 8)[0] for w in (zero_one, onebit)]
    for name in ("up", "down", "bias", "dead"):
      np.testing.assert_allclose(
        states[0].params[name], states[1].params[name], rtol=1e-4, atol=2e-6
      )

  def test_a_freeze_that_is_asked_for_is_that_of_a_rule(self):
    """Synchronisations become rarer since then, and errors begin at 0."""
    planned = _alone(learning_rate=0.01, freeze_step=6)
    asked = _alone(freeze_at=6, learning_rate=0.01, freeze_step=40)
    jax.tree.map(np.testing.assert_array_equal, asked, planned)

  def test_a_multiple_of_the_rate_is_another_rate(self):
    plain = _alone(learning_rate=0.01, freeze_step=6)
    scaled = _alone(
      learning_rate=0.1, freeze_step=6, lr_multipliers=[(".*", 0.1)]
    )
    jax.tree.map(
      # A product more: float32 rounds it.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      scaled,
      plain,
    )

  def test_what_has_no_variance_needs_no_eps(self):
    path = _alone(learning_rate=0.01, freeze_step=6, eps=0.0)
    self.assertTrue(np.isfinite(path["a"]).all())
    np.testing.assert_array_equal(path["dead"], 1.0)

  def test_updates_of_the_variance_become_rarer(self):
    intervals, due = freezing.Intervals.init(), []
    for step in range(40):
      if intervals.variance_due(step):
        due.append(step)
        intervals = intervals.variance_done(updates=3)
    # Three at each distance.
    self.assertEqual(due, [0, 1, 2, 3, 5, 7, 9, 13, 17, 21, 29, 37])

  def test_the_variance_changes_on_its_steps_and_not_after_the_freeze(self):
    w = world(
      name="zero_one_adam", variance_updates=1, **_SHARED | dict(freeze_step=6)
    )
    state, changed = w.init(), []
    old = np.array(_state(state.opt_state).nu["up"])
    for step in range(9):
      state, _ = w.run(state, step, step + 1)
      new = np.array(_state(state.opt_state).nu["up"])
      changed.append(bool(np.any(new != old)))
      old = new
    # Gaps 1, 2, 4: steps 0, 1, 3 and (7, were it not frozen).
    self.assertEqual([i for i, c in enumerate(changed) if c], [0, 1, 3])

  def test_workers_step_alone_and_meet_again(self):
    w = world(name="zero_one_adam", **_RARE)
    state, moved, drifts = w.init(), [], []
    old = np.array(state.params["up"])
    for step in range(15):
      state, _ = w.run(state, step, step + 1)
      new = np.array(state.params["up"])
      moved.append(bool(np.any(new != old)))
      drifts.append(np.array(_state(state.opt_state).drift.tree["up"]))
      old = new
    # Every step until 4; every second for two steps; then every fourth.
    self.assertEqual(
      [i for i, m in enumerate(moved) if m], [0, 1, 2, 3, 4, 6, 10, 14]
    )
    for step, drift in enumerate(drifts):
      if moved[step]:
        self.assertFalse(np.any(drift))
      else:
        self.assertGreater(np.abs(drift[0] - drift[1]).max(), 0)

  def test_a_gradient_that_is_not_finite_changes_nothing_anywhere(self):
    """Not even the drift of the other workers, alone as they are."""
    w = world(name="zero_one_adam", **_RARE)
    state, _ = w.run(w.init(), 0, 6)  # step 5 was taken alone
    before = jax.device_get((state.params, _state(state.opt_state)))
    self.assertTrue(np.any(before[1].drift.tree["up"]))

    def poison(step, rows):
      rows["y"][3] = np.nan
      return rows

    state, _ = w.run(state, 6, 7, poison)
    after = jax.device_get((state.params, _state(state.opt_state)))
    jax.tree.map(np.testing.assert_array_equal, after, before)

  def test_other_workers_meet_where_the_old_ones_would_have(self):
    """A resume between synchronisations keeps the mean of the drifts."""
    w = world(name="zero_one_adam", **_RARE)
    state, _ = w.run(w.init(), 0, 6)
    two = world(axes=(("data", 2),), name="zero_one_adam", **_RARE)
    with Checkpointer(self.create_tempdir().full_path) as checkpointer:
      checkpointer.save(6, state, iterator_state={}, config={})
      checkpointer.wait()
      new = checkpointer.restore(two.abstract, adapt=elastic.adapt).state
    old, new = (jax.device_get(_state(s.opt_state)) for s in (state, new))
    for kept in ("drift", "mu"):
      for name in ("up", "down", "bias"):
        before = getattr(old, kept).tree[name]
        after = getattr(new, kept).tree[name]
        self.assertEqual((before.shape[0], after.shape[0]), (4, 2))
        for one in after:
          np.testing.assert_allclose(one, before.mean(0), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new.intervals, old.intervals)

  def test_each_kind_of_step_sends_its_own(self):
    w = world(name="zero_one_adam", **_RARE)
    with jax.set_mesh(w.mesh):
      text = w.lower().compile().as_text()
    found = hardware.read_collectives(hlo.Module(text))
    shapes = {name: x.shape for name, x in w.abstract.params.items()}
    compressed = wire.compressed_bytes([*shapes.values()], 4)
    sent = [
      sum(c.sent_bytes for c in found if c.branch == (1, kind))
      for kind in range(4)
    ]
    del shapes["dead"]  # the compiler knows that its gradients are 0
    full = wire.ring_bytes([*shapes.values()], 4, 32)
    self.assertEqual(sent, [full, compressed, 0, compressed])

  def test_operations_are_not_annotated_one_by_one(self):
    w = world(name="zero_one_adam", **_RARE)
    with jax.set_mesh(w.mesh):
      self.assertNotIn("sdy.sharding_constraint", w.lower().as_text())

  def test_it_learns(self):
    def final(**options):
      w = world(
        learning_rate=0.01,
        total_steps=200,
        schedule=(("name", "linear"), ("warmup", 0.1)),
        **options,
      )
      _, losses = w.run(w.init(), 0, 200)
      return np.mean(losses[-20:]), np.mean(losses[:5])

    last, first = final(
      name="zero_one_adam",
      local_step_scaler=50,
      granularity="tensor",
      **_SHARED | dict(freeze_step=60),
    )
    self.assertLess(last, 0.3 * first)

  @parameterized.parameters(
    (dict(variance_updates=0), "optim.variance_updates=0 must be a positive"),
    (dict(local_step_clipper=1.5), "optim.local_step_clipper=1.5 must be"),
    (dict(freeze_step=0), "optim.freeze_step=0 would freeze"),
    (dict(b1=1.0), "optim.b1=1.0 must be in"),
    (dict(eps=-1.0), "optim.eps=-1.0 must be a non-negative number"),
  )
  def test_bad_options_are_refused(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      workers.World(name="zero_one_adam", **options)


if __name__ == "__main__":
  absltest.main()
