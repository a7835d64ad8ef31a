"""What 1-bit Adam's experiment says of bytes and time."""

import pathlib

from absl.testing import absltest

from experiments import tables
from experiments.onebit_adam import speedup, variance, wires


class OneBitAdamTest(absltest.TestCase):
  def test_steps_send_what_the_optimizer_sends(self):
    # The schedule that tests/optim/zero_one_test.py sees in parameters.
    optimizer = dict(
      name="zero_one_adam",
      freeze_step=3,
      local_step_scaler=2,
      local_step_clipper=4,
    )
    kinds = wires.step_kinds(optimizer, 15)
    self.assertEqual(kinds[:3], [wires.FULL] * 3)
    sent = [i for i, kind in enumerate(kinds) if kind == wires.ONE_BIT]
    self.assertEqual(sent, [3, 4, 6, 10, 14])
    often = wires.step_kinds(
      optimizer | dict(freeze_step=8, variance_updates=3), 8
    )
    rare = [i for i, kind in enumerate(often) if kind == wires.ONE_BIT]
    self.assertEqual(rare, [4, 6])
    onebit = wires.step_kinds(dict(name="onebit_lamb", freeze_step=2), 5)
    self.assertEqual(onebit, [wires.FULL] * 2 + [wires.ONE_BIT] * 3)

  def test_the_rule_freezes_where_norms_have_settled(self):
    """Norms 1 - b2^t: the ratio is 0.96 where a closed form says so."""
    b2, age = 0.9, 10
    norms = [1 - b2**t for t in range(1, 101)]
    rates = [min(t, 5) for t in range(101)]
    found = variance.of_norms(norms, rates, b2)
    self.assertEqual(found["steps"], list(range(age + 1, 101)))
    x = b2 ** found["frozen"]  # (1 - x b2^-age) = 0.96 (1 - x)
    self.assertLessEqual(1 - x / b2**age, 1 - x)
    self.assertGreaterEqual(1 - x / b2**age, 0.96 * (1 - x))
    self.assertLess(1 - x / b2 ** (age + 1), 0.96 * (1 - x / b2))
    at = found["steps"].index(found["frozen"])
    self.assertGreaterEqual(found["ratios"][at], 0.96)
    self.assertLess(found["ratios"][at - 1], 0.96)
    # A rate that still rises puts it off; one that never ends does for ever.
    late = variance.of_norms(norms, [min(t, 80) for t in range(101)], b2)
    self.assertEqual(late["frozen"], 81)
    never = variance.of_norms(norms, list(range(101)), b2)
    self.assertIsNone(never["frozen"])

  def test_readme_shows_the_predicted_speed_up(self):
    readme = pathlib.Path(wires.__file__).with_name("README.md").read_text()
    self.assertIn(tables.markdown(speedup.table()), readme)

  def test_the_prediction_has_the_papers_magnitude(self):
    """6.6 times in the compressed steps at 4.1 Gbit/s; 3.3 in the whole run."""
    at = speedup.network(4.1)
    self.assertBetween(speedup.EXPOSED.speedup(64, at), 5, 12)
    whole = speedup.EXPOSED.speedup(64, at, full_share=speedup.FULL_SHARE)
    self.assertBetween(whole, 3, 5)


if __name__ == "__main__":
  absltest.main()
