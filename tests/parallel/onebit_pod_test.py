"""Compiled for TPU pods, a compressed average sends what the formula says."""

import importlib.util
import math
import unittest

import pytest
from absl.testing import absltest

from bertjax import hardware
from bertjax.parallel import wire
from tests.parallel import onebit_programs


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class PodTest(absltest.TestCase):
  def _check(self, topology, workers, length):
    program = hardware.compile_for(
      topology, onebit_programs.average, shape=(length,)
    )
    collectives = hardware.read_collectives(program.module)
    self.assertEqual({c.group_size for c in collectives}, {workers})
    sent = sum(c.sent_bytes for c in collectives)
    formula = wire.compressed_bytes(
      [(length,)], workers, onebit_programs.COMPRESSION
    )
    self.assertAlmostEqual(sent / formula, 1, delta=0.01)
    self.assertLess(sent, wire.ring_bytes([(length,)], workers) / 15)

  def test_4_devices(self):
    self._check("v5e:2x2", 4, 524_287)

  def test_a_stack_of_matrices_passes_memory_few_times(self):
    shape = 32, 1024, 16, 64  # more than fits on the chip
    program = hardware.compile_for(
      "v5e:8x8", onebit_programs.average, shape=shape
    )
    moved = hardware.price(program).hbm_bytes / (4 * math.prod(shape))
    # In any order: x and e in, e and the mean out, x + e out and in; a byte per
    # sign out and in, twice. What is left is a thirty-second or a sixteenth.
    self.assertLess(moved, 8.5)

  @pytest.mark.slow
  def test_256_devices(self):
    # BERT-large. Gathers of less than some tens of kB per device are summed
    # instead over so many devices, which sends twice as much.
    self._check("v5e:16x16", 256, 335_000_001)


if __name__ == "__main__":
  absltest.main()
