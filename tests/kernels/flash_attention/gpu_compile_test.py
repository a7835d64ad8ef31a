"""The Triton kernels assembled for an H100: no register goes to memory."""

import importlib.util
import unittest

import pytest
from absl.testing import absltest, parameterized

from bertjax.hardware import compile_for
from kernels.flash_attention import programs

BERT = dict(segment_ids=True, dropout_rate=0.1, dropout_seed=0)
KEY_BIAS = dict(bias="key", causal=True)
EVERYTHING = BERT | dict(
  bias="full", causal=True, window=(99, 9), logit_softcap=9.0
)


@unittest.skipUnless(
  importlib.util.find_spec("jax_cuda13_plugin"),
  "the CUDA compiler is not installed: pip install 'bertjax[gpu-compiler]'",
)
class CompileTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("everything", "bfloat16", 64, EVERYTHING),
    ("wide", "bfloat16", 128, {}),
    ("widest_causal", "bfloat16", 256, KEY_BIAS),
    ("widest_full_precision", "float32", 192, EVERYTHING),
  )
  def test_nothing_spills(self, dtype, width, options):
    self.check(dtype, width, options)

  @parameterized.named_parameters(
    # Less than everything, in the same tiles.
    ("bert", "bfloat16", 64, BERT),
    # Less than "widest_causal", in the same tiles.
    ("widest", "float16", 256, {}),
    # Less than its widest, which has everything.
    ("full_precision", "float32", 128, KEY_BIAS),
  )
  @pytest.mark.slow
  def test_nothing_with_fewer_terms_spills(self, dtype, width, options):
    self.check(dtype, width, options)

  def check(self, dtype, width, options):
    program = compile_for(
      "h100:1",
      programs.lower,
      dtype=dtype,
      name="ours_gpu",
      sizes=(2, 4, 500, width),  # ends inside a tile
      options=options,
    )
    kernels = {
      k.name: k for k in program.kernels if k.name.startswith("flash_attention")
    }
    want = {"forward", "dkv", "dq"} | (
      {"dbias"} if "bias" in options else set()
    )
    self.assertEqual(set(kernels), {f"flash_attention_{k}" for k in want})
    for kernel in kernels.values():
      self.assertEqual((kernel.spill_stores, kernel.spill_loads), (0, 0))
      # float32 is multiplied as float32, which tensor cores do not do.
      self.assertEqual(kernel.tensor_cores, dtype != "float32")
      self.assertLessEqual(kernel.shared_memory, 227 * 1024)


if __name__ == "__main__":
  absltest.main()
