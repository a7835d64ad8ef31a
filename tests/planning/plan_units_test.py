"""Figures of a page have three digits, a unit that fits, and no exponent."""

from absl.testing import absltest, parameterized

from bertjax.planning import units


class UnitsTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, "0"),
    (0.0123456, "0.0123"),
    (9.996, "10.0"),
    (99.96, "100"),
    (12_345.6, "12,300"),
  )
  def test_digits(self, value, text):
    self.assertEqual(units.digits(value), text)

  @parameterized.parameters(
    (1.234e-5, "12.3 us"),
    (9.996e-4, "1.00 ms"),
    (0.99961, "1.00 s"),
    (0.9994, "999 ms"),
    (75, "75.0 s"),
  )
  def test_duration(self, seconds, text):
    self.assertEqual(units.duration(seconds), text)

  @parameterized.parameters(
    (3, "3.00 seconds"),
    (0.2, "200 ms"),
    (119, "119 seconds"),
    (3_600, "60.0 minutes"),
    (9_000, "2.50 hours"),
    (8_640_000, "100 days"),
  )
  def test_span(self, seconds, text):
    self.assertEqual(units.span(seconds), text)

  @parameterized.parameters(
    (512, "512 B"),
    (1_536, "1.50 KiB"),
    (12e9, "11.18 GiB"),
    (2**40, "1.00 TiB"),
  )
  def test_size(self, count, text):
    self.assertEqual(units.size(count), text)

  def test_one_is_no_plural(self):
    self.assertEqual(units.plural(1, "chip"), "1 chip")
    self.assertEqual(units.plural(1_024, "chip"), "1,024 chips")


if __name__ == "__main__":
  absltest.main()
