"""Expected ranges hold what sound data give, and not much more."""

import numpy as np
from absl.testing import absltest, parameterized

from bertjax import health


class DataChecksTest(parameterized.TestCase):
  def rate(self, counts, lengths, **options):
    [check] = health.data_checks(
      {
        "masking_rate": counts.sum() / lengths.sum(),
        "expected_masking_rate": 0.15,
        "masking_unit": "token",
        "row_tokens": lengths.mean(),
      }
      | options
    )
    return check.ok

  @parameterized.parameters((3, 12), (40, 128), (511, 512))
  def test_the_rounding_of_rows_is_allowed_for_but_no_more(self, low, high):
    lengths = np.random.default_rng(0).integers(low, high, 1000)
    counts = np.maximum(1, np.round(0.15 * lengths))
    self.assertTrue(self.rate(counts, lengths))
    self.assertFalse(self.rate(counts + 1.5, lengths))
    self.assertFalse(self.rate(counts * 0.5 - 0.8, lengths))

  def test_whole_words_may_leave_a_row_unfilled(self):
    lengths = np.full(100, 128)
    few = np.full(100, 16)  # of 19
    self.assertFalse(self.rate(few, lengths))
    for unit in ("whole_word", "span", "ngram"):
      self.assertTrue(self.rate(few, lengths, masking_unit=unit))
      self.assertFalse(self.rate(few / 2, lengths, masking_unit=unit))

  @parameterized.parameters(200, 20_000)
  def test_a_share_is_as_certain_as_its_count(self, count):
    draws = np.random.default_rng(1).binomial(count, 0.8, 500) / count

    def ok(share):
      found = {"mask_share": share, "selected": count}
      return health.data_checks(found)[0].ok

    self.assertGreater(np.mean([ok(share) for share in draws]), 0.99)
    spread = draws.std()
    self.assertFalse(ok(0.8 + 5 * spread))
    self.assertFalse(ok(0.8 - 5 * spread))


class CurveChecksTest(absltest.TestCase):
  def test_the_reference_is_met_up_to_the_tolerance(self):
    reference = {"step": [0, 100], "loss": [10.0, 5.0]}

    def ok(factor):
      table = {"step": [50.0], "loss": [7.5 * factor]}
      return health.curve_checks(table, reference=reference)[0].ok

    self.assertTrue(ok(1 + 0.99 * health.REFERENCE_TOLERANCE))
    self.assertFalse(ok(1 + 1.01 * health.REFERENCE_TOLERANCE))
    self.assertFalse(ok(1 - 1.01 * health.REFERENCE_TOLERANCE))


if __name__ == "__main__":
  absltest.main()
