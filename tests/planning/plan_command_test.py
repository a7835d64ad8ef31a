"""`python -m bertjax.plan` answers for every stage: page, table and JSON."""

import contextlib
import importlib.util
import io
import json
import pathlib
import types
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax import cli, hardware
from bertjax import plan as plan_lib
from bertjax.config import merge
from bertjax.planning.outcome import Plan
from bertjax.planning.step import StepFacts
from tests import tiny

_STAGES = dict(
  long=dict(),
  # Says itself how large its batch is.
  short=dict(data=dict(batch_size=24), stop=dict(steps=5)),
)


def _made(stage, topology, *, steps, vocab_size, suggest=True):
  """A plan without a compiler: a row of the batch takes 1 ms on a v5e."""
  del suggest
  chip = hardware.parse(topology).chip
  rows = stage.data["batch_size"]
  if rows % 2:
    raise ValueError(f"data.batch_size={rows} is odd.")
  facts = StepFacts(
    mesh=dict(data=4, fsdp=1, model=1, seq=1),
    batch_size=rows,
    seq_len=32,
    vocab_size=vocab_size,
    parameters=1000,
    parameter_bytes=4_000,
    optimizer_bytes=8_000,
    batch_bytes=640,
    model_flops=None,
    microbatches=stage.microbatches,
  )
  row = hardware.Row(
    name="dot",
    opcode="fusion",
    times=1,
    cycles=7,
    mxu_cycles=0,
    hbm_bytes=2**20,
    vmem_bytes=0,
    estimate=rows * chip.clock / 1e3,
    op_name="jit(step)/jvp(MaskedLM)/dot_general",
    source="",
  )
  return Plan(
    topology=hardware.parse(topology),
    facts=facts,
    steps=steps,
    needed_bytes=9e9,
    memory=hardware.Memory(1, 1, 0, 1, 0),
    cost=hardware.Cost(chip, [row]),
  )


class AnswerTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir())
    self.config = merge(tiny.config(self.root), dict(stages=_STAGES))
    self.enterContext(mock.patch.object(plan_lib, "plan", _made))

  def answer(self, config=None, **given):
    """What the command prints: (stdout, stderr)."""
    flags = dict(
      topology="v5e:2x2",
      stage=None,
      vocab_size=None,
      rows_per_epoch=None,
      sweep=None,
      json=None,
    )
    flags = types.SimpleNamespace(**flags | given)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      plan_lib.answer(self.config if config is None else config, flags)
    return out.getvalue(), err.getvalue()

  def test_every_stage_has_its_page(self):
    text, progress = self.answer()
    self.assertRegex(
      text, r"(?s)long on v5e:2x2.*\nbatch 8 x.*\nshort on.*\nbatch 24 x"
    )
    self.assertIn("6 steps", text)
    self.assertIn("5 steps", text)
    self.assertIn("Compiling short for v5e:2x2", progress)
    text, _ = self.answer(stage="short")
    self.assertNotIn("long on", text)

  @parameterized.parameters("v5p:16x20x28", "v6e:16x16", "8xv5e:16x16")
  def test_whole_pods_are_planned(self, topology):
    self.config["data"]["batch_size"] = 8
    text, _ = self.answer(topology=topology)
    self.assertIn(f"long on {topology}: ", text)

  def test_figures_go_to_a_file_or_alone_to_the_output(self):
    path = self.root / "plan.json"
    text, _ = self.answer(json=str(path))
    found = json.loads(path.read_text())
    self.assertEqual([*found], ["long", "short"])
    self.assertEqual(found["short"]["step"]["batch_size"], 24)
    self.assertIn("long on", text)
    text, _ = self.answer(json="-")
    self.assertEqual(json.loads(text), found)

  @parameterized.parameters(None, "microbatches=1")
  def test_the_file_has_what_was_planned_before_a_failure(self, sweep):
    def made(stage, topology, **options):
      if stage.data["batch_size"] == 24:
        raise OSError("No space left on device")
      return _made(stage, topology, **options)

    path = self.root / "plan.json"
    with (
      mock.patch.object(plan_lib, "plan", made),
      self.assertRaisesRegex(OSError, "No space"),
    ):
      self.answer(json=str(path), sweep=sweep)
    self.assertEqual([*json.loads(path.read_text())], ["long"])

  def test_a_config_without_stages_is_called_plan(self):
    del self.config["stages"]
    text, _ = self.answer(json="-")
    self.assertEqual([*json.loads(text)], ["plan"])
    self.assertStartsWith(self.answer()[0], "plan on v5e:2x2: 4 chips")
    with self.assertRaisesRegex(ValueError, "stage='long'.*has no stages"):
      self.answer(stage="long")

  def test_a_sweep_changes_what_a_stage_says_itself(self):
    text, progress = self.answer(
      sweep="data.batch_size=12,4,3 microbatches=2", json="-"
    )
    for name in ("long", "short"):
      table = json.loads(text)[name]
      sizes = [
        (trial["values"]["data.batch_size"], trial.get("plan"))
        for trial in table
      ]
      self.assertCountEqual([size for size, _ in sizes], [12, 4, 3])
      for size, made in sizes:
        if size == 3:
          self.assertIsNone(made)
          continue
        self.assertEqual(made["step"]["batch_size"], size)
        self.assertEqual(made["step"]["microbatches"], 2)
    self.assertIn(
      "3 of 3: data.batch_size=3 microbatches=2: data.batch_size=3 is odd.",
      progress,
    )
    steps = {trial["plan"]["steps"] for trial in table if "plan" in trial}
    self.assertEqual(steps, {5})

  def test_mistakes_are_told_before_anything_compiles(self):
    for message, given in (
      ("topology='v5x:2x2' is unknown", dict(topology="v5x:2x2")),
      ("v5e:32x32': a pod of v5e has 16x16 ", dict(topology="v5e:32x32")),
      ("a pod of v4 has 16x16x16", dict(topology="2xv4:16x16x18")),
      ("stage='shrt' is unknown.*Did you mean 'short'", dict(stage="shrt")),
      ("sweep: 'microbatches' names no field", dict(sweep="microbatches")),
      ("--json=/dev/null is a device", dict(json="/dev/null")),
      ("there is no folder", dict(json=f"{self.root}/no/plan.json")),
    ):
      compiled = mock.Mock()
      with (
        mock.patch.object(plan_lib, "plan", compiled),
        self.assertRaisesRegex(ValueError, message),
      ):
        self.answer(**given)
      compiled.assert_not_called()


class TopologyTest(absltest.TestCase):
  def test_a_slice_larger_than_a_pod_is_refused_without_a_compiler(self):
    ((_, stage, _),) = plan_lib.stages(tiny.config(pathlib.Path("nowhere")))
    with (
      mock.patch.object(hardware, "compile_for") as compiled,
      self.assertRaisesRegex(ValueError, "'v5e:32x32': a pod of v5e has 16x16"),
    ):
      plan_lib.plan(stage, "v5e:32x32")
    compiled.assert_not_called()


class MissingCompilerTest(absltest.TestCase):
  def test_the_command_names_the_extra_in_one_line(self):
    config = tiny.config(pathlib.Path("nowhere"))
    ((_, stage, _),) = plan_lib.stages(config)
    told = io.StringIO()
    with (
      mock.patch.object(importlib.util, "find_spec", return_value=None),
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "1"),
      cli.clear_errors(),
    ):
      plan_lib.plan(stage, "v5e:2x2")
    self.assertRegex(told.getvalue(), r"\AError: .*libtpu.*pip install.*\n\Z")


if __name__ == "__main__":
  absltest.main()
