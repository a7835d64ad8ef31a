"""Runs of several real processes against the run of one."""

import pathlib
import re
import signal
import tempfile
import time

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax.checkpoint import load_params
from tests import processes, tiny


def _finish(group):
  return [processes.finish(process) for process in group]


def _ends(group):
  """What processes that fail wrote, and the seconds until all had ended."""
  begin = time.monotonic()
  errors = [process.stderr.read() for process in group]
  for process in group:
    process.wait()
  return errors, time.monotonic() - begin


class _Runs(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    tiny.write_corpus(cls.root)


class TwoProcessesTest(_Runs):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = tiny.config(
      cls.root,
      stop=dict(steps=8),
      samples=["the [MASK] of room 3 ."],
      evals=dict(
        heldout=dict(every=4),
        pseudo=dict(name="pseudo_perplexity", num_rows=3, batch_size=6),
      ),
    )
    cls.alone = cls.root / "alone"
    processes.finish(processes.start(cls.config, cls.alone, devices=2))
    cls.together = cls.root / "together"
    cls.errors = _finish(
      processes.start_together(cls.config, cls.together, count=2)
    )

  def test_every_value_is_that_of_one_process(self):
    # Two summands add up to the same bits in either order.
    self.assertEqual(
      processes.values(self.together), processes.values(self.alone)
    )
    self.assertIn("pseudo/pseudo_perplexity", processes.rows(self.alone)[-1])
    a, b = load_params(self.together)[0], load_params(self.alone)[0]
    jax.tree.map(np.testing.assert_array_equal, a, b)

  def test_each_process_reads_its_half_of_the_same_rows(self):
    halves = [processes.held_rows(self.together, i) for i in (0, 1)]
    for half, wanted in zip(halves, (range(4), range(4, 8))):
      self.assertEqual({row for _, row, _ in half}, set(wanted))
    self.assertCountEqual(
      [*halves[0], *halves[1]], processes.held_rows(self.alone)
    )

  def test_process_0_alone_writes_and_talks(self):
    names = {p.name for p in self.together.iterdir()}
    alone = {p.name for p in self.alone.iterdir()}
    self.assertEqual(names - alone, {"rows-1.txt"})
    report = (self.together / "report" / "report.md").read_text("utf-8")
    self.assertIn("[MASK]", report)
    self.assertIn("step 8/8", self.errors[0])
    self.assertIn("Stopped at step 8", self.errors[0])
    for line in self.errors[1].splitlines():
      self.assertRegex(line, r"^(\[Gloo\]|Process 1 of 2: 1 of 2 devices)")

  def test_a_model_axis_across_processes_feeds_both_the_same_rows(self):
    workdir = self.root / "model"
    config = self.config | dict(mesh=dict(model=2), stop=dict(steps=4))
    _finish(processes.start_together(config, workdir, count=2))
    rows = processes.held_rows(workdir, 0)
    self.assertEqual(rows, processes.held_rows(workdir, 1))
    self.assertLen(rows, 4 * 8)
    mine, whole = (
      [float(r["loss"]) for r in processes.rows(w)[:4]]
      for w in (workdir, self.alone)
    )
    np.testing.assert_allclose(mine, whole, rtol=1e-4)  # other sums


class EndTest(_Runs):
  def test_kills_end_both_soon_and_the_same_command_goes_on(self):
    config = tiny.config(
      self.root,
      stop=dict(steps=300),
      every=dict(checkpoint=3),
      evals=dict(heldout=dict(every=10)),
    )
    workdir = self.root / "run"
    for victim, step in ((1, 6), (0, 13)):
      group = processes.start_together(config, workdir, count=2)
      processes.wait_for_step(group[0], workdir, step)
      group[victim].kill()
      errors, seconds = _ends(group)
      self.assertLess(seconds, 30)  # heartbeats are given 10 s
      self.assertEqual(group[victim].returncode, -signal.SIGKILL)
      other = 1 - victim
      self.assertNotEqual(group[other].returncode, 0)
      # Its own line, or that of JAX's C++ when the coordinator is gone.
      self.assertRegex(
        errors[other], "another process is gone|another task died"
      )
    # SIGTERM to one of them: both save the same step and leave.
    group = processes.start_together(config, workdir, count=2)
    processes.wait_for_step(group[0], workdir, 20)
    group[1].send_signal(signal.SIGTERM)
    said, _ = _finish(group)
    stop = int(re.search(r"Stopped at step (\d+): signal", said)[1])
    self.assertLess(stop, 300)
    self.assertTrue((workdir / "checkpoints" / str(stop)).exists())
    self.assertGreaterEqual(
      int(re.search(r"Resuming at step (\d+)", said)[1]), 9
    )
    ended = config | dict(stop=dict(steps=stop + 3))
    said = _finish(processes.start_together(ended, workdir, count=2))
    self.assertIn(f"Resuming at step {stop}.", said[0])
    self.assertNotIn("Resuming", said[1])
    whole = self.root / "whole"
    processes.finish(processes.start(ended, whole, devices=2))
    self.assertEqual(processes.values(workdir), processes.values(whole))

  def test_a_batch_that_does_not_divide_is_one_line_on_each(self):
    config = tiny.config(self.root, data=dict(batch_size=9))
    group = processes.start_together(config, self.root / "odd", count=2)
    errors, seconds = _ends(group)
    self.assertLess(seconds, 60)
    for process, said in zip(group, errors):
      self.assertEqual(process.returncode, 1)
      self.assertNotIn("Traceback", said)
      self.assertRegex(said, "Error.*batch_size=9 .* 2 batch shards")

  def test_a_process_with_another_config_ends_both_and_says_why(self):
    configs = [tiny.config(self.root, seed=seed) for seed in (3, 4)]
    port = processes.free_port()
    group = [
      processes.start(c, self.root / "two", **processes.place(port, 2, i))
      for i, c in enumerate(configs)
    ]
    errors, _ = _ends(group)
    self.assertEqual([p.returncode for p in group], [1, 1])
    reason = "process 1 differs from process 0 .*seed: 4 here, 3 on process 0"
    self.assertRegex(errors[1], f"Error on process 1: config: {reason}")
    self.assertRegex(
      errors[0], f"Error: process 1 failed, so process 0 ends too: .*{reason}"
    )
    self.assertFalse((self.root / "two" / "checkpoints").exists())


class _Elastic(_Runs):
  counts: tuple[int, int, int]

  def run_all(self):
    config = tiny.config(
      self.root,
      optim=dict(name="onebit_adam", learning_rate=1e-2, freeze_step=2),
      evals=dict(),
      horizon=9,
    )
    workdir = self.root / "moved"
    for count, steps in zip(self.counts, (3, 6, 9)):
      now = config | dict(stop=dict(steps=steps))
      _finish(processes.start_together(now, workdir, count))
    whole = self.root / "whole"
    now = config | dict(stop=dict(steps=9))
    processes.finish(processes.start(now, whole, devices=self.counts[0]))
    return workdir, whole

  def check(self):
    workdir, whole = self.run_all()
    # Every row of every step, whoever read it.
    seen = [
      row
      for i in range(max(self.counts))
      for row in processes.held_rows(workdir, i)
    ]
    self.assertCountEqual(seen, processes.held_rows(whole))
    for step in (3, 6):
      before, after = (
        list(np.load(workdir / f"debts-{end}-{step}.npz").values())
        for end in ("to", "from")
      )
      self.assertGreater(max(np.abs(x).max() for x in before), 1e-3)
      for old, new in zip(before, after):
        np.testing.assert_allclose(old, new, rtol=1e-5, atol=1e-7)
    mine, straight = (
      [float(r["loss"]) for r in processes.rows(w)] for w in (workdir, whole)
    )
    # The errors of single workers differ, so do the next signs, not the curve.
    np.testing.assert_allclose(mine[:3], straight[:3], rtol=1e-5)
    np.testing.assert_allclose(mine, straight, rtol=0.1)


class TwoOneTwoTest(_Elastic):
  counts = (2, 1, 2)

  def test_order_of_data_and_errors_stay(self):
    self.check()


@pytest.mark.slow  # TwoOneTwoTest covers the same
class FourTwoFourTest(_Elastic):
  counts = (4, 2, 4)

  def test_order_of_data_and_errors_stay(self):
    self.check()


if __name__ == "__main__":
  absltest.main()
