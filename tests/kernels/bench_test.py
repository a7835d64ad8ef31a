"""The bench chooses the best tiles, compares, and keeps what it measured."""

import csv
import pathlib
from unittest import mock

from absl.testing import absltest

from kernels import bench

_SIZES = bench.SHAPES[-1]
_COST = dict(kernel_cycles=1, mxu_cycles=1, hbm_bytes=10, temporary_bytes=0)


def cost(*, chip, name, sizes, tiles, options):
  """Larger first sides are faster; on a v4 the fastest does not compile."""
  if chip == "v4" and tiles == (1024, 1024, 1):
    return {"failed": "vmem"}
  cycles = 100 if tiles is None else 10_000 // tiles[0] * 100
  more = 50 if options else 0
  return {"cycles": cycles + more, "vmem_bytes": 2**20, **_COST}


def kernels(*, name, sizes, dtype, options):
  row = dict(kernel="k", registers=9, spill_bytes=0, shared_bytes=1)
  return {"kernels": [row]}


class BenchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir())
    for name, fake in (("tpu_cost", cost), ("gpu_kernels", kernels)):
      patch = mock.patch.object(bench, name, autospec=True, side_effect=fake)
      made = self.enter_context(patch)
      made.__module__, made.__qualname__ = "kernels.bench", name
      setattr(self, name, made)

  def test_what_our_kernels_refuse_is_a_line_that_says_so(self):
    row = dict(chip="v5e", shape="1 2 3 4", implementation="ours")
    (line,) = bench.compared([row | dict(options="both", failed="too long")])
    self.assertEqual(line["options"], "both")
    self.assertEqual(line["ours: cycles"], "too long")

  def test_tiles_are_searched_on_one_chip(self):
    made = bench.Bench(self.folder)
    tiles, found = bench.best(made, None, "v6e", "stock_flash", _SIZES)
    self.assertEqual((tiles[0], found["cycles"]), (1024, 900))
    asked = [call.kwargs["chip"] for call in self.tpu_cost.call_args_list]
    self.assertEqual(asked.count("v6e"), 1)
    tiles, _ = bench.best(made, None, "v4", "stock_flash", _SIZES)
    self.assertEqual(tiles, (1024, 512, 1))  # the next best that compiles

  def test_tables_and_second_run(self):
    bench.run(self.folder / "work", self.folder / "out", "quick")
    text = (self.folder / "out" / "kernels.md").read_text()
    # The quick search tries one tile: 128 or 512 queries.
    self.assertIn("7,800 (78.00x)", text)
    self.assertIn("1,900 (19.00x)", text)
    self.assertIn(
      "| h100 | 8 16 512 64 | ours_gpu | bfloat16 | none | k |", text
    )
    with (self.folder / "out" / "kernels.csv").open() as file:
      rows = list(csv.DictReader(file))
    options = {r["options"] for r in rows if r["implementation"] == "ours"}
    self.assertEqual(options, {"none", "segment ids", *bench.OURS_MORE})
    self.assertTrue((self.folder / "out" / "kernels.png").exists())
    asked = self.tpu_cost.call_count, self.gpu_kernels.call_count
    bench.run(self.folder / "work", self.folder / "out", "quick")
    self.assertEqual(
      (self.tpu_cost.call_count, self.gpu_kernels.call_count), asked
    )

  def test_an_unknown_variant_is_refused(self):
    with self.assertRaisesRegex(ValueError, "variant='huge'.*full, quick"):
      bench.run(self.folder, self.folder, "huge")


if __name__ == "__main__":
  absltest.main()
