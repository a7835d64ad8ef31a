"""Loss scaling: scales that change nothing, overflows that are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax.optim import loss_scale
from bertjax.optim.loss_scale import LossScaleState
from bertjax.parallel.sharding import put_batch
from tests.optim.workers import Dense, Regression, batch, world

_DENSE, _HALF = Dense(), Dense(dtype=jnp.float16)
_SGD = dict(objective=_DENSE, name="sgd")
_METHODS = {
  "mkor": (("name", "mkor"), ("rule", "exact"), ("interval", 2),
           ("wire_dtype", "float32"), ("dtype", "float32")),
  "kfac": (("name", "kfac"), ("inverse_interval", 2)),
  "sngd": (("name", "sngd"), ("rank", 16)),
}  # fmt: skip
_OPTIMIZERS = {
  "lamb": dict(name="lamb", clip_norm=0.5),
  "onebit_adam": dict(name="onebit_adam", freeze_step=2),
  **{
    name: dict(_SGD, precondition=spec, microbatches=2)
    for name, spec in _METHODS.items()
  },
}


def _scaled(**options):
  return tuple(options.items())


def _huge(step, rows):
  """A gradient that float16 holds, and not its product with a scale."""
  rows["y"][3] = 3e3
  return rows


def _scale(state):
  assert isinstance(state.opt_state, LossScaleState)
  return float(state.opt_state.scale)


class LossScaleTest(parameterized.TestCase):
  @parameterized.named_parameters(*((n, n) for n in _OPTIMIZERS if n != "sngd"))
  def test_a_power_of_two_changes_nothing(self, name):
    self._assert_unchanged(name)

  # Its statistics are of the degree of MKOR's.
  @pytest.mark.slow
  def test_a_power_of_two_changes_no_row(self):
    self._assert_unchanged("sngd")

  def _assert_unchanged(self, name):
    """Statistics of linear layers are unscaled by their own degree."""
    options = _OPTIMIZERS[name]
    plain = world(**options)
    scaled = world(**options, loss_scale=_scaled(initial=2.0**12, interval=2))
    expected, losses = plain.run(plain.init(), 0, 5)
    found, same = scaled.run(scaled.init(), 0, 5)
    self.assertEqual(_scale(found), 2.0**14)
    np.testing.assert_allclose(same, losses, rtol=1e-6)
    jax.tree.map(
      # Programs that round in other places: a scale is one more product.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      (found.params, found.opt_state.inner),
      (expected.params, expected.opt_state),
    )

  @parameterized.parameters("lamb", "onebit_adam", "mkor")
  def test_an_overflow_halves_the_scale_and_nothing_else(self, name):
    options = _OPTIMIZERS[name] | dict(objective=_HALF)
    w = world(**options, loss_scale=_scaled(initial=2.0**12))
    state, _ = w.run(w.init(), 0, 4)
    before = jax.device_get((state.params, state.opt_state.inner))
    state, losses = w.run(state, 4, 5, _huge)
    self.assertTrue(np.isfinite(losses).all())
    after = jax.device_get((state.params, state.opt_state.inner))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    self.assertEqual(_scale(state), 2.0**11)
    self.assertEqual(int(state.opt_state.skipped), 1)
    state, _ = w.run(state, 5, 6)
    self.assertEqual(int(state.opt_state.skipped), 1)
    with self.assertRaises(AssertionError):
      np.testing.assert_array_equal(
        jax.tree.leaves(state.params)[0], jax.tree.leaves(after[0])[0]
      )

  def test_the_rate_that_is_logged_is_the_one_that_is_used(self):
    """A skipped step does not count in the schedule."""
    w = world(
      name="sgd",
      objective=_HALF,
      axes=(("data", 1),),
      learning_rate=0.4,
      schedule=(("name", "linear"), ("warmup", 10)),
      loss_scale=_scaled(initial=2.0**10),
    )
    state, _ = w.run(w.init(), 0, 2)
    state, _ = w.run(state, 2, 3, _huge)
    self.assertEqual(int(state.opt_state.skipped), 1)
    _, metrics = w.step(state, put_batch(batch(3), w.mesh))
    rate, _ = metrics["learning_rate"]
    np.testing.assert_allclose(rate, w.optimizer.schedule(2), rtol=1e-6)

  def test_it_doubles_after_steps_without_an_overflow_since_the_last(self):
    w = world(name="sgd", objective=_HALF,
              loss_scale=_scaled(initial=2.0**10, interval=3))  # fmt: skip
    state, scales = w.init(), []
    for step in range(8):
      state, _ = w.run(
        state, step, step + 1, _huge if step == 2 else lambda _, rows: rows
      )
      scales.append(np.log2(_scale(state)))
    self.assertEqual(scales, [10, 10, 9, 9, 9, 10, 10, 10])

  def test_at_a_scale_of_one_the_loop_sees_the_overflow(self):
    def poison(_, rows):
      rows["y"][3] = np.inf
      return rows

    w = world(name="lamb", objective=Regression(),
              loss_scale=_scaled(initial=2))  # fmt: skip
    state, _ = w.run(w.init(), 0, 1, poison)
    self.assertTrue(np.isfinite(state.params["up"]).all())
    self.assertEqual(_scale(state), 1)
    state, _ = w.run(state, 1, 2, poison)
    self.assertFalse(np.isfinite(state.params["up"]).all())

  @parameterized.parameters((None, 0.0), (2.0**15, 1e-8))
  def test_what_float16_rounds_to_zero_is_kept(self, scale, expected):
    def loss_fn(variables):
      small = variables["params"].astype(jnp.float16) * jnp.float16(1e-4)
      return small.astype(jnp.float32).sum() * 1e-4, "aux"

    scale = None if scale is None else jnp.float32(scale)
    gradient = loss_scale.value_and_grad(loss_fn, scale)
    (loss, aux), grads = gradient({"params": jnp.ones(3)})
    self.assertEqual(aux, "aux")
    np.testing.assert_allclose(loss, 3e-8, rtol=1e-3)
    np.testing.assert_allclose(grads["params"], expected, rtol=1e-3)

  @parameterized.parameters(
    (dict(initial=0.5), r"optim.loss_scale.initial=0.5 must be a power of"),
    (dict(initial=3.0), r"optim.loss_scale.initial=3.0 must be a power of two"),
    (dict(initial=True), r"optim.loss_scale.initial=True"),
    (dict(interval=0), r"optim.loss_scale.interval=0 must be an int"),
    (dict(growth=2), r"optim.loss_scale.growth"),
  )
  def test_bad_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      world(**_SGD, loss_scale=_scaled(**options))


if __name__ == "__main__":
  absltest.main()
