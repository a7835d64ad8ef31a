"""What the benchmarks feed to both sides holds the same tokens."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import unittest
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import __main__ as command
from benchmarks import bert_base, compiling, history, points, ragged, step


class RaggedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    lengths = (20, 31, 17, 9, 30, 25, 3, 11)
    self.texts = [rng.integers(5, 99, length) for length in lengths]

  def test_rows_hold_whole_documents_once(self):
    batch = ragged.packed(self.texts, 32)
    ids, positions = batch["segment_ids"], batch["positions"]
    found = []
    for row, number in {(r, n) for r in range(len(ids)) for n in ids[r]}:
      if number:
        here = ids[row] == number
        found.append(tuple(batch["tokens"][row, here]))
        np.testing.assert_array_equal(positions[row, here], range(here.sum()))
    self.assertCountEqual(found, [tuple(text) for text in self.texts])

  def test_masked_positions_are_of_real_tokens(self):
    batch = ragged.packed(self.texts, 32)
    there = np.take_along_axis(batch["tokens"], batch["masked_positions"], 1)
    used = batch["labels"] > 0
    self.assertGreater(used.sum(), 0.1 * sum(map(len, self.texts)))
    np.testing.assert_array_equal(there[used], batch["labels"][used])

  def test_parts_hold_all_rows(self):
    batch = ragged.packed(self.texts, 32)
    parts = ragged.split(batch, 3)
    self.assertLen({part["tokens"].shape for part in parts}, 1)
    rows = np.concatenate([part["tokens"] for part in parts])
    count = len(batch["tokens"])
    np.testing.assert_array_equal(rows[:count], batch["tokens"])
    self.assertEqual(rows[count:].sum(), 0)

  def test_padded_batches_hold_the_same_tokens(self):
    real = 0
    for tokens, mask, labels in ragged.padded(self.texts, 3):
      self.assertEqual((tokens * (1 - mask)).sum(), 0)
      self.assertTrue(((labels == -100) | (labels == tokens)).all())
      real += mask.sum()
    self.assertEqual(real, sum(map(len, self.texts)))


class StepTest(absltest.TestCase):
  def test_both_sides_get_as_many_tokens_and_labels(self):
    mine, (tokens, mask, labels) = step._batch(), step._padded()
    self.assertEqual(mine["tokens"].shape, (8, 128))
    self.assertEqual(tokens.shape, (8, 128))
    self.assertTrue((mine["segment_ids"] == 1).all() and (mask == 1).all())
    self.assertEqual(mine["labels"].size, 8 * 20)
    self.assertEqual((labels != -100).sum(), 8 * 20)


class CompareTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.now = 0.0
    clock = mock.patch.object(time, "perf_counter", lambda: self.now)
    self.enterContext(clock)

  def taking(self, *seconds):
    left = list(seconds)

    def call():
      self.now += left.pop(0)

    return call

  def test_medians_and_ends_of_the_rounds_after_the_first(self):
    found = bert_base.compare(
      12, self.taking(99, 2, 4, 3), self.taking(99, 8, 4, 3), 3, threads=2
    )
    self.assertEqual(found["bertjax_tokens_per_s"], 4)
    self.assertEqual(found["pytorch_tokens_per_s"], 3)
    # 8 / 2, 4 / 4 and 3 / 3: rounds are compared with themselves.
    self.assertEqual(found["ratio"], 1)
    self.assertEqual((found["ratio_least"], found["ratio_most"]), (1, 4))

  def test_the_spread_is_printed(self):
    found = bert_base.compare(
      12, self.taking(1, 1, 1), self.taking(1, 1, 2), 2, threads=2
    )
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      bert_base.show("train", found)
    self.assertIn("ratio 1.50 (1.00 to 2.00 in 2 rounds)", out.getvalue())


class ThreadsTest(parameterized.TestCase):
  """PyTorch has as many as this process has cores, and that is recorded."""

  def setUp(self):
    super().setUp()
    self.calls = (lambda: None, lambda: None)
    self.enterContext(
      mock.patch.object(
        os, "sched_getaffinity", return_value={1, 2, 5}, create=True
      )
    )
    self.enterContext(contextlib.redirect_stdout(io.StringIO()))

  @parameterized.parameters(step, ragged)
  def test_of_bert(self, part):
    texts = [np.arange(30)] * ragged.ROWS
    with (
      mock.patch.object(ragged, "documents", return_value=texts),
      mock.patch.object(bert_base, "ours", return_value=self.calls),
      mock.patch.object(bert_base, "fastest_dtype", return_value="float32"),
      mock.patch.object(bert_base, "theirs", return_value=self.calls) as theirs,
    ):
      found = part.measure(1)
    self.assertEqual({call.args[1] for call in theirs.call_args_list}, {3})
    self.assertEqual({row["threads"] for row in found.values()}, {3})

  def test_of_points(self):
    with (
      mock.patch.object(points, "_ours", return_value=self.calls),
      mock.patch.object(points, "_theirs", return_value=self.calls) as theirs,
    ):
      found = points.measure(1)
    self.assertEqual(theirs.call_args.args[2], 3)
    self.assertEqual(found["threads"], 3)


class DtypeTest(absltest.TestCase):
  def test_the_one_with_the_shortest_time_is_taken(self):
    for times, best in (
      ({"bfloat16": [9.0, 2.0], "float32": [3.0, 4.0]}, "bfloat16"),
      ({"bfloat16": [9.0, 5.0], "float32": [9.0, 4.0]}, "float32"),
    ):
      taken = iter([(times[dtype], []) for dtype in bert_base.PASSES])
      with mock.patch.object(
        bert_base, "alternate", lambda *_, taken=taken, **__: next(taken)
      ):
        self.assertEqual(bert_base.fastest_dtype(threads=1), best)


class CompilingTest(absltest.TestCase):
  def test_a_process_that_fails_says_why(self):
    done = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: x\n")
    with (
      mock.patch.object(subprocess, "run", return_value=done),
      self.assertRaisesRegex(RuntimeError, "with 1:\nTraceback\nMemoryError"),
    ):
      compiling.measure()


class HistoryTest(absltest.TestCase):
  def test_a_line_has_the_passes_that_this_machine_runs(self):
    for passes in bert_base.PASSES.values():
      measured = {name: {"ratio": 2.0, "rounds": 3} for name in passes}
      found = history.headlines("step", measured)
      self.assertEqual(found, {f"{name}/ratio": 2.0 for name in passes})

  def test_a_part_without_any_headline_is_refused(self):
    with self.assertRaisesRegex(ValueError, "step wrote .'else'.*train/ratio"):
      history.headlines("step", {"else": {"ratio": 1.0}})

  def test_runs_are_appended_and_shown_by_commit(self):
    path = pathlib.Path(self.create_tempdir()) / "history.jsonl"
    self.assertEqual(history.read(path), [])
    history.append(path, {"step": {"train/ratio": 1.25}}, "a1b2", "day 1")
    history.append(
      path,
      {"step": {"train/ratio": 1.5}, "compiling": {"first_s": 20.0}},
      "c3d4",
      "day 2",
    )
    self.assertLen(path.read_text().splitlines(), 2)
    table = history.table(history.read(path))
    self.assertEqual([row["commit"] for row in table], ["a1b2", "c3d4"])
    self.assertEqual(
      [row["training, of PyTorch"] for row in table], ["1.25", "1.5"]
    )
    compiled = [row["BERT-large compiled, s"] for row in table]
    self.assertEqual(compiled, ["", "20"])
    cores = f"{history.cores()} x {history.processor()}"
    self.assertEqual(table[0]["cores"], cores)

  def test_what_is_measured_no_more_stays_visible(self):
    line = dict(commit="x", date="y", cores=3, found={"gone": {"a/b": 6.5e6}})
    (row,) = history.table([line])
    self.assertEqual(row["gone a/b"], "6,500,000")
    self.assertEqual(row["cores"], "3")

  def test_the_processor_is_named(self):
    path = pathlib.Path(self.create_tempdir()) / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Abacus 12\n")
    self.assertEqual(history.processor(path), "Abacus 12")

  def test_a_line_that_no_run_wrote_is_named(self):
    path = pathlib.Path(self.create_tempdir()) / "history.jsonl"
    path.write_text(json.dumps({"commit": "x"}) + "\n")
    with self.assertRaisesRegex(ValueError, "history.jsonl, line 1"):
      history.read(path)


class CommandTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root, self.ran = pathlib.Path(self.create_tempdir()), []
    self.enterContext(
      mock.patch.object(history, "PATH", self.root / "history.jsonl")
    )
    self.enterContext(contextlib.redirect_stdout(io.StringIO()))

  def run_parts(self, *arguments, fails=()):
    """The command with parts that measure at once, or fail."""

    def part(arguments, *, check):
      del check
      name = arguments[2].removeprefix("benchmarks.")
      self.ran.append(name)
      if name in fails:
        return subprocess.CompletedProcess(arguments, 1)
      paths = history.HEADLINES[name]
      found: dict = {}
      for number, path in enumerate(paths, 1):
        node, *last = path.split("/")
        value = {last[0]: number} if last else number
        found[node] = value
      output = arguments[3].removeprefix("--json=")
      pathlib.Path(output).write_text(json.dumps(found))
      return subprocess.CompletedProcess(arguments, 0)

    argv = ["benchmarks", *arguments]
    with (
      mock.patch.object(sys, "argv", argv),
      mock.patch.object(
        command, "_commit", lambda: "late" if self.ran else "c0ffee"
      ),
      mock.patch.object(subprocess, "run", part),
    ):
      command.main()

  def test_every_part_has_a_budget_headlines_and_a_module(self):
    self.assertEqual({*command.SECONDS}, {*history.HEADLINES})
    for part in command.SECONDS:
      self.assertIsNotNone(importlib.util.find_spec(f"benchmarks.{part}"))

  def test_the_budget_is_that_of_the_readme(self):
    minutes = round(sum(command.SECONDS.values()) / 60)
    for name in ("README.md", "Makefile"):
      text = (pathlib.Path(__file__).parents[1] / name).read_text()
      self.assertTrue(f"({minutes} min" in text, f"{name}: {minutes} min")

  def test_all_that_was_measured_is_written(self):
    path = self.root / "runs" / "bench.json"
    self.run_parts("tpu", "step", f"--json={path}")
    self.assertEqual([*json.loads(path.read_text())], ["tpu", "step"])
    (line,) = history.read(history.PATH)
    self.assertEqual([*line["found"]], ["tpu", "step"])
    self.assertEqual(line["commit"], "c0ffee")

  def test_a_part_that_fails_takes_nothing_along(self):
    path = self.root / "bench.json"
    told = io.StringIO()
    with (
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "1"),
    ):
      self.run_parts("tpu", "step", f"--json={path}", fails=("step",))
    self.assertRegex(
      told.getvalue(), r"\AError: part='step' ended with code 1.*\n\Z"
    )
    self.assertEqual([*json.loads(path.read_text())], ["tpu"])
    (line,) = history.read(history.PATH)
    self.assertEqual([*line["found"]], ["tpu"])

  def test_an_unknown_part_is_refused_before_anything_runs(self):
    told = io.StringIO()
    with (
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "1"),
    ):
      self.run_parts("reading", "stepp")
    self.assertRegex(
      told.getvalue(), r"\AError: part='stepp' is unknown.*'step'\?\n\Z"
    )
    self.assertFalse(history.PATH.exists())

  def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(self):
    told = io.StringIO()
    with (
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "2"),
    ):
      self.run_parts("tpu", f"--json={self.root}")
    self.assertIn(f"--json={self.root} is a folder", told.getvalue())
    self.assertEmpty(self.ran)

  @parameterized.parameters(*command.SECONDS)
  def test_a_part_refuses_such_a_file_as_well(self, name):
    part = importlib.import_module(f"benchmarks.{name}")
    told = io.StringIO()
    with (
      mock.patch.object(sys, "argv", [name, f"--json={self.root}"]),
      mock.patch.object(part, "measure") as measure,
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "2"),
    ):
      part.main()
    self.assertIn(f"--json={self.root} is a folder", told.getvalue())
    measure.assert_not_called()

  @unittest.skipUnless(shutil.which("git"), "git is not installed")
  def test_only_other_files_than_the_history_make_a_commit_unclean(self):
    def git(*arguments):
      who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
      subprocess.run(["git", *who, *arguments], cwd=self.root, check=True)

    history.PATH = self.root / "benchmarks" / "history.jsonl"
    history.PATH.parent.mkdir()
    other = self.root / "code.py"
    for path in (history.PATH, other):
      path.write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=x")
    commit = command._commit()
    self.assertRegex(commit, r"\A[0-9a-f]+\Z")
    history.PATH.write_text("2\n")
    self.assertEqual(command._commit(), commit)
    other.write_text("2\n")
    self.assertEqual(command._commit(), f"{commit}+")


if __name__ == "__main__":
  absltest.main()
