"""Every config trains: its tiny variant takes two steps through `train`."""

import importlib.util
import pathlib

import jax
from absl.testing import absltest, parameterized

from bertjax import stopping, train
from bertjax.config import plain, settings, stage_configs
from tests import tiny

_CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def _load(path, variant):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant) if variant else module.get_config()


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
