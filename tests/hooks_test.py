"""When hooks run, what they leave behind, and why a run stops."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from bertjax import checkpoint, hooks, session, stopping

ROOT = pathlib.Path(__file__).parents[1]
_NAN = float("nan")


def temporary(test):
  path = pathlib.Path(tempfile.mkdtemp())
  test.addCleanup(shutil.rmtree, path, ignore_errors=True)
  return path


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


class WhenTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("every", lambda: hooks.Every(3), [3, 6, 9]),
    ("at_steps", lambda: hooks.AtSteps((0, 7)), [0, 7]),
    ("once", lambda: hooks.Once(4), [4]),
    (
      "any_of",
      lambda: hooks.AnyOf(hooks.Every(4), hooks.AtSteps((1,))),
      [1, 4, 8],
    ),
  )
  def test_steps(self, make, expected):
    when = make()
    self.assertEqual([s for s in range(11) if when(s)], expected)

  def test_once_is_due_after_a_resume_beyond_its_step(self):
    when = hooks.Once(4)
    self.assertEqual([s for s in range(6, 11) if when(s)], [6])

  def test_bad_intervals_are_refused(self):
    with self.assertRaisesRegex(ValueError, r"Every\(0\)"):
      hooks.Every(0)


class HookTest(absltest.TestCase):
  def test_values_by_class_are_written_and_not_shown(self):
    run = mock.MagicMock(_history={})
    found = {"loss": 2.0, "loss/cup": 1.5}
    evaluation = session.Session._evaluation(
      run, "a/b", 3, lambda variables, key: found
    )
    evaluation.run(3, mock.MagicMock(key=jax.random.key(0), extra={}))
    written = {"a/b/loss": 2.0, "a/b/loss/cup": 1.5}
    self.assertEqual(run._history, {3: written})
    run._writer.write.assert_called_once_with(3, written)
    run._bar.note.assert_called_once_with("step 3  a/b/loss 2")

  def test_evaluation_writes_under_its_prefix_when_due(self):
    written = []
    hook = hooks.EvaluationHook(
      hooks.Every(2),
      lambda step, state: {"loss": jnp.float32(state + step)},
      lambda step, values: written.append((step, values)),
      prefix="heldout/",
    )
    for step in range(5):
      hook(step, 10)
    self.assertEqual(
      written, [(2, {"heldout/loss": 12.0}), (4, {"heldout/loss": 14.0})]
    )
    self.assertEqual(hook.latest, {"heldout/loss": 14.0})
    hook.run(4, 10)  # the end of the run, at a step that was evaluated
    self.assertLen(written, 2)
    hook.run(5, 10)
    self.assertLen(written, 3)

  def test_checkpoint_holds_state_and_iterator_of_the_same_moment(self):
    workdir = temporary(self)
    position = {"next": 0}
    hook = hooks.CheckpointHook(
      hooks.Every(3),
      checkpoint.Checkpointer(workdir, keep=5),
      iterator_state=lambda: position,
      config={"seed": 1},
    )
    state = {"params": {"w": jnp.zeros(3)}}
    for step in range(8):
      hook(step, state)
      state = jax.tree.map(lambda x: x + 1, state)
      position["next"] += 1
    hook.save(8, state)
    hook.close()
    with checkpoint.Checkpointer(workdir) as reader:
      self.assertEqual(reader.steps(), (3, 6, 8))
      for step in reader.steps():
        restored = reader.restore(state, step)
        self.assertEqual(restored.iterator_state, {"next": step})
        self.assertEqual(restored.state["params"]["w"].tolist(), [step] * 3)

  def test_saving_is_a_pause(self):
    inside = []

    @contextlib.contextmanager
    def pause():
      inside.append("begin")
      yield
      inside.append("end")

    checkpointer = mock.Mock()
    checkpointer.save.side_effect = lambda *_, **__: inside.append("save")
    hook = hooks.CheckpointHook(
      hooks.Every(2),
      checkpointer,
      iterator_state=dict,
      config={},
      before=lambda: inside.append("before"),
      pause=pause,
    )
    for step in range(3):
      hook(step, None)
    self.assertEqual(inside, ["before", "begin", "save", "end"])

  def test_state_that_is_not_worth_saving_is_not_saved(self):
    workdir = temporary(self)

    def refuse():
      raise FloatingPointError("loss is nan")

    hook = hooks.CheckpointHook(
      hooks.Every(1),
      checkpoint.Checkpointer(workdir),
      iterator_state=dict,
      config={},
      before=refuse,
    )
    with self.assertRaisesRegex(FloatingPointError, "loss is nan"):
      hook(1, {"params": {"w": jnp.zeros(3)}})
    hook.close()
    self.assertIsNone(checkpoint.Checkpointer(workdir).latest_step())

  def test_profiler_writes_a_trace_also_when_the_run_ends_inside(self):
    for last in (6, 3):
      logdir = temporary(self)
      hook = hooks.ProfilerHook(logdir, 2, 4)
      x = jnp.ones(3)
      for step in range(last):
        hook(step, x)
        self.assertEqual(hook._tracing, 2 <= step < 4)
        x = x + 1
      hook.close()
      self.assertNotEmpty(list(logdir.rglob("*.xplane.pb")))
    with self.assertRaisesRegex(ValueError, "start=4, stop=4"):
      hooks.ProfilerHook(logdir, 4, 4)


class StopTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("steps", (20, 0, 0, {}), "20 steps are done"),
    ("tokens", (0, 5000, 0, {}), "5,000 tokens"),
    ("wall_clock", (0, 0, 61.0, {}), "61 s of 60 s"),
    ("target", (0, 0, 0, {"eval/acc": 0.72}), "eval/acc = 0.72 reached"),
    ("none", (19, 4999, 59.0, {"eval/acc": 0.719, "acc": 0.9}), None),
  )
  def test_reason(self, arguments, reason):
    stop = stopping.build_stop(
      {
        "steps": 20,
        "tokens": 5e3,
        "wall_clock_s": 60,
        "target": {"metric": "eval/acc", "value": 0.72},
      }
    )
    found = stop(*arguments)
    if reason is None:
      self.assertIsNone(found)
    else:
      self.assertIn(reason, found)

  def test_a_target_that_nothing_reports_is_refused(self):
    def spec(metric):
      return {"steps": 9, "target": {"metric": metric, "value": 0.7}}

    evals = {"heldout": {"every": 5}, "final": {"every": 0}, "last": {}}
    for name, message in (
      ("heldot/accuracy", "evals='heldot' is unknown.*Did you mean 'heldout'"),
      ("final/accuracy", "evals.final.every must be set: stop.target.metric="),
      ("last/accuracy", "evals.last.every must be set"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        stopping.build_stop(spec(name), evals)
    stopping.build_stop(spec("loss"), evals)  # a training metric
    stop = stopping.build_stop(spec("heldout/acuracy"), evals)
    self.assertIsNone(stop(1, 0, 0, {"loss": 2.0}))  # not evaluated yet
    with self.assertRaisesRegex(
      ValueError, "'heldout/acuracy' is not reported; choose from heldout/acc"
    ):
      stop(5, 0, 0, {"loss": 2.0, "heldout/accuracy": 0.5})

  def test_a_metric_may_have_a_slash_of_its_own(self):
    evals = {"t": {"every": 5}, "t/far": {"every": 7}}

    def stop(metric):
      target = {"metric": metric, "value": 0.7}
      return stopping.build_stop({"steps": 9, "target": target}, evals)

    self.assertIn("reached", stop("t/l1/chair")(5, 0, 0, {"t/l1/chair": 0.8}))
    # What another one says, whose name begins alike, is no answer.
    self.assertIsNone(stop("t/far/l1")(5, 0, 0, {"t/l1": 0.8}))
    with self.assertRaisesRegex(
      ValueError, "'t/l1/chiar' is not reported; choose from t/l1, t/l1/chair."
    ):
      found = {"t/l1": 0.8, "t/l1/chair": 0.8, "t/far/l1": 0.8}
      stop("t/l1/chiar")(5, 0, 0, found)

  def test_target_from_above_and_rules_switched_off(self):
    stop = stopping.build_stop(
      {
        "steps": 20,
        "tokens": None,
        "target": {"metric": "loss", "value": 2.0, "mode": "min"},
      }
    )
    self.assertIsNone(stop(1, 1e12, 0, {"loss": 2.1}))
    self.assertIsNone(stop(1, 1e12, 0, {"loss": float("nan")}))
    self.assertIn("loss = 1.9", stop(1, 0, 0, {"loss": 1.9}))

  @parameterized.named_parameters(
    ("better_each_time", [0.1, 0.2, 0.3, 0.4], 0.0, "max", None),
    ("worse_twice", [0.5, 0.4, 0.45], 0.0, "max", "in 2 .* 0.5 of step 10"),
    ("equal_is_no_better", [0.5, 0.5, 0.5], 0.0, "max", "0.5 of step 10"),
    ("too_little", [0.5, 0.52, 0.53], 0.05, "max", "0.5 of step 10"),
    # Small steps add up: what counts is the distance from the best.
    ("in_small_steps", [0.5, 0.53, 0.56, 0.6], 0.05, "max", None),
    ("down", [0.5, 0.4, 0.45], 0.0, "min", None),
    ("down_and_up", [0.5, 0.4, 0.45, 0.41], 0.0, "min", "0.4 of step 20"),
    ("nothing_yet", [], 0.0, "max", None),
    ("no_number_at_first", [_NAN, 0.3, 0.6], 0.0, "max", None),
    ("no_number_is_no_better", [0.5, _NAN, _NAN], 0.0, "min", "0.5 of step"),
  )
  def test_early_stopping(self, values, min_delta, mode, reason):
    early = dict(metric="dev/f1", patience=2, min_delta=min_delta, mode=mode)
    stop = stopping.build_stop(
      {"steps": 99, "early": early}, {"dev": {"every": 10}}
    )
    history = [(10 * i, {"dev/f1": v}) for i, v in enumerate(values, 1)]
    history.insert(1, (15, {"other/f1": 9.0}))  # another evaluator's
    found = stop(50, 0, 0, {}, history)
    if reason is None:
      self.assertIsNone(found)
    else:
      self.assertRegex(found, f"dev/f1 did not improve .*{reason}")

  def test_a_checkpoint_is_the_best_of_those_with_a_number(self):
    """Steps 10, 20, ...; NaN hides nothing that comes after it."""
    values = [_NAN, 0.5, 0.4, _NAN, 0.6]
    run = mock.Mock(_best="dev/f1")
    run._experiment.settings.keep = {}
    run._experiment.settings.evals = {"dev": {}}
    run._history = {10 * i: {"dev/f1": v} for i, v in enumerate(values, 1)}
    best = [s for s in run._history if session.Session._improved(run, s)]
    self.assertEqual(best, [20, 50])

  def test_early_stopping_without_any_number(self):
    stop = stopping.Early("dev/f1", patience=2)
    history = [(10 * i, {"dev/f1": _NAN}) for i in (1, 2)]
    found = stop(stopping.Progress(20, 0, 0, {}, history, ("dev",)))
    self.assertEqual(found, "dev/f1 was no number in 2 evaluations")

  @parameterized.parameters(
    ({"steps": 1, "early": {"metric": "a/b", "patience": 0}}, "patience=0"),
    (
      {"steps": 1, "early": {"metric": "a/b", "patience": 1, "min_delta": -1}},
      "min_delta=-1 must be a non-negative number",
    ),
    (
      {"steps": 1, "early": {"metric": "loss", "patience": 1}},
      "early.metric='loss' must be of an evaluation",
    ),
    (
      {"steps": 1, "early": {"metric": "dev/b", "patience": 1}},
      "evals.dev.every must be set: stop.early.metric='dev/b'",
    ),
    ({"early": {"metric": "a/b", "patience": 1}}, "sure to end"),
  )
  def test_bad_early_stopping_is_refused(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      stopping.build_stop(spec, {"a": {"every": 1}, "dev": {}})

  @parameterized.parameters(
    ({"step": 3}, "stop='step' is unknown.*'steps'"),
    ({"steps": 0}, "stop.steps=0"),
    ({"tokens": "many"}, "stop.tokens='many'"),
    ({"wall_clock_s": float("nan")}, "stop.wall_clock_s=nan"),
    ({"target": {"metric": "a", "value": 1}}, "sure to end"),
    ({}, "sure to end"),
    (
      {"steps": 1, "target": {"metric": "a", "value": 1, "mode": "up"}},
      "stop.target.mode='up'",
    ),
    ({"steps": 1, "target": {"metric": "a"}}, "stop.target.value is required"),
    (
      {"steps": 1, "target": {"metric": "a", "values": 1}},
      "stop.target.values.*Did you mean 'value'",
    ),
  )
  def test_bad_rules_are_refused(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      stopping.build_stop(spec)

  def test_stopwatch_continues_after_a_resume(self):
    clock = Clock()
    first = hooks.Stopwatch(clock=clock)
    clock.now += 7
    self.assertEqual(first.elapsed_s(), 7)
    clock.now += 1000  # the machine was off
    second = hooks.Stopwatch(clock=clock)
    second.add(7)
    clock.now += 5
    self.assertEqual(second.elapsed_s(), 12)


class PreemptionTest(absltest.TestCase):
  def test_first_signal_is_a_flag_and_handlers_come_back(self):
    before = signal.getsignal(signal.SIGTERM)
    with hooks.PreemptionGuard() as guard:
      self.assertFalse(guard.requested())
      os.kill(os.getpid(), signal.SIGTERM)
      self.assertTrue(guard.requested())
      self.assertEqual(guard.received, "SIGTERM")
    self.assertIs(signal.getsignal(signal.SIGTERM), before)

  def test_second_interrupt_is_immediate(self):
    # A process started in the background inherits SIGINT as ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    self.addCleanup(signal.signal, signal.SIGINT, before)
    with self.assertRaises(KeyboardInterrupt), hooks.PreemptionGuard() as guard:
      os.kill(os.getpid(), signal.SIGINT)
      self.assertTrue(guard.requested())
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(60)
    self.assertIs(signal.getsignal(signal.SIGINT), signal.default_int_handler)

  def test_second_sigterm_ends_the_process(self):
    code = (
      "import os, signal\n"
      "from bertjax import hooks\n"
      "with hooks.PreemptionGuard():\n"
      "  os.kill(os.getpid(), signal.SIGTERM)\n"
      "  print('still here', flush=True)\n"
      "  os.kill(os.getpid(), signal.SIGTERM)\n"
      "  print('too long', flush=True)\n"
    )
    done = subprocess.run(
      [sys.executable, "-c", code],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, -signal.SIGTERM)
    self.assertEqual(done.stdout, "still here\n")

  def test_outside_the_main_thread_it_warns_and_stands_aside(self):
    before = signal.getsignal(signal.SIGTERM)
    logs = []

    def enter():
      with self.assertLogs(level="WARNING") as caught, hooks.PreemptionGuard():
        logs.append(signal.getsignal(signal.SIGTERM))
      logs.extend(caught.output)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    self.assertIs(logs[0], before)
    self.assertIn("main thread", logs[1])


if __name__ == "__main__":
  absltest.main()
