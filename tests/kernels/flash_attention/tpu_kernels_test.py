"""What is the TPU kernels' own: steps, schedules, generators, the compiler.

That they mean the same as the other backends, `backends_test.py` tests.
"""

import functools
import importlib.util
import itertools
import re
import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from bertjax import hardware
from bertjax.hardware import topologies
from kernels.flash_attention import Unsupported, flash_attention, programs, tpu
from kernels.flash_attention.options import Extras, Options
from kernels.flash_attention.tpu import relative, schedule, scores, skew, tiles
from kernels.flash_attention.tpu.problem import describe
from tests.draws import normal


def problem(b, h, t, s, d=64, dtype=jnp.bfloat16, mask=None, **options):
  q, k = (jax.ShapeDtypeStruct((b, h, d, n), dtype) for n in (t, s))
  chosen = Options(scale=1.0, layout="bhdt", **options)
  return describe(q, k, k, Extras(block_mask=mask), chosen)


def visits(plan, head=0):
  """The table of one head as a list of (i, j, flags, output row)."""
  table = np.asarray(plan.table).reshape(2, plan.heads, plan.visits)[:, head]
  n = schedule.MAX_TILES
  return [(w % n, w // n % n, w // n**2 * n**2, row) for w, row in table.T]


def qkv(b, h, kv_heads, t, s, d=16):
  q, k, v = (
    normal(0, b, h, d, t),
    *(normal(seed, b, kv_heads, d, s) for seed in (1, 2)),
  )
  return q, k, v, normal(3, b, h, d, t)


def gradients(backend, arrays, diff, **arguments):
  """Output, lse, and gradients in q, k, v and whatever `diff` names."""
  *x, weights = arrays

  def loss(q, k, v, diff):
    out, lse = flash_attention(
      q,
      k,
      v,
      layout="bhdt",
      return_lse=True,
      backend=backend,
      interpret=backend == "tpu",
      **diff,
      **arguments,
    )
    seen = jnp.where(lse == -jnp.inf, 0.0, lse)
    return (out * weights).sum() + jnp.sin(seen).sum(), (out, seen)

  solve = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
  return jax.device_get(solve(*x, diff))


class ScheduleTest(parameterized.TestCase):
  def plan(self, by_column, traced=False, every=False, **options):
    mask = np.random.default_rng(0).random((2, 5, 7)) < 0.4
    mask[0, 2], mask[1, :, 3] = False, False
    p = problem(1, 2, 640, 896, mask=mask, block_size=(128, 128), **options)
    given = jax.device_put(mask) if traced else mask
    chosen = tiles.choose(p, by_column)
    plan = schedule.build(p, chosen, given, by_column=by_column, every=every)
    return mask, plan

  @parameterized.product(by_column=(False, True), traced=(False, True))
  def test_computing_visits_are_the_visible_tiles(self, by_column, traced):
    mask, plan = self.plan(by_column, traced)
    for head in range(2):
      found = [
        (i, j) for i, j, f, _ in visits(plan, head) if f & schedule.COMPUTE
      ]
      order = np.argwhere(mask[head].T)[:, ::-1] if by_column else None
      want = np.argwhere(mask[head]) if order is None else order
      np.testing.assert_array_equal(found, want)

  @parameterized.product(by_column=(False, True), every=(False, True))
  def test_each_row_is_started_once_and_written_once(self, by_column, every):
    _, plan = self.plan(by_column, every=every)
    for head in range(2):
      table = [v for v in visits(plan, head) if v[2]]
      for row in range(5):
        mine = [f for i, _, f, _ in table if i == row]
        self.assertTrue(mine[0] & schedule.ROW_FIRST)
        self.assertTrue(mine[-1] & schedule.ROW_LAST)
        self.assertLen([f for f in mine if f & schedule.ROW_FIRST], 1)
        self.assertLen([f for f in mine if f & schedule.ROW_LAST], 1)
      for i, _, flags, out_row in table:
        if flags & schedule.ROW_LAST:
          self.assertEqual(out_row, i)
      spans = [row for _, _, _, row in table]
      changes = sum(a != b for a, b in itertools.pairwise(spans))
      self.assertEqual(changes, 4)  # an output block never comes back

  def test_static_grids_shrink_and_causality_hides_tiles(self):
    _, plan = self.plan(False)
    self.assertLess(plan.visits, 5 * 7 * 0.6)
    p = problem(1, 2, 2048, 2048, causal=True)
    plan = schedule.build(p, tiles.choose(p, False), None, by_column=False)
    self.assertEqual(plan.visits, 4 * 5 // 2)
    partial = [v for v in visits(plan) if v[2] & schedule.PARTIAL]
    self.assertLen(partial, 4)  # the diagonal


class TilesTest(parameterized.TestCase):
  @parameterized.product(
    t=(1, 64, 130, 512, 700, 1408, 5000), s=(48, 384, 2048), heads=(2, 12)
  )
  def test_tiles_cover_with_little_padding(self, t, s, heads):
    p = problem(2, heads, t, s)
    items = set()
    for by_column in (False, True):
      x = tiles.choose(p, by_column)
      items.add((x.t_item, x.s_item))
      self.assertEqual(heads % x.heads, 0)
      for length, pad, step, item in (
        (t, x.t_pad, x.t, x.t_item),
        (s, x.s_pad, x.s, x.s_item),
      ):
        self.assertEqual((pad % step, step % item), (0, 0))
        self.assertLess(pad - length, max(128, length / 8))
      self.assertLessEqual(x.heads * x.t * x.s, tiles.STEP_SCORES)
    self.assertLen(items, 1)  # the hardware generator is seeded by item

  def test_tiles_that_do_not_fit_are_refused(self):
    q = jnp.zeros((1, 2, 16, 256))
    run = dict(layout="bhdt", backend="tpu", interpret=True)
    with self.assertRaisesRegex(Unsupported, r"tiles=\(100, 128\).*of 128"):
      flash_attention(q, q, q, tiles=(100, 128), **run)
    mask = np.ones((2, 2), bool)
    with self.assertRaisesRegex(Unsupported, r"tiles=\(256, 128\) do not"):
      flash_attention(q, q, q, tiles=(256, 128), block_mask=mask, **run)
    mask = np.ones((64, 64), bool)
    with self.assertRaisesRegex(
      Unsupported, r"blocks of \(4, 4\).*multiples of 8"
    ):
      flash_attention(q, q, q, block_mask=mask, **run)


STEPS = {
  # Several steps, two rows of items in each, statistics across steps.
  "causal": dict(sizes=(1, 2, 1, 1100, 1300), causal=True),
  "bias_and_alibi": dict(
    sizes=(1, 1, 1, 700, 1600),
    diff=dict(bias=(1, 1, 700, 1600), alibi_slopes=(1,)),
  ),
  "bias_per_key": dict(
    sizes=(2, 2, 2, 700, 1600), diff=dict(bias=(1, 2, 1, 1600)), window=(300, 9)
  ),
  "relative": dict(
    sizes=(2, 2, 1, 300, 1000),
    diff=dict(relative_bias=(1, 2, 1299), relative_keys=(1, 1299, 16)),
    window=(500, 200),
  ),
  "relative_fine_blocks": dict(
    sizes=(1, 2, 2, 520, 400),
    blocks=(2, 13, 10),
    block_size=(40, 40),
    diff=dict(relative_bias=(1, 1, 919), relative_queries=(2, 919, 16)),
  ),
  "traced_fine_blocks": dict(
    sizes=(1, 2, 2, 520, 400), blocks=(2, 13, 10), block_size=(40, 40)
  ),
  "large_blocks": dict(
    sizes=(1, 1, 1, 1536, 1536), blocks=(1, 2, 2), block_size=(768, 768)
  ),
}


class StepsTest(parameterized.TestCase):
  def check(self, sizes, diff=(), blocks=None, tiles=None, **arguments):
    arrays = qkv(*sizes)
    diff = {n: np.abs(normal(4, *shape)) / 4 for n, shape in dict(diff).items()}
    if blocks is not None:
      mask = np.random.default_rng(1).random(blocks) < 0.5
      traced = blocks[0] > 1
      arguments["block_mask"] = jax.device_put(mask) if traced else mask
    found = gradients("tpu", arrays, diff, tiles=tiles, **arguments)
    want = gradients("reference", arrays, diff, **arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      # Sums of up to 1600 float32 terms; slopes weigh distances up to 1600.
      scale = max(1.0, np.abs(b).max())
      np.testing.assert_allclose(a, b, atol=3e-5 * scale)

  @parameterized.product(name=tuple(STEPS))
  def test_many_steps_equal_the_reference(self, name):
    self.check(**STEPS[name])

  @parameterized.named_parameters(
    ("causal", dict(causal=True)),
    ("bias", dict(diff=dict(bias=(2, 2, 700, 200)))),
    (
      "relative",
      dict(
        diff=dict(
          relative_bias=(2, 1, 899),
          relative_keys=(1, 899, 16),
          relative_queries=(2, 899, 16),
        )
      ),
    ),
    (
      "blocks_and_dropout",
      dict(
        sizes=(2, 2, 1, 300, 200),
        blocks=(1, 3, 2),
        block_size=(128, 128),
        dropout_rate=0.3,
        dropout_seed=1,
      ),
    ),
  )
  def test_queries_in_parts_equal_the_reference(self, arguments):
    solve = tpu._part_gradients
    with (
      mock.patch.object(tiles, "DQ_BYTES", 4 * 16 * 128),
      mock.patch.object(tpu, "_part_gradients", side_effect=solve) as parts,
    ):
      self.check(**{"sizes": (2, 2, 1, 700, 200), **arguments})
    self.assertGreater(parts.call_count, 1)

  def test_operands_by_tile_equal_operands_by_head(self):
    arrays = qkv(1, 1, 1, 1100, 1300)
    want = gradients("tpu", arrays, {})
    with mock.patch.multiple(tiles, WHOLE_BYTES=0, HEADS_BYTES=0):
      found = gradients("tpu", arrays, {})
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters((128, 256), (256, 128))
  def test_tile_sizes_change_nothing(self, *given):
    self.check(
      sizes=(1, 2, 1, 300, 400),
      diff=dict(bias=(1, 2, 1, 400)),
      causal=True,
      dropout_rate=0.2,
      dropout_seed=4,
      tiles=given,
    )


class SkewTest(parameterized.TestCase):
  @parameterized.product(rows=(8, 128))
  def test_rows_move_by_their_index_and_back(self, rows):
    strips = [np.asarray(normal(seed, 128, 384)) for seed in (0, 1)]
    place = np.arange(256)[None] - np.arange(128)[:, None] + 127
    found = skew.skew([jnp.asarray(x) for x in strips], rows)
    for x, y in zip(found, strips, strict=True):
      np.testing.assert_array_equal(x, np.take_along_axis(y, place, 1))
    want = np.zeros((128, 384), np.float32)
    np.put_along_axis(want, place, np.asarray(found[1]), 1)
    _, back = skew.unskew(found, rows)
    np.testing.assert_array_equal(back, want)
    entries = jnp.asarray(strips[0][:1])
    equal = jax.jit(functools.partial(skew.toeplitz, rows=rows))(entries)
    np.testing.assert_array_equal(equal, strips[0][0, place])

  def test_the_rows_of_a_register_go_together_on_the_chip(self):
    # Interpreted, all 128 rows of a strip do: see `relative.Terms`.
    diff = dict(
      relative_bias=normal(4, 1, 1, 255),
      relative_keys=normal(5, 1, 255, 16),
      relative_queries=normal(6, 1, 255, 16),
    )
    arrays = qkv(1, 1, 1, 128, 128)
    want = gradients("tpu", arrays, diff)
    with mock.patch.object(relative, "ROWS_INTERPRETED", 8):
      found = gradients("tpu", arrays, diff)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, atol=1e-6)


class TrafficTest(parameterized.TestCase):
  def moved(self, fn, *arrays):
    """Bytes between HBM and VMEM: a block moves when its index changes."""
    total = 0

    def pallas_call(kernel, *, grid_spec, out_shape, **_):
      def run(*operands):
        nonlocal total
        table = operands[: grid_spec.num_scalar_prefetch]
        table = [np.asarray(x) for x in table]
        operands = operands[len(table) :]
        specs = [*grid_spec.in_specs, *grid_spec.out_specs]
        for spec, x in zip(specs, (*operands, *out_shape), strict=True):
          before = None
          for step in np.ndindex(grid_spec.grid):
            index = tuple(int(n) for n in spec.index_map(*step, *table))
            if index != before:
              total += np.prod(spec.block_shape) * x.dtype.itemsize
            before = index
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

      return run

    with mock.patch.object(pl, "pallas_call", pallas_call):
      fn(*arrays)
    return total

  @parameterized.parameters(
    (2, 4, 512), (3, 12, 128), (1, 2, 2048), (1, 1, 8192)
  )
  def test_arrays_cross_hbm_once(self, b, h, t):
    x = jnp.zeros((b, h, 64, t), jnp.bfloat16)
    lse = jnp.zeros((b, h, t))
    options = Options(scale=0.1, layout="bhdt")
    total = self.moved(
      lambda x: tpu.forward(x, x, x, Extras(), options), x
    ) + self.moved(
      lambda x: tpu.backward(
        x, x, x, Extras(), options, x, lse, x, jnp.zeros_like(lse)
      ),
      x,
    )
    # q, k, v, out forward; q, k, v, out, dout, dq, dk, dv backward.
    once = 12 * x.size * 2 + 2 * lse.size * 4
    self.assertLess(total, 1.05 * once)


class _Generator:
  """Stands in for the TPU's generator, whose interpreter returns constants."""

  def seed(self, *words):
    self.words = words

  def bits(self, shape):
    x = jax.lax.broadcasted_iota(jnp.uint32, shape, 0) * np.uint32(0x9E3779B9)
    x = x ^ (jax.lax.broadcasted_iota(jnp.uint32, shape, 1) + np.uint32(1))
    for word in self.words:
      x = (x ^ word.astype(jnp.uint32)) * np.uint32(0x7FEB352D)
      x = x ^ (x >> np.uint32(15))
    return (x * np.uint32(0x846CA68B)).astype(jnp.int32)


class HardwareDropoutTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    fake = _Generator()
    for name, method in (
      ("prng_seed", fake.seed),
      ("prng_random_bits", fake.bits),
    ):
      self.enter_context(mock.patch.object(pltpu, name, method))

  def test_both_passes_drop_the_same_weights(self):
    # Forward steps have one row of items, backward steps two.
    b, h, t, s, rate = 1, 2, 700, 1600, 0.3
    q, k, v, weights = qkv(b, h, h, t, s)
    run = dict(dropout_rate=rate, dropout_seed=3, dropout_generator="hardware")
    eye = np.broadcast_to(np.eye(s, dtype=np.float32), (b, h, s, s))
    attend = functools.partial(
      flash_attention, layout="bhdt", backend="tpu", interpret=True, **run
    )
    kept = np.array(jax.jit(attend)(q, k, eye)) != 0  # [b, h, s, t]
    self.assertAlmostEqual(float(kept.mean()), 1 - rate, delta=2e-3)
    # Independent items agree on 1 - 2 rate (1 - rate) of their weights.
    agree = float((kept[0, 0] == kept[0, 1]).mean())
    self.assertAlmostEqual(agree, 1 - 2 * rate * (1 - rate), delta=3e-3)
    agree = float((kept[0, 0, :512, :256] == kept[0, 0, 512:1024, :256]).mean())
    self.assertAlmostEqual(agree, 1 - 2 * rate * (1 - rate), delta=5e-3)

    def dense(q, k, v):
      x = jnp.einsum("bhdt,bhds->bhst", q, k) * q.shape[2] ** -0.5
      p = jnp.where(kept, jax.nn.softmax(x, axis=2) / (1 - rate), 0.0)
      out = jnp.einsum("bhst,bhds->bhdt", p, v)
      return (out * weights).sum() + jnp.sin(jax.nn.logsumexp(x, 2)).sum()

    _, found = gradients("tpu", (q, k, v, weights), {}, **run)
    want = jax.device_get(jax.jit(jax.grad(dense, (0, 1, 2)))(q, k, v))
    for a, b in zip(found[:3], want):
      np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max())

  def test_seeds_differ_by_seed_example_head_and_place(self):
    def words(seed, *place):
      seed = [jnp.uint32(x) for x in (*seed, 0, 0, 0, 0)]
      return tuple(int(x) for x in scores.item_seed(seed, *place))

    places = [
      (b, h, t, s)
      for b in (0, 1)
      for h in (0, 1)
      for t in (0, 512)
      for s in (0, 512)
    ]
    seen = {words(seed, *p) for seed in ((1, 2), (2, 1)) for p in places}
    self.assertLen(seen, 2 * len(places))


T5 = dict(relative_bias=True)
DEBERTA = dict(relative_keys=True, relative_queries=True)
BERT = dict(segment_ids=True, dropout_rate=0.1, dropout_seed=1)


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class CompilerTest(parameterized.TestCase):
  def compiled(self, topology, sizes, **arguments):
    devices = topologies.devices(topologies.parse(topology))
    lowered = programs.lower(devices, sizes=sizes, **arguments)
    return lowered.compile()

  @parameterized.named_parameters(
    # A v4 has the least VMEM; its longest rows are in `tpu_battery_test`.
    ("v4_float32", "v4:2x2x1", (1, 4, 512, 64), "float32", dict(bias="key")),
    ("v5e", "v5e:2x2", (2, 12, 128, 64), "bfloat16", BERT | dict(bias="key")),
    ("v5p", "v5p:2x2x1", (1, 2, 200, 80), "bfloat16", dict(causal=True)),
    # A v4 has no strided rotation.
    ("v4_deberta", "v4:2x2x1", (1, 1, 256, 64), "float32", BERT | DEBERTA),
    ("v5e_deberta", "v5e:2x2", (1, 1, 512, 64), "bfloat16", DEBERTA),
    ("v5p_t5", "v5p:2x2x1", (1, 2, 200, 80), "bfloat16", T5),
    (
      "v6e",
      "v6e:2x2",
      (1, 4, 512, 32),
      "bfloat16",
      BERT | dict(dropout_generator="hardware"),
    ),
  )
  def test_compiles_within_vmem(self, *case):
    self.check_vmem(*case)

  @parameterized.named_parameters(
    ("v4_t5", "v4:2x2x1", (1, 1, 512, 64), "bfloat16", BERT | T5),
    ("v6e_deberta", "v6e:2x2", (1, 2, 100, 80), "bfloat16", DEBERTA),
  )
  @pytest.mark.slow
  def test_further_chips_compile_within_vmem(self, *case):
    self.check_vmem(*case)

  def check_vmem(self, topology, sizes, dtype, options):
    compiled = self.compiled(topology, sizes, dtype=dtype, options=options)
    calls = re.findall(r"custom_call_target=\"(\w+)\"", compiled.as_text())
    kernels = 3 if "bias" in options else 2
    self.assertEqual(calls.count("tpu_custom_call"), kernels)

  @parameterized.parameters({}, T5)
  def test_memory_is_linear_in_the_length(self, **options):
    t = 8192
    compiled = self.compiled("v5e:2x2", (1, 1, t, 64), options=options)
    for dims in re.findall(r"\w+\[([\d,]+)\]", compiled.as_text()):
      self.assertLess(dims.split(",").count(str(t)), 2)
    # The output and its cotangent: less than an eighth of a byte per score.
    self.assertLess(
      compiled.memory_analysis().temp_size_in_bytes, 2 * t * 64 * 2
    )

  @parameterized.parameters(
    # Whole gradients of stock flash attention with its best tiles take
    # 1,386,649 with segment ids, and 284,067 cycles.
    ((8, 16, 512, 64), dict(segment_ids=True), 400_000),
    ((16, 12, 128, 64), {}, 55_000),
  )
  def test_cycles_on_v5e(self, sizes, options, cycles):
    self.check_cycles(sizes, options, cycles)

  @pytest.mark.slow
  def test_cycles_of_long_plain_rows_on_v5e(self):
    # Segment ids add to them; stock flash attention takes 1,334,522.
    self.check_cycles((8, 16, 512, 64), {}, 370_000)

  @pytest.mark.slow
  def test_cycles_of_relative_positions_on_v5e(self):
    # A bias that is written out takes 615,383.
    self.check_cycles((8, 16, 512, 64), T5, 470_000)

  def check_cycles(self, sizes, options, cycles):
    program = hardware.compile_for(
      "v5e:2x2", programs.lower, sizes=sizes, options=options
    )
    self.assertLess(hardware.price(program).cycles, cycles)


if __name__ == "__main__":
  absltest.main()
