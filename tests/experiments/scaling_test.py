"""What the experiment on pods makes of compiled steps."""

import types
from unittest import mock

from absl.testing import absltest

from bertjax import hardware
from experiments.scaling import findings, measure


def row(topology, chips, compute, exchange, **fields):
  compute, exchange = (
    [s] if isinstance(s, float) else s for s in (compute, exchange)
  )
  return {
    "part": findings.WEAK,
    "variant": "large",
    "optimizer": findings.LAMB,
    "mesh": {},
    "topology": topology,
    "chips": chips,
    "compute s": compute,
    "exchange s": exchange,
    "sent bytes": [s * 1e9 for s in exchange],
    **fields,
  }


def planned(stage, topology, **_):
  """A plan whose exchange takes a second per device, and what was planned.

  Where the optimizer compresses, another kind of step sends a hundredth, as one
  does that skips its update.
  """
  target = hardware.parse(topology)
  tokens = stage.data["batch_size"] * stage.data["seq_len"]
  sent = types.SimpleNamespace(sent_bytes=7e6)
  kind = types.SimpleNamespace(
    compute_s=0.5, exchange_s=target.num_devices, collectives=[sent, sent]
  )
  skipping = types.SimpleNamespace(
    compute_s=0.25, exchange_s=0.125,
    collectives=[types.SimpleNamespace(sent_bytes=14e4)],
  )  # fmt: skip
  compresses = stage.optim["name"] != findings.LAMB
  facts = types.SimpleNamespace(
    batch_size=stage.data["batch_size"],
    tokens=tokens,
    model_flops=3.0,
    parameters=10**8,
  )
  return types.SimpleNamespace(
    topology=target,
    facts=facts,
    kinds=[kind, skipping] if compresses else [kind],
    needed_bytes=11,
    fits=True,
  )


class MeasureTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.plan = self.enter_context(
      mock.patch.object(measure, "plan", side_effect=planned)
    )

  def test_every_pod_has_as_many_rows_per_chip(self):
    found = measure.weak(
      variant="base",
      topology="v5e:4x4",
      mesh={"model": 2},
      rows_per_chip=3,
      optimizer="onebit_lamb",
    )
    stage = self.plan.call_args.args[0]
    self.assertEqual(stage.mesh["model"], 2)
    self.assertEqual(stage.optim["name"], "onebit_lamb")
    self.assertGreater(stage.optim["freeze_step"], 0)
    self.assertEqual(found["tokens"], 3 * 16 * 512)
    self.assertEqual(found["chips"], 16)
    self.assertEqual(found["compute s"], [0.5])
    self.assertEqual(found["exchange s"], [16])
    self.assertEqual(found["sent bytes"], [14e6])

  def test_a_recipe_is_as_long_as_its_stage(self):
    found = measure.recipe(
      variant="large", stage="phase2", topology="v5e:4x4", microbatches=64
    )
    stage = self.plan.call_args.args[0]
    self.assertEqual(stage.microbatches, 64)
    self.assertEqual(found["batch size"], 32_768)
    self.assertEqual(found["steps"], 1_563)


class FindingsTest(absltest.TestCase):
  weak = [
    row("v5e:1x1", 1, 0.06, 0.0),
    row("v5p:1x1x1", 1, 0.03, 0.0),
    row("v5e:4x4", 16, 0.08, 0.04),
    row(
      "v5e:4x4",
      16,
      [0.2, 0.1],
      [0.5, 0.02],
      optimizer=findings.ONEBIT,
    ),
  ]

  def test_efficiency_is_against_a_chip_of_the_same_kind(self):
    least, most = findings.efficiency(self.weak[2], self.weak)
    self.assertAlmostEqual(least, 0.06 / 0.12)
    self.assertAlmostEqual(most, 0.06 / 0.08)
    sliced = row("2xv5p:2x2x2", 16, 0.02, 0.04)
    least, most = findings.efficiency(sliced, self.weak)
    self.assertAlmostEqual(least, 0.03 / 0.06)
    self.assertAlmostEqual(most, 0.03 / 0.04)

  def test_a_recipe_takes_all_of_its_steps(self):
    made = row("v5e:4x4", 16, 0.5, 0.25, steps=240)
    least, most = findings.minutes(made)
    self.assertAlmostEqual(least, 2.0)
    self.assertAlmostEqual(most, 3.0)

  def test_signs_are_counted_without_their_warm_up(self):
    # 40 MB of gradients and 0.08 s against 20 MB of signs and 0.1 s.
    for bandwidth, bits, gain in (
      (1e9, 32, 0.12 / 0.12),
      (1e8, 32, 0.48 / 0.3),
      (1e8, 16, 0.28 / 0.3),
      (None, 32, 0.12 / 0.12),  # a ring's own exchange: 0.04 and 0.02 s
      (None, 16, 0.1 / 0.12),
    ):
      found = findings.onebit_speedup(self.weak, bandwidth, bits)
      self.assertAlmostEqual(found, gain)


if __name__ == "__main__":
  absltest.main()
