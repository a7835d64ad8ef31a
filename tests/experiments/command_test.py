"""The main of experiments: where results go, and how a run ends early."""

import contextlib
import io
import json
import pathlib

import jax
from absl.testing import absltest

from experiments import arms, command
from tests.experiments import outcome_test


class CommandTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir())
    before = jax.config.jax_compilation_cache_dir
    self.addCleanup(jax.config.update, "jax_compilation_cache_dir", before)

  def main(self, run):
    arguments = ["--workdir", str(self.workdir), "--variant", "tiny"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      command.main(run, arguments)
    return out.getvalue()

  def test_a_small_variant_leaves_the_committed_results_alone(self):
    calls = []

    def run(workdir, variant):
      calls.append((workdir, variant))
      return outcome_test.make()

    printed = self.main(run)
    self.assertEqual(calls, [(self.workdir / "tiny", "tiny")])
    result = json.loads((self.workdir / "tiny" / "result.json").read_text())
    self.assertEqual(result["paper"], "A paper")
    self.assertIn("| a beats b | 2x | 1.5 ± 0.1 | reproduced |", printed)
    self.assertFalse((pathlib.Path(__file__).parent / "result.json").exists())

  def test_a_signal_ends_it_without_results(self):
    def run(workdir, variant):
      raise arms.InterruptedRunError("stopped")

    with self.assertRaises(SystemExit) as caught:
      self.main(run)
    self.assertEqual(caught.exception.code, 1)
    self.assertFalse((self.workdir / "tiny" / "result.json").exists())


if __name__ == "__main__":
  absltest.main()
