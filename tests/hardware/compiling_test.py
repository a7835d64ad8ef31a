"""What a compiler says instead of a result is told in one line."""

import pickle
import subprocess
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from bertjax.hardware import (
  CompilerEnded,
  OutOfMemory,
  compile_for,
  compiling,
  topologies,
)
from tests.hardware import programs


class FailureTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.object(topologies, "require_compiler"))

  def failing(self, error):
    """Compiles in a process that ends with the error."""

    def run(folder, environment, timeout_s):
      del environment, timeout_s
      result = pickle.dumps((error, "info"))
      (folder / compiling.RESULT).write_bytes(result)

    with mock.patch.object(compiling, "_run_worker", run):
      compile_for("v5e:2x2", programs.copy, rows=8)

  @parameterized.parameters(
    (
      "E1000: CompileTimeHbmOom:\nXLA:TPU compile permanent error. Ran out of"
      " memory in memory space hbm. Used 20.00G of 15.75G hbm.",
      20,
    ),
    (
      "Ran out of memory on HBM, the total memory required for HLO temporaries"
      " (64.00G) exceeds available HBM (15.75G).",
      64,
    ),
    ("Allocation (size=9) would exceed memory (size=8), space=hbm", None),
  )
  def test_too_little_hbm_is_out_of_memory(self, message, needed):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}\nmore")
    with self.assertRaises(OutOfMemory) as raised:
      self.failing(error)
    self.assertEqual(raised.exception.needed, needed and needed * 2**30)
    self.assertEqual(raised.exception.info, "info")
    self.assertNotIn("\n", str(raised.exception))

  @parameterized.parameters(
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in"
    " memory space vmem while allocating on stack. Scoped allocation with size"
    " 32.00M and limit 16.00M exceeded scoped vmem limit by 16.00M.",
    "RESOURCE_EXHAUSTED: Allocation (size=9) would exceed memory, space=vmem",
    "INTERNAL: Mosaic failed to compile TPU kernel: a bug",
  )
  def test_all_else_is_told_as_the_compiler_does(self, words):
    with self.assertRaises(CompilerEnded) as raised:
      self.failing(jax.errors.JaxRuntimeError(f"{words}\n\nin space hbm: 9M"))
    line = words.replace("\n", " ")
    self.assertEqual(str(raised.exception), f"The compiler failed: {line}")

  def test_an_error_of_the_target_stays_what_it_is(self):
    with self.assertRaisesRegex(KeyError, "RESOURCE_EXHAUSTED: hbm"):
      self.failing(KeyError("RESOURCE_EXHAUSTED: hbm"))

  def test_a_compiler_that_is_too_slow_is_told_what_helps(self):
    late = subprocess.TimeoutExpired("python", 7)
    with (
      mock.patch.object(subprocess, "run", side_effect=late),
      self.assertRaisesRegex(
        CompilerEnded, r"longer than timeout_s=7; compile a smaller program"
      ),
    ):
      compile_for("v5e:2x2", programs.copy, timeout_s=7, rows=8)


if __name__ == "__main__":
  absltest.main()
