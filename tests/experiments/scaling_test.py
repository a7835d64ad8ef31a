"""What the experiment on pods makes of compiled steps."""

from absl.testing import absltest

from experiments.scaling import findings


def row(topology, chips, compute, exchange, **fields):
  compute, exchange = (
    [s] if isinstance(s, float) else s for s in (compute, exchange)
  )
  return {
    "part": findings.WEAK,
    "variant": "large",
    "optimizer": findings.LAMB,
    "mesh": {},
    "topology": topology,
    "chips": chips,
    "compute s": compute,
    "exchange s": exchange,
    "sent bytes": [s * 1e9 for s in exchange],
    **fields,
  }


class FindingsTest(absltest.TestCase):
  weak = [
    row("v5e:1x1", 1, 0.06, 0.0),
    row("v5p:1x1x1", 1, 0.03, 0.0),
    row("v5e:4x4", 16, 0.08, 0.04),
    row(
      "v5e:4x4",
      16,
      [0.2, 0.1],
      [0.5, 0.02],
      optimizer=findings.ONEBIT,
    ),
  ]

  def test_efficiency_is_against_a_chip_of_the_same_kind(self):
    least, most = findings.efficiency(self.weak[2], self.weak)
    self.assertAlmostEqual(least, 0.06 / 0.12)
    self.assertAlmostEqual(most, 0.06 / 0.08)
    sliced = row("2xv5p:2x2x2", 16, 0.02, 0.04)
    least, most = findings.efficiency(sliced, self.weak)
    self.assertAlmostEqual(least, 0.03 / 0.06)
    self.assertAlmostEqual(most, 0.03 / 0.04)

  def test_a_recipe_takes_all_of_its_steps(self):
    made = row("v5e:4x4", 16, 0.5, 0.25, steps=240)
    least, most = findings.minutes(made)
    self.assertAlmostEqual(least, 2.0)
    self.assertAlmostEqual(most, 3.0)

  def test_signs_are_counted_without_their_warm_up(self):
    # 40 MB of gradients and 0.08 s against 20 MB of signs and 0.1 s.
    for bandwidth, gain in ((1e9, 0.12 / 0.12), (1e8, 0.48 / 0.3)):
      found = findings.onebit_speedup(self.weak, bandwidth)
      self.assertAlmostEqual(found, gain)


if __name__ == "__main__":
  absltest.main()
