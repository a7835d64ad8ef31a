"""The kernels compile for every TPU at every pair of BERT's choices."""

import importlib.util
import itertools
import unittest

import pytest
from absl.testing import absltest, parameterized

from bertjax.hardware import CHIPS
from kernels import battery

_ROWS = battery.covering(battery.CHOICES)


class CoveringTest(absltest.TestCase):
  def test_every_allowed_pair_occurs(self):
    for (a, xs), (b, ys) in itertools.combinations(battery.CHOICES.items(), 2):
      for x, y in itertools.product(xs, ys):
        if battery.allowed(battery.SMALL | {a: x, b: y}):
          self.assertTrue(
            any(row[a] == x and row[b] == y for row in _ROWS), (a, x, b, y)
          )
    self.assertTrue(all(map(battery.allowed, _ROWS)))
    self.assertLess(len(_ROWS), 100)

  def test_every_tile_of_the_full_grid_has_a_reason(self):
    choices = dict(battery.CHOICES, chip=("v4",))
    reasons = set()
    for values in itertools.product(*choices.values()):
      row = dict(zip(choices, values))
      if battery.allowed(row):
        for _, chosen, why in battery.tiles_of(row):
          reasons.add(why)
          self.assertEqual(row["heads"] % chosen.heads, 0)
          self.assertLessEqual(
            chosen.heads * chosen.t * chosen.s, battery.tiles.STEP_SCORES
          )
    self.assertLen(reasons, 5)


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class BatteryTest(parameterized.TestCase):
  # A v4 has the least VMEM; `tpu_kernels_test` compiles one for each chip.
  @parameterized.named_parameters(
    ("largest", dict(length=8192, window=None)),
    ("many_heads_beside_their_sums", dict(length=4096, window=(64, 64))),
  )
  def test_the_tightest_shapes_compile(self, row):
    self._assert_compiles(row)

  @pytest.mark.slow
  def test_the_tightest_shape_compiles_with_its_table_of_visits(self):
    self._assert_compiles(dict(length=8192, window="causal"))

  def _assert_compiles(self, row):
    row = row | dict(
      chip="v4",
      heads=16,
      width=128,
      bias="key",
      relative="bias",
      dropout="hardware",
      segment_ids=True,
    )
    found = battery.compiled(row)
    self.assertEqual(found["kernels"], 3)  # one for the bias' gradient
    self.assertLess(found["vmem_bytes"], CHIPS["v4"].vmem_bytes)


@pytest.mark.slow  # on the class: parameters would hide it on the method
@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class EveryRowTest(parameterized.TestCase):
  @parameterized.parameters(*enumerate(_ROWS))
  def test_row_compiles(self, _, row):
    found = battery.compiled(row)
    limit = CHIPS[row["chip"]].vmem_bytes
    self.assertLess(found["vmem_bytes"], limit)


if __name__ == "__main__":
  absltest.main()
