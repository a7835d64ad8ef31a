"""What NVIDIA's assembler says of a kernel is read right."""

import importlib.util
import unittest

from absl.testing import absltest

from bertjax.hardware import OutOfMemory, compile_for, gpu, price
from tests.hardware import programs

_REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mha_forward' for 'sm_90a'
ptxas info    : Function properties for mha_forward
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 24 bytes cumulative stack size, 768 bytes smem
ptxas info    : Compiling entry function 'softmax' for 'sm_90a'
ptxas info    : Function properties for softmax
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""  # noqa: E501
_SEQUENCE = (
  "001: kCustomKernel [source | sink] mha_forward grid: [4, 8, 3]"
  " threads: [128, 1, 1]  shared_memory: 81920 bytes\n"
)


class ReportTest(absltest.TestCase):
  def test_every_kernel_has_its_own_figures(self):
    forward, softmax = gpu.parse_report(_REPORT, tensor_cores=True)
    self.assertEqual(
      (forward.name, forward.registers, forward.shared_memory),
      ("mha_forward", 168, 768),
    )
    self.assertEqual(
      (forward.stack, forward.spill_stores, forward.spill_loads), (24, 16, 8)
    )
    self.assertEqual((softmax.name, softmax.registers), ("softmax", 32))
    self.assertEqual(softmax.spill_stores, 0)

  def test_launches_are_found_by_name(self):
    self.assertEqual(
      gpu.parse_launches(_SEQUENCE),
      {"mha_forward": gpu.Launch(grid=96, threads=128, shared_memory=81920)},
    )


@unittest.skipUnless(
  importlib.util.find_spec("jax_cuda13_plugin"),
  "the CUDA compiler is not installed: pip install 'bertjax[gpu-compiler]'",
)
class CompileTest(absltest.TestCase):
  def test_a_fused_kernel_is_assembled(self):
    program = compile_for("h100:1", programs.softmax)
    (kernel,) = program.kernels
    self.assertIn("softmax", kernel.name)
    self.assertBetween(kernel.registers, 1, 255)
    self.assertEqual(kernel.spill_stores, 0)
    self.assertGreater(kernel.grid * kernel.threads, 0)
    self.assertEqual(program.memory.arguments, 1024 * 1024 * 4)
    with self.assertRaisesRegex(ValueError, "only TPU programs"):
      price(program)

  def test_what_no_gpu_has_room_for_is_refused(self):
    with self.assertRaisesRegex(
      OutOfMemory, "needs 128.00 GiB of HBM per device; 79.11 GiB are available"
    ):
      compile_for("h100:1", programs.copy, rows=2**24)


if __name__ == "__main__":
  absltest.main()
