from absl.testing import absltest

from bertjax.optim import PRECONDITIONERS
from experiments.mkor import costs


class CostsTest(absltest.TestCase):
  def test_every_preconditioner_has_a_cost(self):
    names = {options["name"] for options in costs.METHODS.values()}
    self.assertEqual(names, set(PRECONDITIONERS))

  def test_hylo_keeps_a_tenth_of_the_rows(self):
    found = {
      name: costs.layer(name=name, width=6, tokens=30, repeats=1)
      for name in ("SNGD", "HyLo")
    }
    # Of r rows: r inputs, r output gradients, a kernel of r x r; SNGD's r is
    # 30, HyLo's 3, besides the four numbers of its trend.
    self.assertEqual(found["SNGD"]["state bytes"], 4 * (2 * 30 * 6 + 30**2))
    self.assertLess(found["HyLo"]["state bytes"], 4 * (2 * 3 * 6 + 3**2 + 6))
    self.assertGreater(found["HyLo"]["refresh ms"], 0)


if __name__ == "__main__":
  absltest.main()
