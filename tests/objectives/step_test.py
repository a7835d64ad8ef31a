"""What an objective knows of the step that it is applied in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from bertjax.objectives import step


class Drawing(nn.Module):
  """Draws by each stream and reads the clock."""

  @nn.compact
  def __call__(self):
    draws = [
      jax.random.normal(self.make_rng(name), (50,))
      for name in ("dropout", "gumbel")
    ]
    return step.current_step(self), draws


class StepTest(absltest.TestCase):
  def test_the_clock_is_read_and_not_changed(self):
    found, left = Drawing().apply(
      step.clock(jnp.int32(7)),
      rngs=step.streams(jax.random.key(0)),
      mutable=["batch_stats"],
    )
    self.assertEqual(found[0], 7)
    self.assertEqual(left, {})

  def test_without_a_clock_there_is_no_step(self):
    found = Drawing().apply({}, rngs=step.streams(jax.random.key(0)))
    self.assertIsNone(found[0])

  def test_streams_are_independent_and_follow_the_key(self):
    first, again, other = (
      Drawing().apply({}, rngs=step.streams(jax.random.key(seed)))[1]
      for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    draws = np.array([*first, *other])
    correlation = np.abs(np.corrcoef(draws) - np.eye(4))
    self.assertLess(correlation.max(), 0.6)  # four deviations of 1/sqrt(50)


if __name__ == "__main__":
  absltest.main()
