"""The report has a row for every claim of every experiment."""

import contextlib
import io
import json
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest

from benchmarks import history
from experiments import outcome, report
from tests.experiments import outcome_test

_ROOT = pathlib.Path(__file__).parents[2]


class ReportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir())

  def experiment(self, name):
    folder = self.folder / name
    folder.mkdir()
    (folder / "run.py").touch()
    return folder

  def test_claims_of_all_experiments_by_name(self):
    outcome.save(outcome_test.make(paper="B"), self.experiment("b_paper"))
    outcome.save(outcome_test.make(paper="A"), self.experiment("a_paper"))
    self.experiment("c_paper")
    (self.folder / "no_experiment").mkdir()
    rows = report.rows(self.folder)
    self.assertEqual(
      [(r["experiment"], r["verdict"]) for r in rows],
      [
        ("a_paper", "reproduced"),
        ("a_paper", "not"),
        ("b_paper", "reproduced"),
        ("b_paper", "not"),
        ("c_paper", "not run yet"),
      ],
    )
    self.assertEqual([r.get("minutes") for r in rows[:2]], ["3", ""])
    self.assertIn(
      "Claims: 2 reproduced, 0 partly, 2 not.", report.report(self.folder)
    )

  def test_a_damaged_result_is_named(self):
    folder = self.experiment("a_paper")
    (folder / "result.json").write_text(json.dumps({"paper": "A"}))
    with self.assertRaisesRegex(ValueError, "a_paper.*experiments.a_paper.run"):
      report.report(self.folder)

  def test_no_experiment_is_an_error(self):
    told = io.StringIO()
    with (
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "1"),
    ):
      report.main([str(self.folder)])
    self.assertRegex(told.getvalue(), r"\AError: .* holds no experiment .*\n\Z")

  def test_the_command_prints_what_is_committed(self):
    done = subprocess.run(
      [sys.executable, "-m", "experiments.report"],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertRegex(done.stdout, r"\| bert \| .*1810\.04805")
    # The benchmarks' history, a row a commit.
    _, _, speed = done.stdout.partition("Speed by commit")
    lines = history.read()
    rows = re.findall(r"(?m)^\| (\w+\+?) \| \d{4}-\d\d-\d\d \| \d", speed)
    self.assertEqual(rows, [line["commit"] for line in lines])
    self.assertIn("training, of PyTorch", speed)


if __name__ == "__main__":
  absltest.main()
