"""The commands as a user types them."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl.testing import absltest

from tests import processes, tiny

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = """
import pathlib
from bertjax.config import new_config
from tests import tiny
def get_config():
  c = new_config()
  c.update(tiny.small(pathlib.Path({!r})))
  return c
"""


def _run(*arguments, **environment):
  # A user's shell does not say where compiled programs are kept.
  shell = {
    k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"
  }
  return subprocess.run(
    [sys.executable, "-m", *arguments],
    cwd=_ROOT,
    env=shell | {"JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
    check=False,
  )


class CommandsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cache = {"BERTJAX_CACHE": str(cls.root / "cache")}
    cls.enterClassContext(mock.patch.dict(os.environ, cache))
    tiny.write_corpus(cls.root)
    cls.config = cls.root / "config.py"
    cls.config.write_text(_CONFIG.format(str(cls.root)))
    cls.workdir = cls.root / "run"
    cls.trained = _run(
      "bertjax.train", f"--config={cls.config}", f"--workdir={cls.workdir}"
    )

  def test_train_prints_lines_and_results_without_noise(self):
    self.assertEqual(self.trained.returncode, 0, self.trained.stderr)
    self.assertIn("heldout/unigram_accuracy", self.trained.stdout)
    self.assertIn("report.md", self.trained.stdout)
    self.assertIn("Stopped at step 6: 6 steps are done.", self.trained.stderr)
    self.assertNotIn("orbax", self.trained.stderr)

  def test_train_keeps_what_it_compiled(self):
    kept = (self.root / "cache" / "compiled").rglob("*")
    self.assertNotEmpty([path for path in kept if path.is_file()])

  def test_evaluate_and_predict_use_the_workdir(self):
    done = _run(
      "bertjax.evaluate",
      f"--model={self.workdir}",
      "--split=validation",
      "--num_rows=2",
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    for name in ("unigram_accuracy", "mlm_accuracy", "pseudo_perplexity"):
      self.assertRegex(done.stdout, rf"{name}\s+[\d.]+")
    self.assertRegex(
      done.stderr,
      rf"Evaluating {self.workdir} on text_files, split 'validation', \d+ rows"
      r" of seq_len=\d+, of which pseudo_perplexity reads 2\.\n",
    )
    done = _run(
      "bertjax.predict",
      "fill_mask",
      f"--model={self.workdir}",
      "--text=the [MASK] of room 3 sails every day .",
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn("of room 3 sails every day .", done.stdout)

  def test_an_unknown_key_is_refused_with_a_suggestion(self):
    done = _run(
      "bertjax.train",
      f"--config={self.config}",
      "--config.sede=3",
      "--dry_run",
    )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, "Error: sede is not .* Did you mean 'seed'")

  def test_an_override_in_a_group_that_nobody_knows_is_one_line(self):
    done = _run(
      "bertjax.train",
      f"--config={self.config}",
      "--config.modle.size=base",
      "--dry_run",
    )
    self.assertEqual(done.returncode, 1)
    self.assertNotIn("Traceback", done.stderr)
    self.assertRegex(done.stderr, "Error: modle is not .* Did you mean 'model'")

  def test_a_flag_sets_what_the_config_leaves_at_its_default(self):
    done = _run(
      "bertjax.train",
      f"--config={self.config}",
      "--config.mesh.model=3",
      "--dry_run",
    )
    self.assertEqual(done.returncode, 1)
    self.assertIn("mesh: data=-1, fsdp=1, model=3, seq=1", done.stderr)

  def test_an_error_is_one_line(self):
    done = _run(
      "bertjax.train",
      f"--config={self.config}",
      "--config.optim.name=lamp",
      "--dry_run",
    )
    self.assertEqual(done.returncode, 1)
    self.assertNotIn("Traceback", done.stderr)
    self.assertRegex(done.stderr, "Error: optim.name='lamp' is unknown")

  def test_a_coordinator_that_does_not_answer_is_one_line(self):
    begin = time.monotonic()
    done = _run(
      "bertjax.train",
      f"--config={self.config}",
      f"--workdir={self.root / 'alone'}",
      f"--coordinator_address=localhost:{processes.free_port()}",
      "--num_processes=2",
      "--process_id=1",
      "--connect_timeout_s=1",
    )
    self.assertEqual(done.returncode, 1)
    self.assertNotIn("Traceback", done.stderr)
    self.assertRegex(
      done.stderr, "Error: coordinator_address=.*process 0 did not answer"
    )
    self.assertLess(time.monotonic() - begin, 60)

  def test_imports_are_light(self):
    program = (
      "import bertjax, bertjax.train, sys; "
      "print([m for m in ('tensorflow', 'torch', 'transformers', 'seqio',"
      " 'matplotlib', 'sklearn', 'scipy.spatial') if m in sys.modules])"
    )
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertEqual(done.stdout.strip(), "[]")


if __name__ == "__main__":
  absltest.main()
