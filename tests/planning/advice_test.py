"""What would make a step fit."""

import dataclasses

from absl.testing import absltest

from bertjax import config as config_lib
from bertjax import hardware, overrides
from bertjax.plan import Plan
from bertjax.planning import advice, page
from tests.configs_test import _CONFIGS, _load
from tests.planning.facts import FACTS


class AdviceTest(absltest.TestCase):
  def test_activations_ask_for_microbatches(self):
    # 16 kB of state, 84 kB of activations, room for 60: halving is enough.
    found = advice.candidates(FACTS, 1, needed=100_000, available=60_000)
    self.assertEqual(
      list(found),
      [dict(microbatches=2), dict(microbatches=4), dict(microbatches=8)],
    )

  def test_microbatches_multiply_those_that_are_there(self):
    found = advice.candidates(FACTS, 2, needed=100_000, available=60_000)
    self.assertEqual(next(found), dict(microbatches=4))

  def test_state_asks_for_sharding(self):
    # 16 kB of state in 10 kB: a third is left to activations at fsdp=4.
    found = advice.candidates(FACTS, 1, needed=17_000, available=10_000)
    self.assertEqual(next(found), dict(mesh=dict(data=2, fsdp=4)))

  def test_a_frozen_model_counts_as_state(self):
    facts = dataclasses.replace(FACTS, extra_bytes=30_000)
    # 46 kB of state in 60 kB: half of them and 54 kB of activations are more.
    found = advice.candidates(facts, 1, needed=100_000, available=60_000)
    self.assertEqual(
      next(found), dict(mesh=dict(data=4, fsdp=2), microbatches=2)
    )

  def test_recomputing_asks_for_few_rows_at_a_time(self):
    found = advice.recomputing(FACTS, 2, available=60_000)
    remat = dict(model=dict(remat="full"))
    self.assertEqual(list(found), [remat, dict(microbatches=8) | remat])
    self.assertEmpty(list(advice.recomputing(FACTS, 2, available=1_000)))

  def test_nothing_helps_a_state_that_is_too_large(self):
    found = advice.candidates(FACTS, 1, needed=17_000, available=1_000)
    self.assertEmpty(list(found))

  def test_the_page_shows_it(self):
    made = Plan(
      hardware.parse("v5e:2x4"),
      FACTS,
      steps=7,
      needed_bytes=17e9,
      suggestion=advice.Suggestion("microbatches=2", 9e9),
    )
    text = page.render(made)
    self.assertIn("DOES NOT FIT: 15.83 GiB of 16.00 GiB", text)
    self.assertIn("would fit with --config.microbatches=2 (8.38 GiB)\n", text)
    self.assertFalse(page.figures(made)["fits"])

  def test_what_the_page_says_of_a_stage_reaches_that_stage_alone(self):
    fields = "mesh.data=2, mesh.fsdp=4, microbatches=32, model.remat=full"
    made = Plan(
      hardware.parse("v5e:2x4"),
      FACTS,
      steps=7,
      needed_bytes=17e9,
      suggestion=advice.Suggestion(fields, 9e9),
    )
    _, given = overrides.separate(page.render(made, "phase2").split())
    path = next(path for path in _CONFIGS if path.stem == "lamb")
    config = _load(path, "large")
    before = config_lib.stage_configs(config)
    after = config_lib.stage_configs(overrides.override(config, given))
    self.assertEqual(after["phase1"], before["phase1"])
    changes = dict(
      mesh=dict(data=2, fsdp=4), microbatches=32, model=dict(remat="full")
    )
    self.assertEqual(
      after["phase2"], config_lib.merge(before["phase2"], changes)
    )


if __name__ == "__main__":
  absltest.main()
