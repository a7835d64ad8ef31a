"""A plan says what a step occupies, moves and takes, without any data."""

import importlib.util
import json
import pathlib
import re
import unittest

import pytest
from absl.testing import absltest

from bertjax.config import settings
from bertjax.parallel import wire
from bertjax.plan import plan
from bertjax.planning import links, page
from tests import tiny


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class CompiledPlanTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    fields = tiny.config(
      pathlib.Path("nowhere"),
      model=dict(
        num_layers=2,
        attend="flash",
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
      ),
      mesh=dict(data=2, fsdp=2),
      prng="rbg",
    )
    cls.plan = plan(settings(fields), "v5e:2x2", steps=3_600)

  def test_memory_is_that_of_the_sharded_state(self):
    facts, memory = self.plan.facts, self.plan.memory
    self.assertTrue(self.plan.fits)
    self.assertBetween(
      facts.parameter_bytes, facts.parameters * 2, facts.parameters * 4
    )
    held = facts.parameter_bytes + facts.optimizer_bytes + facts.batch_bytes
    # Tiles of 8 x 128 pad small arrays.
    self.assertGreaterEqual(memory.arguments, held)

  def test_gradients_are_reduced_over_both_batch_axes(self):
    axes = {c.axes(self.plan.facts.mesh) for c in self.plan.collectives}
    self.assertContainsSubset({("data", "fsdp")}, axes)
    self.assertGreater(self.plan.exchange_s, 0)

  def test_stacks_of_gradients_are_not_zeroed_before_they_are_written(self):
    of_encoder = re.compile(r"transpose\(.*\)/encoder/(\S*)$")
    found = {
      match[1]
      for row in self.plan.cost.rows
      if (match := of_encoder.search(row.op_name))
    }
    self.assertGreater(len(found), 10)
    self.assertNotIn("broadcast_in_dim", found)

  def test_rates_follow_from_the_step_time(self):
    tokens = 8 * 32
    seconds = self.plan.step_s
    self.assertAlmostEqual(
      self.plan.tokens_per_s_per_chip, tokens / seconds / 4
    )
    self.assertAlmostEqual(self.plan.chip_hours, seconds * 4)
    self.assertGreater(self.plan.compute_s, self.plan.exchange_s)
    self.assertEqual(seconds, self.plan.compute_s)
    peak = 4 * 197e12 * seconds
    self.assertAlmostEqual(self.plan.mfu, self.plan.facts.model_flops / peak)

  def test_page_and_figures(self):
    text = page.render(self.plan, "phase1")
    for part in (
      "phase1 on v5e:2x2: 4 chips, mesh data 2 x fsdp 2",
      "batch 8 x 32 tokens, ",
      "FITS",
      "all-reduce",
      "tokens/s per chip",
      "whole run    3,600 steps in ",
      "chip-hours",
      "bertjax/layers/",
      "latency of transfers",
      "predicated regions as taken",
    ):
      self.assertIn(part, text)
    figures = json.loads(json.dumps(page.figures(self.plan)))
    self.assertLen(figures["top"], 10)
    # What the matrix units do is the model's arithmetic, and padding.
    flops = 4 * figures["mxu_flops"]
    self.assertGreater(flops, figures["step"]["model_flops"])
    self.assertEqual(figures["step_s"], self.plan.step_s)
    self.assertEmpty(figures["missing"])

  def test_what_does_not_divide_is_refused(self):
    fields = tiny.config(pathlib.Path("nowhere"), mesh=dict(model=3))
    with self.assertRaisesRegex(ValueError, "does not divide 4 devices"):
      plan(settings(fields), "v5e:2x2")
    fields = tiny.config(pathlib.Path("nowhere"))
    with self.assertRaisesRegex(ValueError, "use a batch size .* of 16"):
      plan(settings(fields), "v5e:4x4")

  def test_float16_is_no_type_of_a_tpu(self):
    fields = tiny.config(pathlib.Path("nowhere"), dtype="float16")
    with self.assertRaisesRegex(ValueError, "use dtype='bfloat16'"):
      plan(settings(fields), "v5e:2x2")


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
@pytest.mark.slow  # hlo_test reads such programs
class SlicesTest(absltest.TestCase):
  def test_gradients_cross_slices_after_they_were_reduced_inside(self):
    # So wide that the padding of tiles hardly counts.
    model = dict(num_layers=1, emb_dim=128, mlp_dim=512)
    fields = tiny.config(pathlib.Path("nowhere"), model=model)
    made = plan(settings(fields), "2xv5e:2x2")
    inside = {
      links.axes(c, made.topology, made.facts.mesh)
      for c in made.collectives
      if c.slices == 1
    }
    self.assertEqual(inside, {("data",)})
    gradients = made.facts.parameters * 4
    sent = sum(c.sent_bytes for c in made.collectives if c.slices == 1)
    # Of 4 chips: a reduce-scatter and an all-gather of the gradients at least,
    # two all-reduces at most.
    self.assertBetween(sent, 0.95 * 3 / 2 * gradients, 3 * gradients)
    across = [c for c in made.collectives if c.slices > 1]
    self.assertEqual({c.group_size for c in across}, {2})
    # Each chip exchanges a quarter of the gradients with its peer.
    sent = sum(c.sent_bytes for c in across)
    self.assertBetween(sent, 0.95 * gradients / 4, 2 * gradients / 4)
    self.assertGreater(made.exchange_s, sent / 3.125e9)
    self.assertRegex(page.render(made), r"all-reduce +slice ")


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
@pytest.mark.slow  # sharded_test lowers such kernels, LinksTest has the rest
class CompressedTest(absltest.TestCase):
  def test_kernels_compile_inside_the_workers(self):
    fields = tiny.config(
      pathlib.Path("nowhere"),
      model=dict(num_layers=1, attend="flash"),
      optim=dict(name="onebit_adam", learning_rate=1e-3, freeze_step=2),
    )
    made = plan(settings(fields), "v5e:2x2")

    def sends(kind):
      return sum(c.sent_bytes for c in kind.collectives)

    # A step whose gradients are not finite exchanges nothing else.
    skipped, compressed, full = sorted(made.kinds, key=sends)
    self.assertEqual({c.branch for c in skipped.collectives}, {()})
    gradients = made.facts.parameters * 4
    sent = [sends(full), sends(compressed)]
    self.assertGreaterEqual(sent[0], 1.5 * gradients)
    # Whole lines of bits, of which these few parameters fill a part.
    shapes = [(made.facts.parameters,)]
    self.assertAlmostEqual(
      sent[1], wire.compressed_bytes(shapes, 4), delta=0.2 * sent[1]
    )
    self.assertEqual(made.exchange_s, made.kinds[0].exchange_s)
    # Both take gradients; neither does what only the other does.
    both = full.compute_s + compressed.compute_s
    self.assertGreater(both, made.cost.seconds)
    self.assertLess(
      max(full.compute_s, compressed.compute_s), made.cost.seconds
    )
    self.assertRegex(page.render(made), "other steps  .*: compute ")


if __name__ == "__main__":
  absltest.main()
