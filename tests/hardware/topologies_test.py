"""Names of machines are read strictly."""

import importlib.util
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax.hardware import CHIPS, CompilerMissing, compile_for, parse
from tests.hardware import programs


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(
    ("v5e:4x2", "v5e", (4, 2), 1, 8),
    ("v5p:2x4x6", "v5p", (2, 4, 6), 1, 48),
    ("3xv6e:2x4", "v6e", (2, 4), 3, 24),
    ("v5e:1x1", "v5e", (1, 1), 1, 1),
    ("h100:8", "h100", (8,), 1, 8),
  )
  def test_reads_and_writes_names(self, name, chip, shape, slices, count):
    topology = parse(name)
    self.assertEqual(
      (topology.chip, topology.shape, topology.slices),
      (CHIPS[chip], shape, slices),
    )
    self.assertEqual(topology.num_devices, count)
    self.assertEqual(topology.name, name)

  @parameterized.parameters(
    ("v9:4x4", "topology='v9:4x4' is unknown.*v4, v5e, v5p, v6e, h100"),
    ("v5e-16", "write chip:shape"),
    ("v5e:16", r"v5e has 2 positive dimension\(s\)"),
    ("v4:4x4", r"v4 has 3 positive"),
    ("v5e:0x4", "positive"),
    ("v5e:3x4", "3 must be even"),
    ("2xh100:8", "write h100:16"),
  )
  def test_refuses_what_there_is_not(self, name, message):
    with self.assertRaisesRegex(ValueError, message):
      parse(name)


class CompilerTest(parameterized.TestCase):
  @parameterized.parameters(
    ("v5e:2x2", "libtpu.*bertjax\\[tpu\\]"),
    ("h100:1", "jax_cuda13_plugin.*bertjax\\[gpu-compiler\\]"),
  )
  def test_a_missing_compiler_names_the_extra(self, name, message):
    with (
      mock.patch.object(importlib.util, "find_spec", return_value=None),
      self.assertRaisesRegex(CompilerMissing, message),
    ):
      compile_for(name, programs.fail)

  def test_a_target_must_be_importable(self):
    def local(devices):
      del devices

    with (
      mock.patch.object(importlib.util, "find_spec"),
      self.assertRaisesRegex(ValueError, "local cannot be imported"),
    ):
      compile_for("v5e:2x2", local)


if __name__ == "__main__":
  absltest.main()
