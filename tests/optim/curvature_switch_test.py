"""When curvature is given up, and what is left of it."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.optim import curvature_metrics, switch_now
from bertjax.optim.preconditioning.switch import SwitchRule
from tests.optim.one_layer import (
  build,
  curvature,
  gradients,
  matrix,
  parameters,
  samples,
  statistics,
)


class SwitchTest(parameterized.TestCase):
  _RULE = dict(threshold=0.01, window=10, patience=2, earliest=25, decay=0.5)

  def _steps_on(self, rule, losses):
    """Steps after which the switch is on."""
    state = rule.init()
    advance = jax.jit(rule.advance)
    found = []
    for step, loss in enumerate(losses, 1):
      state = advance(state, jnp.float32(loss))
      if state.on:
        found.append(step)
    return found

  def _curve(self, until):
    """Halves every 20 steps `until`, then rests."""
    return [4.0 * 0.5 ** (min(step, until) / 20) for step in range(120)]

  def test_it_fires_at_the_predicted_step_and_stays(self):
    """Resting from 42 on; windows that end at 60 and 70 see no progress.

    The one that ends at 50 still does: at step 40 the average lagged.
    """
    found = self._steps_on(SwitchRule(**self._RULE), self._curve(42))
    self.assertEqual(found, list(range(70, 121)))

  def test_progress_between_slow_windows_begins_the_count_anew(self):
    losses = self._curve(42)
    losses[60:] = [0.5 * loss for loss in losses[60:]]
    found = self._steps_on(SwitchRule(**self._RULE), losses)
    self.assertEqual(found[0], 90)

  def test_nothing_counts_early(self):
    rule = SwitchRule(**self._RULE | dict(patience=1, earliest=100))
    self.assertEqual(self._steps_on(rule, [1.0] * 120)[0], 110)

  def test_a_falling_loss_never_throws_it(self):
    self.assertEmpty(self._steps_on(SwitchRule(**self._RULE), self._curve(120)))

  def test_by_step(self):
    rule = SwitchRule(step=7)
    self.assertEqual(self._steps_on(rule, [1.0] * 9), [7, 8, 9])

  def test_afterwards_the_optimizer_is_alone_and_its_moments_go_on(self):
    transform = build("mkor", switch=dict(step=2), interval=1, rescale="none")
    params = parameters()
    state = transform.init(params)
    ratios = []
    for step in range(4):
      x, g = samples(step)
      grads = gradients(x, g)
      before = jax.device_get(curvature(state).factors)
      updates, state = transform.update(
        grads, state, params, statistics=statistics(x, g), value=1.0
      )
      ratios.append(np.abs(matrix(updates) + 0.5 * matrix(grads)).max())
    self.assertGreater(min(ratios[:2]), 1e-3)
    self.assertLess(max(ratios[2:]), 1e-6)
    jax.tree.map(
      np.testing.assert_array_equal, before, curvature(state).factors
    )
    self.assertEqual(curvature_metrics(state)["second_order"], 0.0)

  def test_by_hand(self):
    transform = build("mkor", switch=dict(threshold=None))
    state = transform.init(parameters())
    self.assertFalse(curvature(state).switch.on)
    self.assertTrue(curvature(switch_now(state)).switch.on)
    with self.assertRaisesRegex(ValueError, "has no switch"):
      switch_now(build("mkor").init(parameters()))

  def test_it_needs_the_loss(self):
    transform = build("mkor", switch=dict())
    x, g = samples()
    with self.assertRaisesRegex(ValueError, "value is required"):
      transform.update(
        gradients(x, g), transform.init(parameters()), parameters(),
        statistics=statistics(x, g),
      )  # fmt: skip


if __name__ == "__main__":
  absltest.main()
