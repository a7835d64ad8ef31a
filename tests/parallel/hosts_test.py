"""Runs of several real processes against the run of one."""

import contextlib
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import experiment
from bertjax.checkpoint import load_params
from bertjax.config import settings
from bertjax.parallel import hosts, launchers
from tests import noted, processes, tiny

_ROOT = pathlib.Path(__file__).parents[2]


def _finish(group):
  return [processes.finish(process) for process in group]


def _ends(group):
  """What processes that fail wrote, and the seconds until all had ended."""
  begin = time.monotonic()
  errors = [process.stderr.read() for process in group]
  for process in group:
    process.wait()
  return errors, time.monotonic() - begin


class _Runs(tiny.CorpusTestCase):
  @classmethod
  def config_of(cls, **changes):
    return tiny.small(cls.root, **changes)


class ProcessesTest(_Runs):
  """Runs of one process, of two of which one dies, and of halves of a model."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = cls.config_of(
      stop=dict(steps=24),
      every=dict(checkpoint=4),
      samples=["the [MASK] of room 3 ."],
      evals=dict(
        heldout=dict(every=12),
        pseudo=dict(name="pseudo_perplexity", num_rows=3, batch_size=6),
      ),
    )
    cls.alone = cls.root / "alone"
    processes.finish(
      processes.start(config, cls.alone, devices=2, UNREPORTED="1")
    )
    cls.together = cls.root / "together"
    group = processes.start_together(config, cls.together, count=2)
    processes.wait_for_step(group[0], cls.together, 9)  # 4 is on disk
    group[1].kill()
    cls.left, cls.seconds = _ends(group)
    cls.ended = _finish(processes.start_together(config, cls.together, count=2))
    cls.halves = cls.root / "halves"
    config = config | dict(
      mesh=dict(data=1, model=2), samples=[], evals={}, stop=dict(steps=400)
    )
    group = processes.start_together(
      config, cls.halves, count=2, UNREPORTED="1"
    )
    processes.wait_for_step(group[0], cls.halves, 3)
    group[1].send_signal(signal.SIGTERM)
    cls.stopped = _finish(group)

  def test_the_process_that_is_left_ends_soon_and_says_why(self):
    self.assertLess(self.seconds, 60)  # ten are given, with no load
    self.assertRegex(self.left[0], "another process is gone|another task died")

  def test_every_value_is_that_of_one_process(self):
    # Two summands add up to the same bits in either order.
    self.assertEqual(
      processes.values(self.together), processes.values(self.alone)
    )
    self.assertIn("pseudo/pseudo_perplexity", processes.rows(self.alone)[-1])
    a, b = load_params(self.together)[0], load_params(self.alone)[0]
    jax.tree.map(np.testing.assert_array_equal, a, b)

  def test_each_process_reads_its_half_of_the_same_rows(self):
    read = [processes.held_rows(self.together, i) for i in (0, 1)]
    # What the kill undid was read twice, and the same again.
    self.assertEqual({*read[0], *read[1]}, {*processes.held_rows(self.alone)})
    last = int(re.search(r"Resuming at step (\d+)\.", self.ended[0])[1])
    self.assertBetween(last, 4, 23)
    for held, wanted in zip(read, (range(4), range(4, 8))):
      rows = {row for step, row, _ in held if step >= last}
      self.assertEqual(rows, set(wanted))

  def test_process_0_alone_writes_and_talks(self):
    names = {p.name for p in self.together.iterdir()}
    alone = {p.name for p in self.alone.iterdir()}
    self.assertEqual(names - alone, {"rows-1.txt", "report"})
    report = (self.together / "report" / "report.md").read_text("utf-8")
    self.assertIn("[MASK]", report)
    self.assertIn("step 24/24", self.ended[0])
    for line in self.ended[1].splitlines():
      self.assertRegex(
        line, r"^(\[Gloo\]|Process 1 of 2 on .*: 1 of 2 devices)"
      )

  def test_a_signal_to_one_stops_all_at_the_same_step(self):
    stop = int(re.search(r"Stopped at step (\d+): signal", self.stopped[0])[1])
    self.assertBetween(stop, 3, 399)
    self.assertTrue((self.halves / "checkpoints" / str(stop)).exists())
    for process in range(2):
      held = processes.held_rows(self.halves, process)
      self.assertEqual({step for step, *_ in held}, set(range(stop)))

  def test_two_that_split_the_model_are_the_run_of_one(self):
    stop = len(processes.rows(self.halves))
    expected = processes.held_rows(self.alone)
    for process in range(2):
      # They read the same rows, all of them.
      self.assertEqual(
        [x for x in processes.held_rows(self.halves, process) if x[0] < 24],
        [x for x in expected if x[0] < stop],
      )
    losses, whole = (
      [float(row["loss"]) for row in processes.rows(folder)]
      for folder in (self.halves, self.alone)
    )
    count = min(stop, 5)  # after that training amplifies how sums are rounded
    np.testing.assert_allclose(losses[:count], whole[:count], rtol=1e-4)


# Programs without a model, which start in a second.
_LIGHT = """
import pathlib, sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
from jax.experimental import multihost_utils
from bertjax.parallel import agreement, hosts
agreement._SHARED_S = 1.0
with hosts.connected(
    hosts.place(), connect_timeout_s=60, heartbeat_timeout_s=5):
"""
_COLLECTIVES = """
  for i in range(10**6):
    multihost_utils.process_allgather(np.int32(i))
    if i == 9 and hosts.is_first():
      print("under way", flush=True)
"""
_UNHAPPY = """
  raise ValueError(f"seed={jax.process_index()} is bad luck.")
