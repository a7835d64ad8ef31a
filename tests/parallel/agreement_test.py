"""Processes that stop together although their clocks differ."""

from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import stopping
from bertjax.parallel import agreement


class AlarmTest(parameterized.TestCase):
  """Process 0 is asked first; what it tells is played to process 1."""

  def stops(self, step_s, skew_s, budget_s):
    """The step before which each process stops, and how often it was told."""
    told, found = [], []
    for process, skew in enumerate((0.0, skew_s)):
      answers = iter(told.copy())

      def broadcast(value, process=process, answers=answers):
        if process == 0:
          told.append(value)
        return value if process == 0 else next(answers)

      stop = stopping.build_stop({"wall_clock_s": budget_s})
      step, elapsed = 0, 0.0
      with (
        mock.patch.object(jax, "process_count", return_value=2),
        mock.patch.object(
          agreement.multihost_utils, "broadcast_one_to_all", broadcast
        ),
      ):
        while stop(step, 0, elapsed + skew, {}) is None:
          elapsed += step_s(step)
          step += 1
      self.assertIsNone(next(answers, None))
      found.append((step, elapsed))
    (first, elapsed), (second, _) = found
    self.assertEqual(first, second)
    return first, elapsed, len(told)

  @parameterized.parameters(-50.0, 0.3, 1e6)
  def test_all_stop_at_the_first_step_after_the_time(self, skew_s):
    steps, elapsed, told = self.stops(lambda step: 0.25, skew_s, 1000.0)
    self.assertEqual((steps, elapsed), (4000, 1000.0))
    self.assertLess(told, 4000 / 32 + 15)

  def test_so_they_do_where_the_pace_changes_by_half(self):
    for budget_s in np.arange(100.0, 120.0, 0.7):
      _, elapsed, _ = self.stops(
        lambda step: 0.3 if step // 40 % 2 else 0.2, 5.0, budget_s
      )
      self.assertBetween(elapsed, budget_s, budget_s + 0.3)

  def test_a_slow_first_step_and_long_pauses_cost_a_few_steps_at_most(self):
    def step_s(step):
      return 60.0 if step == 0 else 200.0 if step % 1000 == 999 else 0.1

    for budget_s in (400.0, 900.0, 1600.0):
      steps, elapsed, told = self.stops(step_s, 5.0, budget_s)
      self.assertBetween(elapsed, budget_s, budget_s + 32 * 0.1 + 200)
      self.assertLess(told, steps / 32 + 40)

  def test_a_budget_of_less_than_a_step_ends_after_one(self):
    steps, _, told = self.stops(lambda step: 9.0, 0.0, 1.0)
    self.assertEqual((steps, told), (1, 2))

  def test_alone_nobody_is_told(self):
    with mock.patch.object(
      agreement.multihost_utils, "broadcast_one_to_all"
    ) as broadcast:
      alarm = agreement.Alarm()
      answers = [alarm(step, 2.0 - step) for step in range(4)]
    self.assertEqual(answers, [False, False, True, True])
    broadcast.assert_not_called()


if __name__ == "__main__":
  absltest.main()
