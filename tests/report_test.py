"""The report tells a healthy run from a stuck one."""

import contextlib
import io
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from bertjax import checkpoint, report
from bertjax.metrics import writers
from experiments import report as experiments_report

ROOT = pathlib.Path(__file__).parents[1]
HEALTHY = {
  "masking_rate": 0.148,
  "mask_share": 0.801,
  "random_share": 0.099,
  "keep_share": 0.1,
  "selected": 50_000,
  "duplicate_share": 0.01,
  "label_weight_min": 300,
  "label_weight_mean": 320,
  "initial_loss": math.log(4000),
  "clip_norm": 1.0,
  "baselines": {"unigram_accuracy": 0.06, "unigram_loss": 6.1},
}


def curve(step):
  return 3 + (math.log(4000) - 3) * math.exp(-step / 200)


def write_run(workdir, loss=curve, grad_norm=0.7):
  writer = writers.CsvWriter(workdir / "metrics.csv")
  for step in range(10, 310, 10):
    values = {
      "loss": loss(step),
      "accuracy": step / 1000,
      "learning_rate": 1e-3,
      "grad_norm": grad_norm,
      "tokens_per_s": 5e4 + step,
      "mfu": 0.3,
    }
    if step % 100 == 0:
      values |= {"heldout/loss": loss(step), "heldout/accuracy": 0.2}
    writer.write(step, values)
  writer.close()


class ReportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.workdir, ignore_errors=True)

  def write(self, health, **kwargs):
    (self.workdir / "health.json").write_text(json.dumps(health))
    return report.write_report(self.workdir, **kwargs).read_text()

  def reference(self):
    path = self.workdir / "reference.csv"
    writer = writers.CsvWriter(path)
    for step in range(0, 400, 25):
      writer.write(step, {"loss": curve(step)})
    writer.close()
    return path

  def test_healthy_run(self):
    write_run(self.workdir)
    (self.workdir / "config.json").write_text('{"seed": 17}')
    text = self.write(
      HEALTHY,
      reference=self.reference(),
      samples=[("a [MASK] | b", "a cat | b"), ("a\nb", "c\r\nd")],
    )
    self.assertNotIn("warn", text)
    self.assertIn("All 13 checks are ok.", text)
    self.assertIn("unigram_accuracy (baseline) | 0.06", text)
    self.assertIn(r"| a [MASK] \| b | a cat \| b |", text)
    self.assertIn("| a<br>b | c<br>d |", text)
    self.assertIn('"seed": 17', text)
    folder = self.workdir / "report"
    self.assertEqual(
      (folder / "metrics.csv").read_bytes(),
      (self.workdir / "metrics.csv").read_bytes(),
    )
    from matplotlib import image

    pixels = image.imread(folder / "curves.png")
    self.assertEqual(pixels.shape[:2], (700, 1200))
    self.assertGreater(np.unique(pixels.reshape(-1, 4), axis=0).shape[0], 50)

  @parameterized.parameters(
    ({"masking_rate": 0.05}, "masking rate"),
    ({"mask_share": 1.0}, "share of mask"),
    ({"random_share": 0.0}, "share of random"),
    ({"duplicate_share": 0.4}, "duplicates"),
    ({"truncated_share": 0.3}, "rows that were cut"),
    ({"unlabelled_share": 0.2}, "rows without label"),
    ({"class_shares": {"no": 1.0, "yes": 0.0}}, "class shares"),
    ({"label_weight_min": 0}, "least label weight"),
    ({"initial_loss": 16.1}, "first loss"),
    ({"clip_norm": 0.1}, "norm above 0.1"),
  )
  def test_one_bad_value_gives_one_warning(self, change, name):
    write_run(self.workdir)
    with mock.patch.object(report, "_plot"):
      text = self.write({**HEALTHY, **change})
    self.assertEqual(text.count("**warn**"), 1)
    line = next(x for x in text.splitlines() if "**warn**" in x)
    self.assertIn(name, line)

  @parameterized.named_parameters(
    ("stuck", lambda s: math.log(4000) + s / 1e5, "loss slope"),
    ("slow", lambda s: curve(s / 4), "loss against the reference"),
  )
  def test_bad_curve_warns(self, loss, name):
    write_run(self.workdir, loss=loss)
    text = self.write(HEALTHY, reference=self.reference())
    warned = [x for x in text.splitlines() if "**warn**" in x]
    self.assertTrue(any(name in x for x in warned), warned)

  def test_a_run_from_a_trained_model_may_begin_below_guessing(self):
    write_run(self.workdir, loss=lambda step: curve(step + 400))
    self.assertRegex(self.write(HEALTHY), "first loss.*warn")
    (self.workdir / "config.json").write_text('{"init_from": {"path": "x"}}')
    text = self.write(HEALTHY)
    self.assertRegex(text, r"first loss .*at most 9\.12 \| ok")

  def test_dead_gradient_warns(self):
    write_run(self.workdir, grad_norm=0.0)
    text = self.write(HEALTHY)
    self.assertRegex(text, r"gradient norm, median \| 0 .*warn")

  def test_a_report_made_again_keeps_samples_and_reference(self):
    write_run(self.workdir)
    config = {"reference_curve": str(self.reference())}
    (self.workdir / "config.json").write_text(json.dumps(config))
    first = self.write(HEALTHY, samples=[("a [MASK]", "a cat")])
    self.assertIn("| a [MASK] | a cat |", first)
    self.assertIn("loss against the reference", first)
    with contextlib.redirect_stdout(io.StringIO()):
      report.main([str(self.workdir)])
    path = self.workdir / "report" / "report.md"
    self.assertEqual(path.read_text(), first)
    # Neither an old sample nor a reference stays that is not wanted.
    text = self.write(HEALTHY, samples=[], reference="")
    self.assertNotIn("Samples", text)
    self.assertNotIn("against the reference", text)
    self.assertNotIn("Samples", self.write(HEALTHY))

  def test_of_stages_the_last_is_reported(self):
    write_run(self.workdir)
    (self.workdir / "checkpoints").mkdir()
    whole = pathlib.Path(self.create_tempdir())
    checkpoint.link(whole / checkpoint.LAST, str(self.workdir))
    self.assertEqual(
      report.write_report(whole).resolve(),
      (self.workdir / "report" / "report.md").resolve(),
    )

  @parameterized.parameters(
    (report.main, "Writes WORKDIR/report/"),
    (experiments_report.main, "what all experiments found"),
  )
  def test_help_is_help(self, main, what):
    told = io.StringIO()
    with (
      contextlib.redirect_stdout(told),
      self.assertRaisesRegex(SystemExit, "0"),
    ):
      main(["--help"])
    self.assertIn(what, told.getvalue())

  def test_command_line(self):
    write_run(self.workdir)
    done = subprocess.run(
      [sys.executable, "-m", "bertjax.report", str(self.workdir)],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertTrue(pathlib.Path(done.stdout.strip()).exists())

  def test_a_folder_that_is_no_workdir_is_one_line(self):
    done = subprocess.run(
      [sys.executable, "-m", "bertjax.report", str(self.workdir)],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(
      done.stderr, r"\AError: .*metrics.csv does not exist.*\n\Z"
    )

  def test_missing_metrics_are_named(self):
    with self.assertRaisesRegex(FileNotFoundError, "metrics.csv does not"):
      report.write_report(self.workdir)
    writers.CsvWriter(self.workdir / "metrics.csv").close()
    self.assertFalse(report.has_curves(self.workdir))
    with self.assertRaisesRegex(ValueError, "metrics.csv has no row"):
      report.write_report(self.workdir)
    (self.workdir / "metrics.csv").unlink()
    part = self.workdir / "phase1"
    part.mkdir()
    write_run(part)
    with mock.patch.object(report, "_plot"):
      report.write_report(part)
    with self.assertRaisesRegex(FileNotFoundError, r"of the run: phase1\.$"):
      report.write_report(self.workdir)


if __name__ == "__main__":
  absltest.main()
