"""Every config trains: its tiny variant takes two steps through `train`."""

import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import experiment, grid, stopping, train
from bertjax.config import merge, plain, settings, stage_configs
from bertjax.data.masking import Masking
from bertjax.optim import build_optimizer
from configs import lamb, onebit_adam
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device", "unreported")

_CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def _load(path, variant):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant) if variant else module.get_config()


def _data(spec):
  return experiment.build_data(spec, seed=0, cache_dir=pathlib.Path())


def _optimizer(config):
  """Of a whole config, for a parameter of two numbers."""
  return build_optimizer(
    config.optim,
    total_steps=config.stop["steps"],
    params={"kernel": jax.ShapeDtypeStruct((2,), "float32")},
  )


# `teachers_test.py` trains all stages of this one, `point_bert_test.py` the
# other.
_ELSEWHERE = ("point_bert", "point_bert_transformer")
_TRAINED = [p for p in _CONFIGS if p.stem not in _ELSEWHERE]
# Of shorter rows and then of long ones; `train_test.py` trains stages.
_TWO_PHASES = ("bert", "lamb", "onebit_adam")
# Their phases are those of "bert" with other optimizers, with which
# `train_test.py` and `requests_test.py` train.
_OTHERS = [p for p in _TRAINED if p.stem in _TWO_PHASES[1:]]


class ConfigsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (p.stem, p) for p in _TRAINED if p not in _OTHERS
  )
  def test_tiny_variant_trains_two_steps(self, path):
    self._assert_trains(path)

  @parameterized.named_parameters((p.stem, p) for p in _OTHERS)
  @pytest.mark.slow
  def test_tiny_variant_of_another_optimizer_trains_two_steps(self, path):
    self._assert_trains(path)

  def _assert_trains(self, path):
    config = plain(_load(path, "tiny"))
    if path.stem in _TWO_PHASES:
      *_, config = stage_configs(config).values()
      config.pop("init_from", None)
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
  def test_every_mlperf_run_begins_on_its_ramp(self, name):
    config = settings(lamb.get_config(f"mlperf_{name}"))
    self.assertStartsWith(name, str(config.data["batch_size"]))
    rate, *_, warmup, start = lamb.MLPERF[name]
    made = _optimizer(config)
    first = -start / warmup if warmup else 1.0
    self.assertAlmostEqual(float(made.schedule(0)), rate * first, places=8)
    self.assertAlmostEqual(float(made.schedule(config.stop["steps"])), 0.0)

  @parameterized.parameters(
    "base",
    "large",
    *(f"batch_{size}" for size in lamb.BATCHES),
    *(f"mlperf_{name}" for name in lamb.MLPERF),
  )
  def test_rows_have_slots_for_the_labels_of_a_full_one(self, variant):
    for stage in stage_configs(lamb.get_config(variant)).values():
      masking = Masking(**stage["data"]["masking"])
      length = stage["data"]["seq_len"]
      ordinary = length - 3  # [CLS] and two [SEP]; MLPerf has 76 of 512
      self.assertGreaterEqual(masking.slots(length), round(0.15 * ordinary))

  @parameterized.parameters(
    # Table 4 of the LAMB paper, and the steps of its table 1.
    (512, 3, 320, 1_000_000),
    (1_024, 2.5, 160, 500_000),
    (2_048, 2, 80, 250_000),
    (4_096, 1.5, 40, 125_000),
    (8_192, 1, 20, 62_500),
    (16_384, 0.5, 10, 31_250),
    (32_768, 0, 5, 15_625),
  )
  def test_lamb_scales_with_the_batch_as_its_table_says(
    self, batch_size, halvings, warmup, steps
  ):
    stages = stage_configs(lamb.get_config(f"batch_{batch_size}"))
    first, second = map(settings, stages.values())
    taken = [stage.stop["steps"] for stage in (first, second)]
    self.assertEqual(sum(taken), steps)
    self.assertAlmostEqual(taken[0] / steps, 0.9, places=4)
    self.assertEqual([s.data["seq_len"] for s in (first, second)], [128, 512])
    peak = 5e-3 / 2**halvings
    for stage in (first, second):
      self.assertEqual(stage.data["batch_size"], batch_size)
      schedule = _optimizer(stage).schedule
      last = stage.stop["steps"]
      ramp = round(last / warmup)
      for step in (0, ramp // 2, ramp - 1):
        self.assertAlmostEqual(float(schedule(step)), peak * step / ramp, 8)
      self.assertAlmostEqual(float(schedule(ramp)), peak * (1 - ramp / last), 8)
      self.assertAlmostEqual(float(schedule(last)), 0)

  def test_lamb_names_the_batches_that_it_has(self):
    with self.assertRaisesRegex(ValueError, "batch_.*'64'.*512, "):
      lamb.get_config("batch_64")
    with self.assertRaisesRegex(ValueError, "mlperf_.*'64'.*14336"):
      lamb.get_config("mlperf_64")

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
    rows = evaluation["num_batches"] * batch_size
    self.assertBetween(rows, 10_000, 10_000 + batch_size - 1)
    stop = stopping.build_stop(config.stop, config.evals)
    found = {"heldout/mlm_accuracy": 0.7199}
    self.assertIsNone(stop(steps, 0, 0, found))
    found["heldout/mlm_accuracy"] = 0.72
    self.assertIn("reached the target", stop(steps, 0, 0, found))

  @parameterized.parameters(
    p.stem
    for p in _CONFIGS
    if p.stem != "fine_tune"  # any row of TASKS
  )
  def test_a_variant_that_is_not_there_is_refused(self, name):
    path = next(p for p in _CONFIGS if p.stem == name)
    with self.assertRaisesRegex(ValueError, f"configs/{name}.py.*tny.*tiny"):
      _load(path, "tny")

  def test_a_typo_is_refused_with_a_suggestion(self):
    with self.assertRaisesRegex(ValueError, "modle .*Did you mean 'model'"):
      settings(dict(modle={}))

  @parameterized.parameters(
    ("microbatches", 2.0, "a positive integer"),
    ("microbatches", "2", "a positive integer"),
    ("microbatches", True, "a positive integer"),
    ("optim.learning_rate", None, "a positive number"),
    ("optim.learning_rate", "fast", "a positive number"),
    ("optim.clip_norm", "1", "a positive number or None"),
    ("optim.schedule", "linear", "a mapping"),
    ("optim.lr_multipliers", [["a"]], "a list of pairs (regex, number)"),
    ("mesh", 4, "a mapping"),
    ("mesh.data", "2", "an integer"),
    ("mesh.fsdp", 2.0, "an integer"),
    ("seed", "a", "an integer in 0..4294967295"),
    ("seed", 1.5, "an integer in 0..4294967295"),
    ("seed", -1, "an integer in 0..4294967295"),
    ("seeds.data", 2**32, "an integer in 0..4294967295 or None"),
    ("evals.x", None, "a mapping"),
    ("evals.x.every", "2", "a non-negative integer or None"),
    ("evals.x.every", -5, "a non-negative integer or None"),
    ("evals.x.every", 2.5, "a non-negative integer or None"),
    ("evals.x.every_epochs", 0, "a positive number or None"),
    ("evals.x.batch_size", 0, "a positive integer or None"),
    ("every.checkpoint", True, "a positive integer"),
    ("model", "bert", "a mapping"),
    ("model.num_layers", 2.0, "a positive integer or None"),
    ("init_from", "runs/x", "a mapping or None"),
    ("stop.steps", 2.5, "a positive integer or None"),
    ("stop.steps", 0, "a positive integer or None"),
    ("stop.target.value", "0.9", "a number"),
    ("stop.early.min_delta", float("nan"), "a non-negative number"),
    ("horizon", -5, "a positive integer or None"),
    ("horizon", 0, "a positive integer or None"),
    ("horizon", 2.5, "a positive integer or None"),
    (
      "optim.trust_clip",
      [0.0, float("nan")],
      "a pair (lowest, highest) of numbers or None",
    ),
    ("samples", "The [MASK]", "a list of strings"),
    ("writers", [3], "a list of strings"),
    ("data.instances", "nsp", "a mapping"),
    ("data.batch_size", 0, "a positive integer"),
    ("data.batch_size", "8", "a positive integer"),
    ("cache_dir", 3, "a path or None"),
  )
  def test_a_value_of_another_kind_is_refused(self, field, value, kind):
    message = f"{field}={value!r} must be {kind}."
    for key in reversed(field.split(".")):
      value = {key: value}
    with self.assertRaisesRegex(ValueError, rf"\A{re.escape(message)}\Z"):
      settings(merge(dict(data={}, optim={}, stop={}), value))

  def test_a_folder_has_a_name_whatever_the_alternatives_are(self):
    values = [{"paths": ["é" * 300, i]} for i in range(2)]
    config = dict(source={}, seed=0, grid=dict(source=values, seed=[1, 2]))
    found = [point.name for point in grid.points(config)]
    self.assertEqual(found, [point.name for point in grid.points(config)])
    self.assertLen(set(found), 4)
    for name in found:
      self.assertStartsWith(name, "source=_paths_")
      (pathlib.Path(self.create_tempdir()) / name).mkdir()
    short = dict(seed=0, grid=dict(seed=["x" * 250]))
    self.assertEqual(grid.points(short)[0].name, f"seed={'x' * 250}")
    with self.assertRaisesRegex(ValueError, "two combinations are called"):
      grid.points(dict(seed=0, grid=dict(seed=["x" * 251] * 2)))

  def test_an_interval_may_have_no_highest(self):
    clips = dict(trust_clip=[0.01, float("inf")], phi_clip=(0, float("inf")))
    found = settings(dict(data={}, optim=clips, stop={}))
    self.assertEqual(found.optim["trust_clip"][1], float("inf"))

  def test_integers_of_numpy_are_integers(self):
    given = dict(microbatches=np.int32(2), seed=np.int64(3))
    found = settings(dict(data={}, optim={}, stop={}, **given))
    kept = found.to_json()
    self.assertEqual((kept["microbatches"], kept["seed"]), (2, 3))

  @parameterized.parameters(
    (stage_configs, dict(stages=dict(a=None)), "stages.a=None must be a map"),
    (grid.points, dict(grid=4), "grid=4 must be a mapping"),
    (grid.selection, dict(keep=4), "keep=4 must be a mapping"),
    (_data, dict(batch_size=0), "data.batch_size=0 must be a positive integer"),
  )
  def test_what_has_other_readers_is_checked_there(self, read, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      read(spec)


if __name__ == "__main__":
  absltest.main()
