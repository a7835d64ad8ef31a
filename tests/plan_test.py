"""A plan says what a step occupies, moves and takes, without any data."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import unittest

import jax
import pytest
from absl.testing import absltest, parameterized

from bertjax import experiment, hardware
from bertjax.config import settings
from bertjax.data.abstract import abstract_text
from bertjax.parallel import wire
from bertjax.plan import Plan, plan, stages
from bertjax.planning import advice, links, page, step
from bertjax.planning.kinds import kinds
from bertjax.planning.step import StepFacts, device_bytes, lower_step
from tests import tiny
from tests.configs_test import _CONFIGS, _load

_FACTS = StepFacts(
  mesh=dict(data=8, fsdp=1, model=1, seq=1),
  batch_size=64,
  seq_len=10,
  vocab_size=50,
  parameters=1000,
  parameter_bytes=4_000,
  optimizer_bytes=8_000,
  batch_bytes=640,
  model_flops=4e9,
)


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
    for _, stage, _ in stages(_load(path, "")):
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


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class CompiledPlanTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    fields = tiny.config(
      pathlib.Path("nowhere"),
      model=dict(
        num_layers=2,
        attend="flash",
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
      ),
      mesh=dict(data=2, fsdp=2),
      prng="rbg",
    )
    cls.plan = plan(settings(fields), "v5e:2x2", steps=3_600)

  def test_memory_is_that_of_the_sharded_state(self):
    facts, memory = self.plan.facts, self.plan.memory
    self.assertTrue(self.plan.fits)
    self.assertBetween(
      facts.parameter_bytes, facts.parameters * 2, facts.parameters * 4
    )
    held = facts.parameter_bytes + facts.optimizer_bytes + facts.batch_bytes
    # Tiles of 8 x 128 pad small arrays.
    self.assertGreaterEqual(memory.arguments, held)

  def test_gradients_are_reduced_over_both_batch_axes(self):
    axes = {c.axes(self.plan.facts.mesh) for c in self.plan.collectives}
    self.assertContainsSubset({("data", "fsdp")}, axes)
    self.assertGreater(self.plan.exchange_s, 0)

  def test_stacks_of_gradients_are_not_zeroed_before_they_are_written(self):
    of_encoder = re.compile(r"transpose\(.*\)/encoder/(\S*)$")
    found = {
      match[1]
      for row in self.plan.cost.rows
      if (match := of_encoder.search(row.op_name))
    }
    self.assertGreater(len(found), 10)
    self.assertNotIn("broadcast_in_dim", found)

  def test_rates_follow_from_the_step_time(self):
    tokens = 8 * 32
    seconds = self.plan.step_s
    self.assertAlmostEqual(
      self.plan.tokens_per_s_per_chip, tokens / seconds / 4
    )
    self.assertAlmostEqual(self.plan.chip_hours, seconds * 4)
    self.assertGreater(self.plan.compute_s, self.plan.exchange_s)
    self.assertEqual(seconds, self.plan.compute_s)
    peak = 4 * 197e12 * seconds
    self.assertAlmostEqual(self.plan.mfu, self.plan.facts.model_flops / peak)

  def test_page_and_figures(self):
    text = page.render(self.plan, "phase1")
    for part in (
      "phase1 on v5e:2x2: 4 chips, mesh data 2 x fsdp 2",
      "batch 8 x 32 tokens, ",
      "FITS",
      "all-reduce",
      "tokens/s per chip",
      "whole run    3,600 steps in ",
      "chip-hours",
      "bertjax/layers/",
      "latency of transfers",
      "predicated regions as taken",
    ):
      self.assertIn(part, text)
    figures = json.loads(json.dumps(page.figures(self.plan)))
    self.assertLen(figures["top"], 10)
    # What the matrix units do is the model's arithmetic, and padding.
    flops = 4 * figures["mxu_flops"]
    self.assertGreater(flops, figures["step"]["model_flops"])
    self.assertEqual(figures["step_s"], self.plan.step_s)
    self.assertEmpty(figures["missing"])

  def test_what_does_not_divide_is_refused(self):
    fields = tiny.config(pathlib.Path("nowhere"), mesh=dict(model=3))
    with self.assertRaisesRegex(ValueError, "does not divide 4 devices"):
      plan(settings(fields), "v5e:2x2")
    fields = tiny.config(pathlib.Path("nowhere"))
    with self.assertRaisesRegex(ValueError, "use a batch size .* of 16"):
      plan(settings(fields), "v5e:4x4")

  def test_float16_is_no_type_of_a_tpu(self):
    fields = tiny.config(pathlib.Path("nowhere"), dtype="float16")
    with self.assertRaisesRegex(ValueError, "use dtype='bfloat16'"):
      plan(settings(fields), "v5e:2x2")


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
@pytest.mark.slow  # hlo_test reads such programs
class SlicesTest(absltest.TestCase):
  def test_gradients_cross_slices_after_they_were_reduced_inside(self):
    # So wide that the padding of tiles hardly counts.
    model = dict(num_layers=1, emb_dim=128, mlp_dim=512)
    fields = tiny.config(pathlib.Path("nowhere"), model=model)
    made = plan(settings(fields), "2xv5e:2x2")
    inside = {
      links.axes(c, made.topology, made.facts.mesh)
      for c in made.collectives
      if c.slices == 1
    }
    self.assertEqual(inside, {("data",)})
    across = [c for c in made.collectives if c.slices > 1]
    self.assertEqual({c.group_size for c in across}, {2})
    # Each chip exchanges a quarter of the gradients with its peer.
    gradients = made.facts.parameters * 4
    sent = sum(c.sent_bytes for c in across)
    self.assertBetween(sent, 0.95 * gradients / 4, 2 * gradients / 4)
    self.assertGreater(made.exchange_s, sent / 3.125e9)
    self.assertRegex(page.render(made), r"all-reduce +slice ")


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
@pytest.mark.slow  # sharded_test lowers such kernels, LinksTest has the rest
class CompressedTest(absltest.TestCase):
  def test_kernels_compile_inside_the_workers(self):
    fields = tiny.config(
      pathlib.Path("nowhere"),
      model=dict(num_layers=1, attend="flash"),
      optim=dict(name="onebit_adam", learning_rate=1e-3, freeze_step=2),
    )
    made = plan(settings(fields), "v5e:2x2")

    def sends(kind):
      return sum(c.sent_bytes for c in kind.collectives)

    compressed, full = sorted(made.kinds, key=sends)
    gradients = made.facts.parameters * 4
    sent = [sends(full), sends(compressed)]
    self.assertGreaterEqual(sent[0], 1.5 * gradients)
    # Whole lines of bits, of which these few parameters fill a part.
    shapes = [(made.facts.parameters,)]
    self.assertAlmostEqual(
      sent[1], wire.compressed_bytes(shapes, 4), delta=0.2 * sent[1]
    )
    self.assertEqual(made.exchange_s, made.kinds[0].exchange_s)
    # Both take gradients; neither does what only the other does.
    both = full.compute_s + compressed.compute_s
    self.assertGreater(both, made.cost.seconds)
    self.assertLess(
      max(full.compute_s, compressed.compute_s), made.cost.seconds
    )
    self.assertRegex(page.render(made), "other steps  .*: compute ")


class LinksTest(parameterized.TestCase):
  def test_a_step_takes_one_branch_of_a_conditional(self):
    always, skip, full, compressed, rest = (
      hardware.Collective("all-reduce", 1, (), 1, "", "", branch=branch)
      for branch in ((), (1,), (1, 0), (1, 1), (0, 0, 2))
    )
    topology = hardware.parse("v5e:2x2")

    def own(*collectives):
      found = kinds(topology, collectives, None)
      return [list(kind.collectives) for kind in found]

    self.assertCountEqual(
      own(always, skip, full, compressed, rest),
      [[always, rest], [always, skip, full], [always, skip, compressed]],
    )
    self.assertEqual(own(always), [[always]])
    self.assertEqual(own(), [[]])

  def test_a_kind_of_step_computes_in_its_own_branch(self):
    topology = hardware.parse("v5e:2x2")
    rows = [
      hardware.Row("", "", 1, 1, 0, 0, 0, estimate, "", "", branch)
      for branch, estimate in (
        ((), 1e3), ((1, 0), 1e4), ((1, 1), 1e5), ((1, 1, 0), 1e6), ((0,), 1e7),
      )
    ]  # fmt: skip
    full, compressed = (
      hardware.Collective("all-reduce", n, ((0, 1),), 1, "", "", branch=branch)
      for n, branch in ((4_000, (1, 0)), (10, (1, 1)))
    )
    cost = hardware.Cost(topology.chip, rows)
    found = kinds(topology, [full, compressed], cost)
    self.assertEqual(
      [(k.work.cycles, list(k.collectives)) for k in found],
      [(1_101_000, [compressed]), (11_000, [full])],  # the longest first
    )

  def test_the_longest_kind_of_step_is_first_though_more_of_it_hides(self):
    topology = hardware.parse("v5e:2x2")
    rows, collectives = [], []
    # 111 s one after the other, 97 s.
    for branch, (compute, exchange) in enumerate(((81.1, 29.8), (96.4, 0.94))):
      cycles = compute * topology.chip.clock
      rows.append(
        hardware.Row("", "", 1, 1, 0, 0, 0, cycles, "", "", (branch,))
      )
      collectives.append(
        hardware.Collective(
          "collective-permute",
          int(exchange * 45e9),
          ((0, 1),),
          *(1, "", ""),
          branch=(branch,),
        )
      )
    cost = hardware.Cost(topology.chip, rows)
    found = kinds(topology, collectives, cost)
    self.assertEqual(
      [(round(k.compute_s, 2), round(k.exchange_s, 2)) for k in found],
      [(96.4, 0.94), (81.1, 29.8)],
    )
    made = Plan(
      topology,
      _FACTS,
      steps=3_600,
      needed_bytes=4,
      memory=hardware.Memory(1, 1, 0, 1, 1),
      collectives=tuple(collectives),
      cost=cost,
    )
    text = page.render(made)
    self.assertIn("other steps  81.1 s: compute 81.1 s, exchange 29.8 s", text)
    self.assertIn("3,600 steps in at most 4.02 days", text)
    self.assertEqual(page.figures(made)["kinds"][1]["step_s"], 81.1)

  @parameterized.parameters(
    # Half of all bytes cross the middle of the torus, over 16 links and the 16
    # that close the rings: those of 128 chips, each way.
    ("all-to-all", "v5e:16x16", 256, 1e8, 128 * 5e7 / (32 * 45e9)),
    # A quarter to the next one, half a quarter over two links to the farthest.
    ("all-to-all", "v5e:4x4", 4, 1e8, (1e8 / 4 + 2 * 1e8 / 8) / 45e9),
    ("collective-permute", "v5e:4x4", 2, 1e8, 1e8 / 45e9),
    # The switch has them all.
    ("all-to-all", "h100:8", 8, 1e8, 7 / 8 * 1e8 / 450e9),
    ("collective-permute", "h100:8", 2, 1e8, 1e8 / 450e9),
  )
  def test_what_is_no_ring_passes_more_links(
    self, kind, topology, size, operand, seconds
  ):
    collective = hardware.Collective(
      kind, int(operand), (tuple(range(size)),), 3, "", ""
    )
    self.assertAlmostEqual(
      links.seconds(hardware.parse(topology), [collective]), 3 * seconds
    )

  def _all_reduce(self, *groups, slices=1):
    return hardware.Collective(
      "all-reduce", 4_000, groups, 3, "", "", slices=slices
    )

  def test_slices_part_data_or_fsdp(self):
    two = hardware.parse("2xv5e:2x2")
    pairs = self._all_reduce((0, 1), (2, 3))
    for sizes, axes in (((4, 2), ("fsdp",)), ((2, 4), ()), ((1, 8), ())):
      mesh = dict(zip(("data", "fsdp", "model", "seq"), (*sizes, 1, 1)))
      self.assertEqual(links.axes(pairs, two, mesh), axes)
    whole = self._all_reduce((0, 1, 2, 3))
    mesh = dict(data=1, fsdp=8, model=1, seq=1)
    self.assertEqual(links.axes(whole, two, mesh), ("fsdp",))
    between = self._all_reduce((1, 2), slices=2)
    self.assertEqual(links.axes(between, two, mesh), ("slice",))

  @parameterized.parameters(
    ("v5e", (0, 1, 2, 3), 1, 90e9),
    ("v5e", (1, 2), 2, 3.125e9),
    ("v5p", (1, 2, 3), 3, 6.25e9),
    ("v6e", (1, 2), 2, 12.5e9),
  )
  def test_what_crosses_slices_takes_the_network(
    self, chip, group, slices, bandwidth
  ):
    collective = self._all_reduce(group, slices=slices)
    shape = "2x2x2" if chip == "v5p" else "2x2"
    topology = hardware.parse(f"{max(2, slices)}x{chip}:{shape}")
    n = len(group)
    self.assertAlmostEqual(
      links.seconds(topology, [collective] * 2),
      2 * 3 * 4_000 * 2 * (n - 1) / n / bandwidth,
    )

  def test_a_network_that_is_not_published_gives_no_time(self):
    v4 = hardware.parse("2xv4:2x2x2")
    across = self._all_reduce((1, 2), slices=2)
    self.assertIsNone(links.seconds(v4, [across]))
    self.assertIsNotNone(links.seconds(v4, [self._all_reduce((0, 1))]))


class AdviceTest(absltest.TestCase):
  def test_activations_ask_for_microbatches(self):
    # 16 kB of state, 84 kB of activations, room for 60: halving is enough.
    found = advice.candidates(_FACTS, 1, needed=100_000, available=60_000)
    self.assertEqual(
      list(found),
      [dict(microbatches=2), dict(microbatches=4), dict(microbatches=8)],
    )

  def test_microbatches_multiply_those_that_are_there(self):
    found = advice.candidates(_FACTS, 2, needed=100_000, available=60_000)
    self.assertEqual(next(found), dict(microbatches=4))

  def test_state_asks_for_sharding(self):
    # 16 kB of state in 10 kB: a third is left to activations at fsdp=4.
    found = advice.candidates(_FACTS, 1, needed=17_000, available=10_000)
    self.assertEqual(next(found), dict(mesh=dict(data=2, fsdp=4)))

  def test_a_frozen_model_counts_as_state(self):
    facts = dataclasses.replace(_FACTS, extra_bytes=30_000)
    # 46 kB of state in 60 kB: half of them and 54 kB of activations are more.
    found = advice.candidates(facts, 1, needed=100_000, available=60_000)
    self.assertEqual(
      next(found), dict(mesh=dict(data=4, fsdp=2), microbatches=2)
    )

  def test_recomputing_asks_for_few_rows_at_a_time(self):
    found = advice.recomputing(_FACTS, 2, available=60_000)
    remat = dict(model=dict(remat="full"))
    self.assertEqual(list(found), [remat, dict(microbatches=8) | remat])
    self.assertEmpty(list(advice.recomputing(_FACTS, 2, available=1_000)))

  def test_nothing_helps_a_state_that_is_too_large(self):
    found = advice.candidates(_FACTS, 1, needed=17_000, available=1_000)
    self.assertEmpty(list(found))

  def test_the_page_shows_it(self):
    made = Plan(
      hardware.parse("v5e:2x4"),
      _FACTS,
      steps=7,
      needed_bytes=17e9,
      suggestion=advice.Suggestion("microbatches=2", 9e9),
    )
    text = page.render(made)
    self.assertIn("DOES NOT FIT: 15.83 GiB of 16.00 GiB", text)
    self.assertIn("would fit with --config.microbatches=2 (8.38 GiB)\n", text)
    self.assertIn(
      "(8.38 GiB); change there what stages.phase2 sets itself\n",
      page.render(made, "phase2"),
    )
    self.assertFalse(page.figures(made)["fits"])


if __name__ == "__main__":
  absltest.main()
