"""Every config is planned without data."""

import dataclasses
import importlib.util
import math
import pathlib
import unittest

import jax
import pytest
from absl.testing import absltest, parameterized

from bertjax import experiment, hardware
from bertjax.config import settings
from bertjax.data.abstract import abstract_text
from bertjax.plan import plan, stages
from bertjax.planning import page, step
from bertjax.planning.step import device_bytes, lower_step
from tests import tiny
from tests.configs_test import _CONFIGS, _load

# Linear layers of BERT-large: number, inputs (a bias is one more), outputs of
# attention and feed-forward; of pooler, transform and next sentence.
_STACKED = ((24 * 4, 1025, 1024), (24, 1025, 4096), (24, 4097, 1024))
_HEADS = ((2, 1025, 1024), (1, 1025, 2))


def _sum(function, layers):
  return sum(n * (function(i) + function(o)) for n, i, o in layers)


# MKOR's, in bfloat16.
_FACTOR_BYTES = 2 * _sum(lambda d: d * d, _STACKED + _HEADS)


# Beside the default one and the tiny one, those that differ from them in more
# than numbers. Fine-tuning has a test of its own.
_VARIANTS = {
  "bert": (),
  "fine_tune": (),
  "grammar": (),
  "lamb": ("batch_512", "mlperf_448"),
  "mkor": ("mkor_h", "kaisa", "eva"),
  "onebit_adam": ("lamb", "zero_one"),
  "point_bert": ("small",),
  "point_bert_transformer": ("classify", "scratch", "segment", "small"),
  "quickstart": (),
  "roberta": (),
}


_VARIANTS_OF_CONFIGS = [
  (name, variant)
  for name, variants in _VARIANTS.items()
  for variant in variants
]


def _path(name):
  return next(path for path in _CONFIGS if path.stem == name)


def _devices():
  """TPUs, whose kernels are more particular, if their compiler is here."""
  if importlib.util.find_spec("libtpu") is None:
    return jax.devices()
  return hardware.topologies.devices(hardware.parse("v5e:2x2"))


def _whole_bytes(tree):
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _vocabulary(stage, size=30_522):
  """The size of a vocabulary that is not here; None for data without one."""
  return None if stage.data.get("name") == "points" else size


