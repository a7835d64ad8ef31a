"""A tokenizer of points, from a config to codes, through the same commands."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import experiment, train
from bertjax.checkpoint import load_variables
from bertjax.config import merge, plain, settings
from bertjax.convert import convert
from bertjax.evaluate import evaluate
from bertjax.handover import initial_state
from bertjax.loading import load_model
from bertjax.predict import tokenize_points
from tests import optimized
from tests.configs_test import _CONFIGS, _load


def config(**changes):
  path = next(p for p in _CONFIGS if p.stem == "point_bert")
  return merge(plain(_load(path, "tiny")), changes)


def assert_equal_trees(a, b):
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b)
  )


class RunTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cache = {"BERTJAX_CACHE": str(cls.root / "cache")}
    cls.enterClassContext(mock.patch.dict(os.environ, cache))
    # Clouds of another source, of which training knows nothing.
    cls.torus = dict(name="procedural", classes=("torus",), sizes=dict(other=9))
    other = dict(
      name="reconstruction", split="other", data=dict(source=cls.torus)
    )
    cls.config = config(mesh=dict(data=2, fsdp=4), evals=dict(elsewhere=other))
    cls.workdir = cls.root / "run"
    cls.result = train.train(cls.config, cls.workdir)
    cls.model = load_model(cls.workdir)

  def test_a_run_that_was_ended_goes_on_with_its_statistics(self):
    half = merge(self.config, dict(stop=dict(steps=4), horizon=8))
    folder = self.root / "halves"
    train.train(half, folder)
    again = train.train(merge(half, dict(stop=dict(steps=8))), folder)
    for tree in ("params", "extra"):
      assert_equal_trees(
        getattr(again.state, tree), getattr(self.result.state, tree)
      )

  def test_a_model_is_read_with_its_averages(self):
    stats = self.model.extra["batch_stats"]
    self.assertEqual(set(self.model.variables), {"params", "batch_stats"})
    assert_equal_trees(self.result.state.extra["batch_stats"], stats)
    moved = [np.abs(x).max() for x in jax.tree.leaves(stats)]
    self.assertGreater(min(moved), 0)
    variables, _ = load_variables(self.workdir)
    self.assertEqual(set(variables), {"params", "batch_stats"})

  def test_evaluation_by_command_repeats_that_of_training(self):
    values = evaluate(self.workdir, split="test", evaluators=["reconstruction"])
    measured = self.result.metrics
    for name in ("cd_l1", "cd_l2", "f_score", "code_usage", "cd_l2/torus"):
      np.testing.assert_allclose(
        values[name], measured[f"heldout/{name}"], rtol=1e-4
      )

  def test_evaluation_of_clouds_from_elsewhere(self):
    values = evaluate(
      self.workdir,
      split="other",
      source=merge(self.config["data"]["source"], self.torus),
      evaluators=["reconstruction"],
    )
    self.assertEqual(values["cd_l2"], values["cd_l2/torus"])
    for name, value in values.items():
      np.testing.assert_allclose(
        self.result.metrics[f"elsewhere/{name}"], value, rtol=1e-4
      )

  @parameterized.parameters(
    (dict(sauce=1), "data.sauce is not an option.*'source'"),
    (dict(num_points=4), "data.num_points=4 is too few for model.patches"),
  )
  def test_other_data_are_checked(self, data, message):
    other = dict(elsewhere=dict(data=data))
    built = experiment.build(settings(merge(self.config, dict(evals=other))))
    with self.assertRaisesRegex(ValueError, f"evals.elsewhere.data: {message}"):
      built.evaluators()

  def test_points_are_those_of_an_evaluation(self):
    """Of a cluster and a few points far away, farthest points keep the few."""
    rng = np.random.default_rng(0)
    far = rng.normal(size=(20, 3)).astype(np.float32)
    near = rng.normal(scale=1e-3, size=(4000, 3)).astype(np.float32)
    cloud = np.concatenate([near, far])
    self.assertTrue(self.model.config["data"]["farthest"])
    (tokens,) = tokenize_points(self.model, [cloud])
    distance = np.linalg.norm(tokens.centres[:, None] - far, axis=-1).min(1)
    # All patches but maybe the first, which begins anywhere.
    self.assertGreaterEqual((distance < 1e-4).sum(), len(tokens.centres) - 1)

  def test_codes_of_a_cloud_wherever_it_is(self):
    cloud = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    here, there = tokenize_points(self.model, [cloud, 50 * cloud + 7])
    self.assertEqual(here.codes.shape, (6,))
    np.testing.assert_array_equal(here.codes, there.codes)
    np.testing.assert_allclose(50 * here.points + 7, there.points, atol=2e-3)
    gap = np.abs(cloud[:, None] - here.centres).sum(-1).min(0)
    np.testing.assert_allclose(gap, 0, atol=1e-5)  # centres are points of it
    (alone,) = tokenize_points(self.model, [cloud], batch_size=1)
    np.testing.assert_array_equal(alone.codes, here.codes)

  def test_the_model_has_the_layout_of_the_authors_alone(self):
    with self.assertRaisesRegex(ValueError, "its layouts are bertjax, point_b"):
      convert(self.workdir, self.root / "out", format="huggingface")
    with self.assertLogs(level="WARNING") as told:
      convert(self.workdir, self.root / "dvae.pth", format="point_bert")
    self.assertIn("dvae.pth does not say {'patches': 6}", told.output[0])

  @parameterized.parameters(
    (dict(data=dict(num_points=7)), "data.num_points=7 is too few .* need 8"),
    (
      dict(
        model=dict(name="bert", size="tiny", vocab_size=9),
        objective=dict(name="masked_lm"),
      ),
      "reads no points",
    ),
    (dict(model=dict(patch_size=10)), "model.patch_size=10 must be a multiple"),
    (dict(model=dict(shrink=3)), "model.shrink=3 must be a power of 2"),
    (dict(objective=dict(name="masked_lm")), "trains a model of the kind Enco"),
    (dict(seeds=dict(masks=1)), "seeds.masks=1: data.name='points' draws no"),
    (dict(samples=["a [MASK]"]), "samples are texts"),
  )
  def test_parts_that_do_not_fit(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      experiment.build(settings(merge(self.config, changes)))

  def test_a_vocabulary_cannot_grow_where_there_is_none(self):
    start = dict(path=str(self.workdir), new_rows="mean")
    with self.assertRaisesRegex(ValueError, "new_rows is for data of text"):
      train.train(merge(self.config, dict(init_from=start)), self.root / "new")

  def test_a_stage_that_keeps_the_optimizer_keeps_averages_too(self):
    start = dict(path=str(self.workdir), carry="optimizer")
    stage = settings(merge(self.config, dict(init_from=start)))
    state = initial_state(experiment.build(stage))
    assert_equal_trees(state.extra, self.result.state.extra)

  def test_codes_from_the_command_line(self):
    cloud = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    np.save(self.root / "cloud.npy", cloud)
    done = subprocess.run(
      [
        *(sys.executable, "-m", "bertjax.predict", "tokenize_points"),
        f"--model={self.workdir}",
        "--input=~/cloud.npy",
        "--reconstruction=~/out.npy",
      ],
      cwd=pathlib.Path(__file__).parents[1],
      env=optimized.environment()
      | {"JAX_PLATFORMS": "cpu", "HOME": str(self.root)},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    (tokens,) = tokenize_points(self.model, [cloud])
    told = json.loads(done.stdout)
    self.assertEqual(told["codes"], tokens.codes.tolist())
    np.testing.assert_array_equal(told["centres"], tokens.centres)
    decoded = np.load(self.root / "out.npy")
    np.testing.assert_allclose(decoded, tokens.points, atol=1e-4)


if __name__ == "__main__":
  absltest.main()
