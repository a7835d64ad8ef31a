"""A page says all that a plan knows, in the units of a reader."""

import dataclasses

from absl.testing import absltest

from bertjax import hardware
from bertjax.planning import page
from bertjax.planning.outcome import Plan
from bertjax.planning.step import StepFacts

_GIB = 2**30
_FACTS = StepFacts(
  mesh=dict(data=8, fsdp=1, model=1, seq=1),
  batch_size=64,
  seq_len=1024,
  vocab_size=50,
  parameters=250_000_000,
  parameter_bytes=_GIB,
  optimizer_bytes=2 * _GIB,
  batch_bytes=512,
  model_flops=8 * 98.9e12,  # of 8 H100s a tenth of a second
  dtype="bfloat16",
  microbatches=4,
)
_ROW = hardware.Row(
  name="fusion.7",
  opcode="fusion",
  times=3,
  cycles=100,
  mxu_cycles=1_000,
  hbm_bytes=2**20,
  vmem_bytes=0,
  estimate=3e6,
  op_name="jit(step)/jvp(MaskedLM)/encoder/while/body/query/dot_general",
  source="/elsewhere/attention.py:12",
)


def _plan(topology, **fields):
  topology = hardware.parse(topology)
  facts = dataclasses.replace(
    _FACTS, mesh=_FACTS.mesh | dict(data=topology.num_devices)
  )
  memory = hardware.Memory(3 * _GIB, 0, 0, 6 * _GIB, 2**20)
  made = Plan(
    topology,
    facts,
    steps=100,
    needed_bytes=memory.total,
    memory=memory,
    activation_bytes=5 * _GIB,
  )
  return dataclasses.replace(made, **fields)


def _cost(topology, **fields):
  chip = hardware.parse(topology).chip
  return hardware.Cost(chip, [dataclasses.replace(_ROW, **fields)])


class PageTest(absltest.TestCase):
  def test_a_page_of_one_chip(self):
    made = _plan("v5e:1x1", cost=_cost("v5e:1x1"))
    lines = page.render(made).splitlines()
    self.assertEqual(lines[0], "plan on v5e:1x1: 1 chip")
    self.assertEqual(
      lines[1],
      "batch 64 x 1,024 tokens in 4 microbatches, 250,000,000 parameters,"
      " bfloat16",
    )
    self.assertIn("FITS: 9.00 GiB of 16.00 GiB per device", lines)
    self.assertIn(
      "  activations  5.00 GiB  (kept for the backward pass)", lines
    )
    self.assertIn("  temporaries  1.00 GiB  (gradients and all else)", lines)
    self.assertIn("collectives: none", lines)
    self.assertNotIn("75%", page.render(made))
    # 3 million cycles of 1.5 GHz, of which the matrix units work 3,000.
    self.assertIn("compute      2.00 ms a chip", lines)
    self.assertIn("  arithmetic 3.94e+08 FLOP, matrix units busy 0%", lines)
    self.assertIn("  HBM        3.00 MiB, at full bandwidth 3.84 us", lines)
    self.assertIn("speed        32,768,000 tokens/s per chip", lines)
    self.assertIn(
      "whole run    100 steps in 200 ms, 0.0000556 chip-hours", lines
    )
    (row,) = (line for line in lines if "dot_general" in line)
    self.assertRegex(
      row, r"^100\.0% +3 +1,000 +1\.00 MiB +\S*query/dot_general +/elsewhere/"
    )

  def test_several_chips_have_a_mesh_and_a_sum(self):
    made = _plan("v5e:2x4", cost=_cost("v5e:2x4"), steps=0)
    text = page.render(made, "phase1")
    self.assertStartsWith(text, "phase1 on v5e:2x4: 8 chips, mesh data 8\n")
    self.assertIn("4,096,000 tokens/s per chip, 32,768,000 in all", text)
    self.assertIn("unknown length: give --rows_per_epoch", text)

  def test_what_nobody_has_counted_is_said(self):
    facts = dataclasses.replace(_FACTS, model_flops=None)
    made = _plan("v5e:1x1", facts=facts, cost=_cost("v5e:1x1", cycles=None))
    text = page.render(made)
    self.assertIn("MFU          unknown", text)
    self.assertIn("no schedule of 1 operation: only the bytes count", text)

  def test_limits_are_printed(self):
    text = page.render(_plan("v5e:1x1", cost=_cost("v5e:1x1")))
    for limit in (
      "latency of transfers (DMA)",
      "stalls",
      "Copies in the background\ncount as hidden",
      "predicated regions as taken",
      "of conditionals that exchange\nnothing all branches",
      "loops of a length known only at run time as one iteration",
    ):
      self.assertIn(limit, text)

  def test_a_run_whose_steps_count_all_branches_takes_at_most_so_long(self):
    made = _plan("v5e:1x1", cost=_cost("v5e:1x1", branch=(1,)))
    self.assertIn("100 steps in at most 200 ms", page.render(made))

  def test_a_gpu_has_bounds_and_no_estimate(self):
    exchange = hardware.Collective(
      "all-reduce", 10**9, (tuple(range(8)),), 1, "", ""
    )
    made = _plan(
      "h100:8",
      traffic=_cost("h100:8", hbm_bytes=3_352_000_000),
      collectives=(exchange,),
    )
    text = page.render(made)
    self.assertStartsWith(text, "plan on h100:8: 8 GPUs, mesh data 8\n")
    self.assertIn("JAX takes 75% of it", text)
    self.assertIn("There is no model of a GPU's time.", text)
    self.assertIn("take all of their branches:\n  HBM ", text)
    # Three times a thousandth of the 3,352 GB that HBM moves in a second.
    self.assertIn("  HBM        3.00 ms (9.37 GiB)", text)
    self.assertIn("  arithmetic 100 ms (7.91e+14 model FLOP", text)
    # 2 x 7/8 x 1 GB at 450 GB/s.
    self.assertIn("  exchange   3.89 ms on NVLink", text)
    self.assertRegex(text, r"100\.0% +3 +3\.12 GiB +\S*query/dot_general")
    figures = page.figures(made)
    self.assertAlmostEqual(figures["arithmetic_s"], 0.1)
    self.assertAlmostEqual(figures["traffic_s"], 3e-3)
    self.assertNotIn("step_s", figures)

  def test_what_does_not_fit_is_divided_as_well(self):
    made = _plan("v5e:2x4", memory=None, needed_bytes=20 * _GIB)
    text = page.render(made)
    self.assertIn("DOES NOT FIT: 20.00 GiB of 16.00 GiB per device", text)
    self.assertIn("  temporaries  17.00 GiB  (activations, gradients", text)
    self.assertIn("try a smaller data.batch_size", text)
    self.assertNotIn("other state", text)
    facts = dataclasses.replace(made.facts, extra_bytes=4 * _GIB)
    text = page.render(dataclasses.replace(made, facts=facts))
    self.assertIn("  other state  4.00 GiB\n", text)
    self.assertIn("  temporaries  13.00 GiB  (activations, gradients", text)
    unknown = dataclasses.replace(made, needed_bytes=None)
    self.assertIn("DOES NOT FIT: more than it has of", page.render(unknown))


if __name__ == "__main__":
  absltest.main()
