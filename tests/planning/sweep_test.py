"""A sweep plans every combination and puts the fastest first."""

import dataclasses
import json

import jax
from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.planning import page, sweep
from bertjax.planning.outcome import Plan
from tests.planning.facts import FACTS

_FACTS = dataclasses.replace(
  FACTS,
  mesh=dict(data=4, fsdp=1, model=1, seq=1),
  batch_size=8,
  seq_len=16,
)
_MEMORY = hardware.Memory(1, 1, 0, 1, 0)


def _plan(config):
  """Each microbatch takes 1 ms more; a whole batch does not fit."""
  parts, fsdp = config["microbatches"], config["mesh"]["fsdp"]
  if fsdp == 3:
    raise ValueError("mesh: fsdp=3 does not divide 4 devices.")
  topology = hardware.parse("v5e:2x2")
  if parts == 1:
    return Plan(topology, _FACTS, 10, 20e9 / fsdp)
  row = hardware.Row(
    name="dot",
    opcode="fusion",
    times=parts,
    cycles=1_500_000,
    mxu_cycles=0,
    hbm_bytes=0,
    vmem_bytes=0,
    estimate=parts * 1.5e6,
    op_name="",
    source="",
  )
  return Plan(
    topology,
    _FACTS,
    10,
    9e9 / fsdp,
    memory=_MEMORY,
    cost=hardware.Cost(topology.chip, [row]),
  )


class SweepTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    tried = sweep.axes("mesh.fsdp=1,3 microbatches=1,4,2")
    config = dict(seed=0, mesh=dict(data=-1), microbatches=7)
    self.trials = list(sweep.trials(config, tried, _plan))

  def test_fast_then_large_then_refused(self):
    order = [
      (trial.values["mesh.fsdp"], trial.values["microbatches"])
      for trial in sweep.best_first(self.trials)
    ]
    self.assertEqual(order[:3], [(1, 2), (1, 4), (1, 1)])
    self.assertCountEqual(order[3:], [(3, 1), (3, 4), (3, 2)])

  def test_table(self):
    table, limits = sweep.render(self.trials, "phase1").split("\n\n")
    self.assertEqual(limits, f"{page.LIMITS}\n")
    lines = table.splitlines()
    self.assertLen(lines, 2 + 6)
    self.assertEqual(lines[0], "phase1 on v5e:2x2, the fastest first")
    self.assertIn("microbatches", lines[1])
    # 8 x 16 tokens on 4 chips in 2 ms.
    self.assertRegex(lines[2], r"1 +2 +8\.38 GiB +2\.00 ms .* 16,000 .* fits$")
    self.assertRegex(lines[4], r"1 +1 +18\.63 GiB +does not fit$")
    self.assertEndsWith(lines[5], "mesh: fsdp=3 does not divide 4 devices.")

  def test_a_table_without_times_begins_with_the_smallest(self):
    facts = dataclasses.replace(_FACTS, unit="points")

    def plan(config):
      needed = config["microbatches"] * 1e9
      topology = hardware.parse("h100:4")
      return Plan(topology, facts, 10, needed, memory=_MEMORY)

    tried = sweep.axes("microbatches=3,1,2")
    trials = list(sweep.trials(dict(seed=0), tried, plan))
    head, columns, *rows = sweep.render(trials).splitlines()
    self.assertEqual(head, "sweep on h100:4, the smallest first")
    self.assertIn(" points/s/chip ", columns)
    self.assertEqual([row.split()[0] for row in rows], ["1", "2", "3"])

  def test_figures_are_json(self):
    found = sweep.figures(self.trials, lambda plan: plan.step_s)
    found = json.loads(json.dumps(found))
    self.assertEqual(
      found[0],
      {
        "values": {"mesh.fsdp": 1, "microbatches": 2},
        "verdict": "fits",
        "plan": 0.002,
      },
    )
    self.assertNotIn("plan", found[-1])

  def test_what_the_compiler_does_not_survive_is_refused(self):
    def plan(config):
      if config["microbatches"] == 1:
        raise hardware.CompilerEnded("The compiler was killed.")
      if config["microbatches"] == 2:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug\nand more of it")
      return _plan(config)

    config = dict(mesh=dict(fsdp=1))
    found = list(sweep.trials(config, sweep.axes("microbatches=1,2,4"), plan))
    self.assertEqual(
      [trial.verdict for trial in found],
      ["The compiler was killed.", "INTERNAL: a bug", "fits"],
    )

  @parameterized.parameters(
    "", "microbatches", "microbatches=", "=3", "a b=1", "mesh.=1", "mesh..a=1"
  )
  def test_words_that_name_no_values(self, text):
    with self.assertRaisesRegex(ValueError, "^sweep: .*microbatches=1,2"):
      sweep.axes(text)

  @parameterized.parameters(
    ("microbatches=[1", r"microbatches=\[1 is no JSON"),
    ("x='", "x=' is no JSON"),
    ("mesh=1 mesh.fsdp=2", "mesh.fsdp stands beside mesh;"),
    ("mesh.fsdp=2 mesh=1", "mesh stands beside mesh.fsdp;"),
    ("seed=1 microbatches=1 seed=2", "seed stands beside seed; name a .* once"),
    ("microbatches=1,2,1", "'microbatches=1,2,1' tries 1 twice"),
  )
  def test_mistakes_are_told_in_one_line(self, text, message):
    with self.assertRaisesRegex(ValueError, rf"\Asweep: {message}.*\Z"):
      sweep.axes(text)

  def test_values_are_those_of_overrides(self):
    self.assertEqual(
      sweep.axes(
        "model.remat=none,full model.scan=true,false rate=1.0e-3,1e-4,1"
        " mesh.data=1 mesh.data2=1 glob=*.txt"
      ),
      {
        "model.remat": ["none", "full"],
        "model.scan": [True, False],
        "rate": [1e-3, 1e-4, 1],
        "mesh.data": [1],
        "mesh.data2": [1],
        "glob": ["*.txt"],
      },
    )

  def test_no_combination_at_all_is_an_error(self):
    tried = sweep.axes("mesh.fsdp=3 microbatches=1,2")
    with self.assertRaisesRegex(ValueError, "no combination.*fsdp=3"):
      list(sweep.trials(dict(mesh=dict(data=-1)), tried, _plan))


if __name__ == "__main__":
  absltest.main()