"""
_SHARED = """
  agreement.check_shared(pathlib.Path(sys.argv[1]))
  agreement.wait_for_all()
"""


class LightTest(parameterized.TestCase):
  def _start(self, body, *arguments):
    """Two processes; each gets one of the arguments."""
    port = processes.free_port()
    group = [
      subprocess.Popen(
        [sys.executable, "-c", _LIGHT + body, *arguments[i : i + 1]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env=os.environ | processes.place(port, 2, i),
      )
      for i in range(2)
    ]
    for process in group:
      self.addCleanup(process.stdout.close)
    return group

  @parameterized.parameters(0, 1)
  def test_after_a_kill_the_other_process_ends_soon_with_a_reason(self, victim):
    group = self._start(_COLLECTIVES)
    for line in group[0].stdout:  # Gloo talks, too
      if line == "under way\n":
        break
    group[victim].kill()
    errors, seconds = _ends(group)
    self.assertLess(seconds, 30)  # five are given, on a machine with no load
    self.assertNotEqual(group[1 - victim].returncode, 0)
    # Its own line, or that of JAX's C++ when the coordinator is gone.
    self.assertRegex(
      errors[1 - victim], "another process is gone|another task died"
    )

  def test_an_error_of_the_users_is_one_line_on_each(self):
    group = self._start(_UNHAPPY)
    errors, seconds = _ends(group)
    self.assertLess(seconds, 60)
    for i, (process, said) in enumerate(zip(group, errors)):
      self.assertEqual(process.returncode, 1)
      self.assertNotIn("Traceback", said)
      self.assertRegex(said, f"Error.* process {i}.*: seed=. is bad luck")

  def test_a_folder_that_only_one_process_sees_is_refused(self):
    root = pathlib.Path(self.create_tempdir())
    group = self._start(_SHARED, root / "mine", root / "yours")
    errors, _ = _ends(group)
    self.assertEqual([p.returncode for p in group], [1, 1])
    for said in errors:
      self.assertRegex(said, "yours: process 1 does not see .*all hosts share")

  def test_a_shared_folder_is_left_empty(self):
    root = pathlib.Path(self.create_tempdir()) / "new"
    group = self._start(_SHARED, root, root)
    errors, _ = _ends(group)
    self.assertEqual([p.returncode for p in group], [0, 0], errors)
    self.assertEmpty(list(root.iterdir()))


class ConnectedTest(parameterized.TestCase):
  def test_alone_it_leaves_jax_as_it_is(self):
    with mock.patch("jax.distributed.initialize") as initialize:
      with hosts.connected(None):
        self.assertEqual(jax.process_count(), 1)
      with (
        self.assertRaisesRegex(KeyError, "mine"),
        hosts.connected(None),
        hosts.failing_together(),
      ):
        raise KeyError("mine")
    initialize.assert_not_called()

  def test_a_tpu_that_names_no_other_host_is_alone(self):
    error = ValueError("coordinator_address should be defined.")
    said = io.StringIO()
    with (
      mock.patch("jax.distributed.initialize", side_effect=error) as initialize,
      mock.patch("jax.distributed.shutdown") as shutdown,
      contextlib.redirect_stderr(said),
      hosts.connected(launchers.detect({}, on_tpu=True)),
    ):
      pass
    self.assertIsNone(initialize.call_args.kwargs["cluster_detection_method"])
    shutdown.assert_not_called()
    self.assertIn("taken for the only one", said.getvalue())

  @parameterized.parameters("connect_timeout_s", "heartbeat_timeout_s")
  def test_times_are_positive(self, name):
    message = f"{name}=0 must be at least 1"
    with (
      self.assertRaisesRegex(ValueError, message),
      hosts.connected(None, **{name: 0}),
    ):
      pass


class OtherRunsTest(_Runs):
  def test_a_process_with_another_config_ends_both_and_says_why(self):
    port = processes.free_port()
    group = [
      processes.start(
        self.config_of(seed=3 + i),
        self.root / "two",
        **processes.place(port, 2, i),
      )
      for i in range(2)
    ]
    errors, _ = _ends(group)
    self.assertEqual([p.returncode for p in group], [1, 1])
    reason = "process 1 differs from process 0 .*seed: 4 here, 3 on process 0"
    self.assertRegex(errors[1], f"Error on process 1: config: {reason}")
    self.assertRegex(
      errors[0], f"Error: process 1 failed, so process 0 ends too: .*{reason}"
    )
    self.assertFalse((self.root / "two" / "checkpoints").exists())


# Within one process: tests/optim/onebit_elastic_test.py.
@pytest.mark.slow
class ElasticTest(_Runs):
  def test_order_of_data_and_errors_stay(self):
    config = self.config_of(
      optim=dict(name="onebit_adam", learning_rate=1e-2, freeze_step=2),
      evals=dict(),
      horizon=9,
    )
    workdir = self.root / "moved"
    for count, steps in zip((4, 2, 4), (3, 6, 9)):
      now = config | dict(stop=dict(steps=steps))
      _finish(processes.start_together(now, workdir, count, UNREPORTED="1"))
    seen = [row for i in range(4) for row in processes.held_rows(workdir, i)]
    built = experiment.build(settings(config), devices=jax.devices()[:2])
    self.assertCountEqual(seen, noted.expected_rows(built.data, 9))
    for step in (3, 6):
      before, after = noted.debts(workdir, step)
      self.assertGreater(max(np.abs(x).max() for x in before), 1e-3)
      for old, new in zip(before, after):
        np.testing.assert_allclose(old, new, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
  absltest.main()
