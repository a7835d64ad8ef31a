"""Programs of known cost, compiled for TPUs, cost what they should."""

import contextlib
import importlib.util
import io
import os
import signal
import unittest
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from bertjax import cli
from bertjax.hardware import (
  CompilerEnded,
  OutOfMemory,
  compile_for,
  parse,
  price,
  read_collectives,
)
from tests.hardware import programs

_needs_libtpu = unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)


@_needs_libtpu
class ClosedFormTest(parameterized.TestCase):
  def test_matmul_chain_runs_near_the_peak(self):
    size, count = 2048, 2
    program = compile_for(
      "v5e:2x2", programs.matmul_chain, size=size, count=count
    )
    floor = count * 2 * size**3 / program.topology.chip.peak_flops
    # Below the floor would be impossible, above it is the pipeline's filling.
    self.assertBetween(price(program).seconds, floor, 1.1 * floor)

  @parameterized.parameters("v4:2x2x1", "v5p:2x2x1", "v6e:2x2")
  def test_matrix_units_are_busy_for_the_flops(self, name):
    size = 1024
    program = compile_for(name, programs.matmul_chain, size=size, count=1)
    flops = price(program).mxu_cycles * parse(name).chip.flops_per_cycle
    # 1 %: clocks and peaks are rounded, and tiles padded.
    self.assertAlmostEqual(flops / (2 * size**3), 1, delta=0.01)

  def test_copy_runs_at_the_bandwidth_of_hbm(self):
    rows = 16_384
    program = compile_for("v5e:2x2", programs.copy, rows=rows)
    floor = 2 * rows * 4096 / program.topology.chip.hbm_bandwidth
    self.assertBetween(price(program).seconds, floor * 0.999, 1.1 * floor)

  # Of a size at which memory is far from the bound. A v6e's is left out: with
  # this very chain its schedule needs 17 to 27 % more than its matrix units.
  @parameterized.parameters(("v4:2x2x1", 8192), ("v5p:2x2x1", 4096))
  @pytest.mark.slow
  def test_other_chips_run_a_matmul_chain_near_the_peak(self, name, size):
    program = compile_for(name, programs.matmul_chain, size=size, count=2)
    floor = 2 * 2 * size**3 / program.topology.chip.peak_flops
    self.assertBetween(price(program).seconds, floor, 1.1 * floor)

  @parameterized.parameters("v4:2x2x1", "v5p:2x2x1", "v6e:2x2")
  @pytest.mark.slow
  def test_other_chips_copy_at_the_bandwidth_of_hbm(self, name):
    rows = 16_384
    program = compile_for(name, programs.copy, rows=rows)
    floor = 2 * rows * 4096 / program.topology.chip.hbm_bandwidth
    self.assertBetween(price(program).seconds, floor * 0.999, 1.1 * floor)

  @pytest.mark.slow
  def test_patches_of_a_published_batch_compile(self):
    """Joined features of a set and its members stopped the compiler here."""
    program = compile_for("v5e:2x2", programs.patches, rows=32)
    points = 3 * 128 + 128 * 256 + 256 * 512 + 512 * 256
    flops = 2 * 32 * 64 * (32 * points + 256 * 512)
    floor = flops / program.topology.chip.flops_per_cycle
    self.assertGreater(price(program).cycles, 0.9 * floor)

  def test_a_loop_costs_its_trips(self):
    short, long = (
      price(compile_for("v5e:1x1", programs.loop, trips=trips))
      for trips in (7, 21)
    )
    self.assertEqual({row.times for row in long.rows}, {21})
    self.assertEqual(long.cycles, 3 * short.cycles)
    self.assertEmpty(long.missing)

  def test_scanned_layers_are_all_counted(self):
    count = 5
    cost = price(compile_for("v5e:2x2", programs.layers, count=count))
    product = 2 * 1024 * 512 * 512 / cost.chip.flops_per_cycle
    # Forward, input gradient and weight gradient, in a loop each way.
    products = [row for row in cost.rows if row.mxu_cycles > 0.9 * product]
    self.assertEqual([row.times for row in products], [count] * 3)
    self.assertGreater(sum(row.estimate for row in products), 0.9 * cost.cycles)
    # Where the layer is written.
    self.assertRegex(cost.top(1)[0].source, r"tests/hardware/programs\.py:\d+$")


@_needs_libtpu
class CollectivesTest(absltest.TestCase):
  def test_bytes_axes_and_times(self):
    program = compile_for("v5e:4x4", programs.exchange)
    size = 256 * 384 * 4
    mesh = program.info  # the target's second result
    found = {
      (c.kind, c.axes(mesh)): (c.operand_bytes, c.times, c.sent_bytes)
      for c in read_collectives(program.module)
    }
    # The ring formula of each: the share of its operand that a chip sends.
    self.assertEqual(
      found,
      {
        ("all-reduce", ("fsdp", "model")): (size, 1, size * 2 * 3 / 4),
        ("all-reduce", ("model",)): (size, 3, 3 * size * 2 * 1 / 2),
        ("collective-permute", ("data",)): (size, 1, size),
        ("reduce-scatter", ("fsdp",)): (size, 1, size / 2),
        ("all-gather", ("data",)): (size, 1, size * 3),
      },
    )


@_needs_libtpu
class OptimizationTest(absltest.TestCase):
  def test_a_caller_that_spares_its_own_compiler_plans_the_optimized_program(
    self,
  ):
    with mock.patch.dict(os.environ, JAX_DISABLE_MOST_OPTIMIZATIONS="1"):
      self.assertFalse(compile_for("v5e:1x1", programs.spared).info)


@_needs_libtpu
class ErrorsTest(parameterized.TestCase):
  def test_out_of_memory_says_how_much(self):
    with self.assertRaisesRegex(
      OutOfMemory, "needs 64.00 GiB of HBM"
    ) as raised:
      compile_for("v5e:2x2", programs.too_large)
    self.assertEqual(raised.exception.needed, 64 * 2**30)
    self.assertLess(raised.exception.available, 16 * 2**30)

  def test_a_kernel_that_the_compiler_refuses_is_told_in_one_line(self):
    with self.assertRaisesRegex(
      CompilerEnded, r"failed: INTERNAL: .*Mosaic failed .* shape cast\Z"
    ):
      compile_for("v5e:1x1", programs.refused)

  def test_an_error_of_the_target_arrives(self):
    with self.assertRaisesRegex(ValueError, "seen on 4 devices") as raised:
      compile_for("v5e:2x2", programs.fail)
    self.assertIn("programs.py", raised.exception.__notes__[0])

  @parameterized.parameters(
    ("some\nlast words", None, "ended with code 3: last words"),
    (
      "F1128 17:59:27.4 1 util.cc:497] Check failed: x == y\n  @ main()",
      signal.SIGABRT,
      "ended with signal SIGABRT: F1128 .*Check failed: x == y",
    ),
    ("", signal.SIGKILL, "was killed.*too little memory"),
  )
  def test_a_dead_compiler_says_why_in_one_line(self, words, number, message):
    with self.assertRaisesRegex(CompilerEnded, message) as raised:
      compile_for("v5e:2x2", programs.die, words=words, signal=number)
    self.assertNotIn("\n", str(raised.exception))
    with (
      self.assertRaises(SystemExit),
      contextlib.redirect_stderr(io.StringIO()) as said,
      cli.clear_errors(),
    ):
      raise raised.exception
    self.assertStartsWith(said.getvalue(), "Error: The compiler")


if __name__ == "__main__":
  absltest.main()
