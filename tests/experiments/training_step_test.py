"""What the experiment on the training step compares."""

import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers import norm
from experiments.training_step import findings, step


def row(part, label, cycles, **fields):
  return {
    "part": part,
    "step": label,
    "variant": "large",
    "seq_len": 512,
    "fits": True,
    "tokens": 4096,
    "cycles": cycles,
    "plain_cycles": 0.99 * cycles,
    "tokens_per_s": 4096 / cycles * 1.5e9,
    "model_flops": 6e12,
    "hbm_bytes": 1e9,
    "needed_bytes": 2e9,
    "compile_s": 10.0,
    "seconds": 11.0,
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

  @classmethod
  @functools.cache
  def text(cls, *without):
    devices = jax.devices()[:1]
    sizes = dict(variant="tiny", batch_size=2, seq_len=128)
    model = {"num_layers": 1}
    lowered, _ = step.lower(devices, without=without, model=model, **sizes)
    return lowered.as_text()

  @parameterized.parameters("unrolled", "hardware generator", "epilogues")
  def test_a_measure_left_out_is_another_program(self, name):
    self.assertNotEqual(self.text(name), self.text())

  def test_what_was_replaced_is_there_again(self):
    def replaced():
      for measure in step.MEASURES.values():
        for module, name, _ in measure.replaced:
          yield getattr(module, name)
        for table, _ in measure.entries:
          yield from table.values()

    before = list(replaced())
    self.text("epilogues", "no zeros")
    self.assertEqual(list(replaced()), before)


class FindingsTest(absltest.TestCase):
  def test_verdicts_follow_from_the_rows(self):
    rows = [
      dict(
        part=findings.WATERFALL,
        step="plain",
        fits=False,
        needed_bytes=20 * 2**30,
        seconds=1.0,
      ),
      row(findings.WATERFALL, "one", 3e8),
      row(findings.WATERFALL, "two", 1.5e8),
      row(findings.WATERFALL, "three", 1e8),
      row(findings.LOOPS, "scan", 1.2e8),
      row(findings.SHAPES, "large", 1e8),  # 61,440 tokens/s, 46 % of the peak
      row(findings.SHAPES, "base", 1e8, variant="base", model_flops=9e12),
      row(findings.SHAPES, "short", 1e8, seq_len=128),
      dict(part=findings.FILL, step="packed", filled=0.99, seconds=1.0),
    ]
    found = findings.outcome(rows)
    faster, goal, larger, others, units, packing = found.claims
    self.assertEqual(faster.verdict, "reproduced")
    self.assertEqual(faster.measured, "two 2.00x, three 1.50x; together 3.00x")
    self.assertEqual(goal.verdict, "partly")  # "two", in a loop: 40,960
    self.assertEqual(goal.measured, "two: 40,960; scan: 51,200; three: 61,440")
    self.assertEqual(larger.verdict, "not")
    self.assertEqual(larger.measured, "large: 61,440 (46% MFU)")
    self.assertEqual(others.verdict, "partly")
    self.assertStartsWith(others.measured, "base: 61,440 (69% MFU); short:")
    self.assertEqual(units.verdict, "reproduced")
    self.assertEqual(
      units.measured, "without that it has 1.0% to 1.0% fewer cycles"
    )
    self.assertIn("60,826 tokens/s", packing.measured)
    self.assertEqual(found.summary[0]["GiB"], "20.00 (does not fit)")
    self.assertEqual(
      [line["step"] for line in found.summary[1:3]], ["+ one", "+ two"]
    )
    slower = [*rows[:2], row(findings.WATERFALL, "two", 4e8), *rows[3:]]
    self.assertEqual(findings.outcome(slower).claims[0].verdict, "partly")
    leaning = [*rows, row(findings.LOOPS, "scan", 1e8, plain_cycles=9e7)]
    self.assertEqual(findings.outcome(leaning).claims[4].verdict, "partly")

  def test_mfu_is_a_share_of_the_peak(self):
    made = row(findings.LOOPS, "scan", 77e6, model_flops=4.9e12)
    peak = 197e12 * 77e6 / 1.5e9  # of a v5e in as many cycles
    self.assertAlmostEqual(findings.mfu(made, [made]), 4.9e12 / peak)

  def test_logits_that_nobody_reads_are_not_useful_work(self):
    rows = [
      row(findings.WATERFALL, "plain", 2e8, model_flops=9e12),
      row(findings.WATERFALL, "gather labels", 1e8, model_flops=6e12),
    ]
    found = [findings.mfu(r, rows) for r in rows]
    self.assertAlmostEqual(found[0] * 2, found[1])


if __name__ == "__main__":
  absltest.main()
