"""Stages of Point-BERT's experiment, and what is said of runs."""

import pathlib

import jax
from absl.testing import absltest, parameterized

from bertjax import experiment
from bertjax.config import settings
from experiments import arms
from experiments.outcome import NOT, PARTLY, REPRODUCED
from experiments.point_bert import findings, stages

_TASK = findings.TASKS[0]


def few_shot(accuracies):
  """Runs of both arms: (seed, fold) -> accuracy pre-trained, from scratch."""
  return [
    arms.Run(
      dict(stage=_TASK.stage, arm=arm, clouds=_TASK.clouds, fold=fold),
      seed,
      {_TASK.metric: value},
      1.0,
      pathlib.Path(),
    )
    for (seed, fold), values in accuracies.items()
    for arm, value in zip((findings.PRETRAINED, findings.SCRATCH), values)
  ]


class StagesTest(parameterized.TestCase):
  @parameterized.parameters(stages.classification, stages.segmentation)
  def test_arms_differ_in_their_start_alone(self, make):
    start = pathlib.Path("pretrained")
    ours, scratch = (
      make("tiny", path, 7, batch_size=3) for path in (start, None)
    )
    self.assertEqual(ours.pop("init_from"), {"path": "pretrained"})
    self.assertIsNone(scratch.pop("init_from"))
    self.assertEqual(scratch["model"].pop("start"), "classifier")
    self.assertEqual(ours, scratch)
    self.assertEqual(ours["stop"], {"steps": 7})
    self.assertEqual(ours["data"]["batch_size"], 3)

  def test_segmentation_is_one(self):
    folder = self.create_tempdir().full_path
    config = stages.segmentation("tiny", None, 2) | {"cache_dir": folder}
    config["data"]["batch_size"] = len(jax.devices())
    built = experiment.build(settings(config))
    self.assertEqual(built.objective.levels, (32, 8))
    self.assertLen(built.objective.class_parts, 12)


class HelpsTest(absltest.TestCase):
  def test_a_fold_may_lose_if_its_seed_gains(self):
    runs = few_shot({(0, 0): (0.5, 0.6), (0, 1): (0.9, 0.5)})
    claim = findings.helps(runs, _TASK)
    self.assertEqual(claim.verdict, REPRODUCED)
    self.assertIn("0.700", claim.measured)
    self.assertIn("0.550", claim.measured)
    self.assertIn("by seed +0.150", claim.measured)

  def test_every_seed_must_gain(self):
    gains, loses = {(0, 0): (0.9, 0.1)}, {(1, 0): (0.5, 0.6)}
    self.assertEqual(
      findings.helps(few_shot(gains | loses), _TASK).verdict, PARTLY
    )
    self.assertEqual(findings.helps(few_shot(loses), _TASK).verdict, NOT)

  def test_runs_of_other_clouds_do_not_count(self):
    runs = few_shot({(0, 0): (0.5, 0.6)})
    others = [
      arms.Run(
        {**run.factors, "clouds": findings.FURNITURE},
        run.seed,
        {_TASK.metric: float(run.factors["arm"] == findings.PRETRAINED)},
        1.0,
        run.workdir,
      )
      for run in runs
    ]
    self.assertEqual(findings.helps(runs + others, _TASK).verdict, NOT)


if __name__ == "__main__":
  absltest.main()
