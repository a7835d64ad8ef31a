"""Measurements are made once, and again when what they are of has changed."""

import importlib.metadata
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized

from experiments.measurements import Measurements, fingerprint

_CALLS = []


def squared(*, number):
  _CALLS.append(number)
  return {"square": number**2}


class MeasurementsTest(parameterized.TestCase):
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

  @parameterized.parameters("jax", "libtpu", "nvidia-cuda-nvcc")
  def test_another_compiler_has_another_fingerprint(self, package):
    def version(name):
      if found[name] is None:
        raise importlib.metadata.PackageNotFoundError(name)
      return found[name]

    prints = set()
    with mock.patch.object(importlib.metadata, "version", version):
      for other in ("1.0", "1.1", None):
        found = {"jax": "1.0", "libtpu": "1.0", "nvidia-cuda-nvcc": "1.0"}
        found[package] = other
        prints.add(fingerprint([__file__]))
    self.assertLen(prints, 3)


if __name__ == "__main__":
  absltest.main()
