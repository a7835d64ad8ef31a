"""Experiments run, as their tiny variants, and have committed their results."""

import importlib
import json
import os
import pathlib
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from bertjax import train
from experiments import outcome, report

pytestmark = pytest.mark.usefixtures("one_device")

_FOLDER = pathlib.Path(report.__file__).parent
_NAMES = [path.name for path in report.experiments(_FOLDER)]

# `full_scale_test.py` runs their loops and reports without training and without
# compiling for TPUs. "scaling" and "training_step" do compile for them;
# `scaling_test.py`, `training_step_test.py` and `plan_test.py` see their parts.
_LONG = (
  "bert",
  "flash_attention",
  "lamb",
  "mkor",
  "onebit_adam",
  "point_bert",
  "scaling",
  "training_step",
)


def module(name):
  return importlib.import_module(f"experiments.{name}.run")


class ExperimentsTest(parameterized.TestCase):
  @parameterized.parameters(name for name in _NAMES if name not in _LONG)
  def test_tiny_variant_runs_once_and_is_then_remembered(self, name):
    self._assert_remembered(name)

  @parameterized.parameters(_LONG)
  @pytest.mark.slow
  def test_long_tiny_variant_runs_once_and_is_then_remembered(self, name):
    self._assert_remembered(name)

  def _assert_remembered(self, name):
    folder = pathlib.Path(self.create_tempdir())
    cache = {"BERTJAX_CACHE": str(folder / "cache")}
    with mock.patch.dict(os.environ, cache):
      found = module(name).run(folder / "runs", "tiny")
      with mock.patch.object(train, "train", side_effect=AssertionError):
        again = module(name).run(folder / "runs", "tiny")
    self.assertEqual(found.rows, again.rows)
    self.assertEqual(
      [c.row() for c in found.claims], [c.row() for c in again.claims]
    )
    outcome.save(found, folder / "results")
    result = json.loads((folder / "results" / outcome.RESULT).read_text())
    for claim in result["claims"]:
      self.assertIn(claim["verdict"], outcome.VERDICTS)

  @parameterized.parameters(_NAMES)
  def test_readme_shows_the_committed_result(self, name):
    readme = (_FOLDER / name / "README.md").read_text()
    result = json.loads((_FOLDER / name / outcome.RESULT).read_text())
    self.assertIn(f"python -m experiments.{name}.run", readme)
    for claim in result["claims"]:
      self.assertIn(f"| {claim['measured']} | {claim['verdict']} |", readme)
    for file in ("results.csv", "results.png"):
      self.assertTrue((_FOLDER / name / file).exists(), file)
    self.assertIn("(results.png)", readme)

  @parameterized.parameters(_NAMES)
  def test_an_unknown_variant_is_refused(self, name):
    with self.assertRaisesRegex(ValueError, "variant='huge' is unknown.*tiny"):
      module(name).run(pathlib.Path(self.create_tempdir()), "huge")


if __name__ == "__main__":
  absltest.main()
