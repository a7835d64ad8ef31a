"""Measurements are made once, and again when what they are of has changed."""

import pathlib

from absl.testing import absltest

from experiments.measurements import Measurements, fingerprint

_CALLS = []


def squared(*, number):
  _CALLS.append(number)
  return {"square": number**2}


class MeasurementsTest(absltest.TestCase):
  def test_are_made_once_per_arguments_and_version(self):
    folder = self.create_tempdir().full_path
    _CALLS.clear()
    first = Measurements(folder, "a").get(squared, number=3)
    again = Measurements(folder, "a").get(squared, number=3)
    self.assertEqual(first, again)
    self.assertEqual(first["square"], 9)
    self.assertGreaterEqual(first["seconds"], 0)
    self.assertEqual(_CALLS, [3])
    Measurements(folder, "a").get(squared, number=4)
    Measurements(folder, "b").get(squared, number=3)
    self.assertEqual(_CALLS, [3, 4, 3])

  def test_the_fingerprint_is_that_of_the_sources(self):
    folder = pathlib.Path(self.create_tempdir())
    (folder / "a.py").write_text("x = 1\n")
    (folder / "notes.txt").write_text("1\n")
    before = fingerprint([folder])
    (folder / "notes.txt").write_text("2\n")
    self.assertEqual(fingerprint([folder]), before)
    self.assertEqual(fingerprint([folder / "a.py"]), before)
    (folder / "a.py").write_text("x = 2\n")
    self.assertNotEqual(fingerprint([folder]), before)


if __name__ == "__main__":
  absltest.main()
