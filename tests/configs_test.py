"""Every config trains: its tiny variant takes two steps through `train`."""

import importlib.util
import pathlib

import jax
from absl.testing import absltest, parameterized

from bertjax import stopping, train
from bertjax.config import plain, settings, stage_configs
from bertjax.optim import build_optimizer
from configs import lamb, onebit_adam
from tests import tiny

_CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def _load(path, variant):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant) if variant else module.get_config()


def _optimizer(config):
  """Of a whole config, for a parameter of two numbers."""
  return build_optimizer(
    config.optim,
    total_steps=config.stop["steps"],
    params={"kernel": jax.ShapeDtypeStruct((2,), "float32")},
  )


class ConfigsTest(parameterized.TestCase):
  @parameterized.named_parameters((p.stem, p) for p in _CONFIGS)
  def test_tiny_variant_trains_two_steps(self, path):
    config = plain(_load(path, "tiny"))
    folder = pathlib.Path(self.create_tempdir())
    if "splitter" in config["data"]:
      # The same run on a corpus that needs no scan of all installed packages.
      corpus = tiny.config(folder)
      tiny.write_corpus(folder)
      config["data"]["source"] = corpus["data"]["source"]
      config["data"]["splitter"] = "lines"
    if "tokenizer" in config["data"]:
      config["data"]["tokenizer"]["vocab_size"] = 300
    config["data"]["batch_size"] = 2 * len(jax.devices())
    config["cache_dir"] = str(folder / "cache")
    for stage in config.get("stages", {}).values():
      stage.get("data", {}).pop("batch_size", None)
    for evaluation in config["evals"].values():
      evaluation["split"] = "validation"
    result = train.train(config, "", dry_run=True)
    self.assertGreaterEqual(result.step, 2)
    self.assertLess(result.metrics["loss"], 12)

  @parameterized.named_parameters((p.stem, p) for p in _CONFIGS)
  def test_the_full_variant_has_only_known_fields(self, path):
    for fields in stage_configs(_load(path, "")).values():
      self.assertEqual(settings(fields).data, fields["data"])

  @parameterized.parameters(
    ("sst2", "glue/sst2"),
    ("squad_v2", "squad_v2"),
    ("boolq", "super_glue/boolq"),
  )
  def test_fine_tuning_takes_any_task(self, variant, task):
    path = next(p for p in _CONFIGS if p.stem == "fine_tune")
    self.assertEqual(_load(path, variant).data.task.name, task)

  @parameterized.parameters(sorted(lamb.MLPERF))
  def test_every_mlperf_run_begins_on_its_ramp(self, batch_size):
    config = settings(lamb.get_config(f"mlperf_{batch_size}"))
    self.assertEqual(config.data["batch_size"], batch_size)
    rate, *_, warmup, start = lamb.MLPERF[batch_size]
    made = _optimizer(config)
    first = -start / warmup if warmup else 1.0
    self.assertAlmostEqual(float(made.schedule(0)), rate * first, places=8)
    self.assertAlmostEqual(float(made.schedule(config.stop["steps"])), 0.0)

  @parameterized.parameters(sorted(onebit_adam.STEPS))
  def test_variances_freeze_after_the_rate_has_warmed_up(self, variant):
    for stage in stage_configs(onebit_adam.get_config(variant)).values():
      with self.assertNoLogs("absl", "WARNING"):
        made = _optimizer(settings(stage))
      self.assertTrue(made.local_gradients)
    if variant in ("lamb", "zero_one"):
      self.assertEqual(stage["optim"]["freeze_step"], 1_000)

  @parameterized.parameters(
    (448, 150_000, 335), (3_072, 175_000, 57), (14_336, 300_000, 21)
  )
  def test_mlperf_evaluates_after_as_many_samples_as_its_logs(
    self, batch_size, samples, steps
  ):
    path = next(p for p in _CONFIGS if p.stem == "lamb")
    config = settings(_load(path, f"mlperf_{batch_size}"))
    evaluation = config.evals["heldout"]
    self.assertEqual(evaluation["every"], steps)
    # The first step at which the logged number of samples has been seen.
    self.assertBetween(steps * batch_size, samples, samples + batch_size - 1)
    self.assertEqual(
      evaluation["batch_size"] * evaluation["num_batches"], 10_000
    )
    stop = stopping.build_stop(config.stop, config.evals)
    found = {"heldout/mlm_accuracy": 0.7199}
    self.assertIsNone(stop(steps, 0, 0, found))
    found["heldout/mlm_accuracy"] = 0.72
    self.assertIn("reached the target", stop(steps, 0, 0, found))

  def test_a_typo_is_refused_with_a_suggestion(self):
    with self.assertRaisesRegex(ValueError, "modle .*Did you mean 'model'"):
      settings(dict(modle={}))


if __name__ == "__main__":
  absltest.main()
