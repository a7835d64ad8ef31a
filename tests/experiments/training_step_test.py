"""What the experiment on the training step compares, and how it extends."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers import norm
from experiments.training_step import findings, step

_ON_V5E = 1.5e9, 197e12 / 1.5e9  # cycles per second, FLOP per cycle


def row(part, label, cycles, **fields):
  return {
    "part": part,
    "step": label,
    "fits": True,
    "tokens": 4096,
    "cycles": cycles,
    "model_flops": 6e12,
    "hbm_bytes": 1e9,
    "needed_bytes": 2e9,
    "compile_s": 10.0,
    **fields,
  }


class StepTest(parameterized.TestCase):
  def test_the_plain_norm_is_the_same_function(self):
    x, scale, bias, g = (
      jax.random.normal(jax.random.key(i), shape)
      for i, shape in enumerate([(3, 5, 7), (7,), (7,), (3, 5, 7)])
    )
    plain, plain_pull = jax.vjp(
      lambda *a: step.plain_layer_norm(*a, 1e-12), x, scale, bias
    )
    ours, pull = jax.vjp(lambda *a: norm.layer_norm(*a, 1e-12), x, scale, bias)
    np.testing.assert_allclose(plain, ours, atol=1e-5)  # float32
    for found, wanted in zip(plain_pull(g), pull(g)):
      np.testing.assert_allclose(found, wanted, atol=1e-4)

  @parameterized.parameters("gather labels", "hardware generator", "epilogues")
  def test_a_measure_left_out_is_another_program(self, name):
    devices = jax.devices()[:1]
    sizes = dict(variant="tiny", batch_size=2, seq_len=128)
    sizes["model"] = {"num_layers": 1}
    whole, _ = step.lower(devices, **sizes)
    found, _ = step.lower(devices, without=[name], **sizes)
    self.assertNotEqual(found.as_text(), whole.as_text())
    # What was replaced is there again.
    again, _ = step.lower(devices, **sizes)
    self.assertEqual(again.as_text(), whole.as_text())


class FindingsTest(absltest.TestCase):
  def test_unrolled_figures_are_extended_along_a_line(self):
    rows = [
      row(findings.UNROLLED, f"{n} layers unrolled", 5e6 + 3e6 * n)
      | {"compile_s": 7.0 * n, "model_flops": 1e11 + 2e11 * n}
      for n in (2, 4)
    ]
    found = findings.extended(rows, 24)
    self.assertAlmostEqual(found["cycles"], 77e6)
    self.assertAlmostEqual(found["compile_s"], 168.0)
    clock, per_cycle = _ON_V5E
    self.assertAlmostEqual(found["tokens_per_s"], 4096 / 77e6 * clock)
    want = 4.9e12 / 77e6 / per_cycle
    self.assertAlmostEqual(findings.mfu(found, rows), want, places=6)

  def test_logits_that_nobody_reads_are_not_useful_work(self):
    rows = [
      row(findings.WATERFALL, "plain", 2e8, model_flops=9e12),
      row(findings.WATERFALL, "gather labels", 1e8, model_flops=6e12),
    ]
    found = [findings.mfu(r, rows) for r in rows]
    self.assertAlmostEqual(found[0] * 2, found[1])


if __name__ == "__main__":
  absltest.main()