class ConfigsTest(parameterized.TestCase):
  # Fine-tuning starts from a folder and from examples, neither of them here.
  @parameterized.named_parameters(
    (p.stem, p) for p in _CONFIGS if p.stem != "fine_tune"
  )
  def test_every_config_lowers_without_data(self, path):
    devices = _devices()
    found = list(stages(_load(path, "")))
    if path.stem in ("lamb", "onebit_adam"):
      del found[:-1]  # as those of "bert", they differ in numbers alone
    for _, stage, _ in found:
      size = _vocabulary(stage)
      lowered, facts = lower_step(devices, settings=stage, vocab_size=size)
      self.assertEqual(facts.mesh["data"], len(devices))
      self.assertEqual(facts.tokens, facts.batch_size * facts.seq_len)
      # Replicated; two moments per parameter, and a few scalars; what a worker
      # of a compressed average still owes, and its share of the servers' debt.
      self.assertEqual(facts.parameter_bytes, 4 * facts.parameters)
      kept = facts.optimizer_bytes / facts.parameter_bytes
      if stage.optim["name"].startswith("onebit"):
        kept -= 1 + 1 / len(devices)
      else:  # all of it is on each device; the rest are a key and a count
        state, _ = lowered.args_info[0]
        held = facts.parameter_bytes + facts.optimizer_bytes + facts.extra_bytes
        self.assertBetween(_whole_bytes(state) - held, 0, 64)
      if "precondition" in stage.optim:
        kept -= _FACTOR_BYTES / facts.parameter_bytes
      self.assertBetween(kept, 2, 2.01)

  def test_every_config_has_its_variants_listed(self):
    self.assertEqual({path.stem for path in _CONFIGS}, {*_VARIANTS})

  @parameterized.parameters(_VARIANTS_OF_CONFIGS)
  def test_variants_build_without_data(self, name, variant):
    for _, stage, _ in stages(_load(_path(name), variant)):
      size = _vocabulary(stage)
      built = step.build(_devices(), settings=stage, vocab_size=size)
      rows = next(iter(built.batch_spec.values())).shape[0]
      self.assertEqual(rows, stage.data["batch_size"])
      self.assertGreater(built.settings.stop["steps"], 0)

  @unittest.skipUnless(
    importlib.util.find_spec("libtpu"),
    "libtpu is not installed: pip install 'bertjax[test]'",
  )
  def test_what_evaluations_read_divides_over_a_pod_or_is_refused(self):
    devices = hardware.topologies.devices(hardware.parse("v5p:4x4x4"))
    ((_, stage, _),) = stages(_load(_path("lamb"), "mlperf_3072"))
    self.assertTrue(step.build(devices, settings=stage, vocab_size=30_522))
    heldout = stage.evals["heldout"] | {"batch_size": 1_000}
    odd = dataclasses.replace(stage, evals={"heldout": heldout})
    with self.assertRaisesRegex(
      ValueError, "evals.heldout.batch_size=1000 does not divide over 64"
    ):
      step.build(devices, settings=odd, vocab_size=30_522)

  @parameterized.parameters(_VARIANTS_OF_CONFIGS)
  @pytest.mark.slow
  def test_variants_lower_without_data(self, name, variant):
    """Its last stage, with the smallest encoder of text."""
    *_, (_, stage, _) = stages(_load(_path(name), variant))
    size = _vocabulary(stage)
    if size is not None:
      model = dict(stage.model) | {"size": "tiny"}
      stage = dataclasses.replace(stage, model=model)
    _, facts = lower_step(_devices(), settings=stage, vocab_size=size)
    self.assertEqual(facts.batch_size, stage.data["batch_size"])
    self.assertEqual(facts.microbatches, stage.microbatches)

  @parameterized.parameters(
    ("mkor", _FACTOR_BYTES),
    # A vector of inputs and one of output gradients, float32.
    ("eva", 4 * _sum(lambda d: d, _STACKED + _HEADS)),
    # Covariances and eigenvectors, and eigenvalues, float32. Eight workers
    # divide 24 layers, and rows of the heads' outputs, 1024.
    (
      "kaisa",
      4 * _sum(lambda d: 2 * d * d + d, _STACKED) / 8
      + 4 * _sum(lambda d: 2 * d * d + d, _HEADS)
      - 4 * 2 * 2 * 1024**2 * 7 / 8,
    ),
  )
  def test_factors_have_their_closed_form(self, variant, expected):
    """Per device, of eight; the rest is LAMB's and what it counts."""
    path = next(p for p in _CONFIGS if p.stem == "mkor")

    def optimizer_bytes(variant):
      ((_, stage, _),) = stages(_load(path, variant))
      built = experiment.build(
        dataclasses.replace(stage, init_from=None),
        data=abstract_text(stage.data, 30_522),
      )
      return device_bytes(built.abstract_state.opt_state)

    factors = optimizer_bytes(variant) - optimizer_bytes("lamb")
    self.assertAlmostEqual(factors, expected, delta=64)

  @parameterized.named_parameters((p.stem, p) for p in _CONFIGS)
  @pytest.mark.slow  # what lowers compiles, as far as we know
  def test_every_tiny_config_has_a_page(self, path):
    for name, stage, _ in stages(_load(path, "tiny")):
      size = _vocabulary(stage, 2048)
      made = plan(stage, "v5e:2x2", vocab_size=size)
      self.assertTrue(made.fits)
      unit = "points" if size is None else "tokens"
      self.assertIn(f"{unit}/s per chip", page.render(made, name))

  @parameterized.parameters("mnli", "squad", "swag", "conll2003", "stsb")
  def test_fine_tuning_lowers_without_folder_and_examples(self, task):
    path = next(p for p in _CONFIGS if p.stem == "fine_tune")
    config = _load(path, task)
    config.model = dict(name="bert", size="tiny")
    ((_, stage, steps),) = stages(config)
    self.assertEqual(steps, 0)
    _, facts = lower_step(_devices(), settings=stage, vocab_size=30_522)
    self.assertEqual(facts.vocab_size, 30_522)
    self.assertEqual(facts.batch_size, 16 if task == "swag" else 32)
    self.assertGreater(facts.parameters, 4_369_408)  # the encoder, and a head
    ((_, _, steps),) = stages(config, rows_per_epoch=100 * facts.batch_size)
    self.assertEqual(steps, 300)

  @parameterized.parameters(
    ("auto", "key<fry>", "key<rbg>"), ("threefry2x32", *["key<fry>"] * 2)
  )
  def test_steps_draw_by_the_cheapest_generator(self, given, on_cpu, on_tpu):
    fields = tiny.config(pathlib.Path("nowhere"), prng=given)
    stage = settings(fields)
    data = abstract_text(stage.data, 96)
    for devices, wanted in ((jax.devices(), on_cpu), (_devices(), on_tpu)):
      if devices[0].platform == "cpu" and "rbg" in wanted:
        continue  # no compiler for TPUs
      built = experiment.build(stage, devices=devices, data=data)
      self.assertEqual(str(built.abstract_state.key.dtype), wanted)

  def test_a_model_that_is_not_here_is_asked_for(self):
    path = next(p for p in _CONFIGS if p.stem == "fine_tune")
    ((_, stage, _),) = stages(_load(path, "sst2"))
    with self.assertRaisesRegex(
      ValueError, "init_from.path='bert-base-uncased' is not here.*model.name"
    ):
      lower_step(jax.devices(), settings=stage, vocab_size=9)
    with self.assertRaisesRegex(ValueError, "give it with --vocab_size"):
      named = dataclasses.replace(stage, model=dict(name="bert", size="tiny"))
      lower_step(jax.devices(), settings=named)

  def test_text_too_leaves_its_tokenizer_to_a_folder_that_is_not_here(self):
    fields = tiny.config(
      pathlib.Path("nowhere"), init_from=dict(path="nowhere/phase1")
    )
    del fields["data"]["tokenizer"]
    stage = settings(fields)
    built = step.build(jax.devices(), settings=stage, vocab_size=97)
    self.assertEqual(built.objective.encoder.vocab_size, 97)
    with self.assertRaisesRegex(
      ValueError, "data.tokenizer is not given, .*init_from.*--vocab_size"
    ):
      step.build(jax.devices(), settings=stage)

  def test_a_vocabulary_that_is_read_has_its_own_size(self):
    stage = settings(tiny.config(pathlib.Path("nowhere")))
    for name, message in (
      ("static", "vocab_size=97 is .*data.name='static' is read with its"),
      ("statics", "data.name='statics' is unknown"),
    ):
      data = dict(name=name, files=dict(train="nowhere"), batch_size=8)
      read = dataclasses.replace(stage, data=data)
      with self.assertRaisesRegex(ValueError, message):
        step.build(jax.devices(), settings=read, vocab_size=97)

  @parameterized.parameters(
    # Phase 2 goes on counting; of the other two it begins again at 0.
    ("bert", 900_000, 100_000),
    ("lamb", 7_038, 1_563),
    ("onebit_adam", 152_000, 10_000),
  )
  def test_stages_count_their_own_steps(self, name, first, second):
    path = next(p for p in _CONFIGS if p.stem == name)
    steps = {name: count for name, _, count in stages(_load(path, ""))}
    self.assertEqual(steps, dict(phase1=first, phase2=second))

  @parameterized.parameters(
    (dict(steps=6), dict(epochs=3), [6, 0]),
    (dict(epochs=3), dict(steps=6), [0, 0]),
    (dict(epochs=1), dict(steps=6), [4, 2], 32),
    (dict(steps=6), dict(steps=4), [6, 0]),
  )
  def test_a_continued_stage_takes_what_is_known_to_be_left(
    self, first, second, expected, rows=None
  ):
    config = tiny.config(pathlib.Path("nowhere"), stop=dict(steps=None))
    config["stages"] = dict(
      one=dict(stop=first),
      two=dict(stop=second, init_from=dict(reset_schedule=False)),
    )
    found = [steps for _, _, steps in stages(config, rows_per_epoch=rows)]
    self.assertEqual(found, expected)


if __name__ == "__main__":
  absltest.main()
