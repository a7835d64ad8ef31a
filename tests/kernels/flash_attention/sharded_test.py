"""Attention split over 8 devices equals the whole one, with its gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kernels.flash_attention import (
  Sharding,
  blockwise,
  flash_attention,
  ring,
  sharded,
  zigzag,
)
from kernels.flash_attention.layouts import sizes
from kernels.flash_attention.options import Extras, Options
from kernels.flash_attention.relative import Relative
from kernels.flash_attention.ring import merge
from tests.draws import normal
from tests.kernels.flash_attention.cases import DIFFERENTIABLE

B, T, H, KV, D, DV = 4, 48, 4, 2, 8, 16
AUTO = jax.sharding.AxisType.Auto
MESH = jax.make_mesh(
  (2, 2, 2),
  ("data", "model", "seq"),
  axis_types=(AUTO,) * 3,
)
BATCH_AND_HEADS = Sharding(batch=("data",), heads=("model",))
RING = Sharding(batch=("data",), heads=("model",), sequence="seq")
GATHER = RING._replace(gather=True)
IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (B, T))))

OPTIONS = {
  "plain": {},
  "bias_per_key": {"bias": normal(5, B, 1, 1, T)},
  "alibi_causal": {"alibi_slopes": jnp.arange(H) / 8, "causal": True},
  "relative_segments": {
    "relative_bias": normal(5, B, 1, 2 * T - 1),
    "relative_keys": normal(6, 1, 2 * T - 1, D),
    "segment_ids": IDS,
  },
  "relative_causal": {
    "relative_keys": normal(6, KV, 2 * T - 1, D),
    "relative_queries": normal(7, H, 2 * T - 1, D),
    "causal": True,
  },
  "causal_segments_bias": {
    "causal": True,
    "segment_ids": IDS,
    "bias": normal(5, 1, H, T, T),
  },
  "window_dropout": {
    "window": (9, 20),
    "dropout_rate": 0.3,
    "dropout_seed": 7,
    "segment_ids": IDS,
  },
}
# Every argument in one of two problems: each has its own gradient.
ALL_ARGUMENTS = {
  "window_dropout_segments_bias_per_key_alibi": OPTIONS["window_dropout"]
  | OPTIONS["bias_per_key"]
  | {"alibi_slopes": OPTIONS["alibi_causal"]["alibi_slopes"]},
  "relative_causal_segments_bias_per_head": OPTIONS["relative_causal"]
  | OPTIONS["causal_segments_bias"]
  | {"relative_bias": OPTIONS["relative_segments"]["relative_bias"]},
}
PROBLEMS = {**OPTIONS, **ALL_ARGUMENTS}


def solve(options, sharding, **more):
  """(out, lse), and gradients of all arrays of floats."""
  options = dict(options)
  diff = {
    "q": normal(0, B, T, H, D),
    "k": normal(1, B, T, KV, D),
    "v": normal(2, B, T, KV, DV),
  }
  for key in (*diff, *DIFFERENTIABLE):
    if key in options:
      diff[key] = options.pop(key)
  weights = normal(3, B, T, H, DV), normal(4, B, H, T)

  def loss(diff):
    out, lse = flash_attention(
      **diff,
      **options,
      **more,
      sharding=sharding,
      backend="blockwise",
      return_lse=True,
    )
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    return (out * weights[0]).sum() + (lse * weights[1]).sum(), (out, lse)

  with jax.set_mesh(MESH):
    grads, found = jax.jit(jax.grad(loss, has_aux=True))(diff)
  return jax.device_get((found, grads))


class ShardedTest(parameterized.TestCase):
  @parameterized.parameters(
    # A ring splits examples and heads as well.
    *((name, RING) for name in OPTIONS),
    *itertools.product(("plain", *ALL_ARGUMENTS), (BATCH_AND_HEADS, GATHER)),
  )
  def test_equals_the_whole(self, name, sharding):
    found = solve(PROBLEMS[name], sharding)
    want = self.whole(name)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      scale = max(1.0, np.abs(b).max())
      np.testing.assert_allclose(a, b, atol=2e-5 * scale)

  @staticmethod
  @functools.cache
  def whole(name):
    return solve(PROBLEMS[name], None)

  def test_a_block_mask_per_head_follows_its_heads(self):
    mask = np.random.default_rng(1).random((H, 3, 3)) < 0.6
    found = solve({"block_mask": mask}, BATCH_AND_HEADS)
    want = solve({"block_mask": mask}, None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)

  def test_the_ring_holds_one_shard_of_the_keys(self):
    q = jax.ShapeDtypeStruct((B, T, H, D), jnp.float32)

    def loss(q, k, v, sharding):
      out = flash_attention(q, k, v, sharding=sharding, backend="blockwise")
      return out.sum()

    with jax.set_mesh(MESH):
      texts = [
        str(
          jax.make_jaxpr(
            jax.grad(functools.partial(loss, sharding=sharding), (0, 1, 2))
          )(q, q, q)
        )
        for sharding in (RING, GATHER)
      ]
    self.assertNotIn("all_gather", texts[0])
    self.assertIn("ppermute", texts[0])
    self.assertIn("all_gather", texts[1])

  def test_what_does_not_divide_is_refused(self):
    x = jnp.zeros((3, T, H, D))
    with (
      jax.set_mesh(MESH),
      self.assertRaisesRegex(ValueError, "3 examples.*2 devices"),
    ):
      flash_attention(x, x, x, sharding=BATCH_AND_HEADS)

  @parameterized.parameters(
    # Every pair of (sharding, traced, causal).
    (RING, False, False),
    (RING, True, True),
    (GATHER, False, True),
    (GATHER, True, False),
  )
  def test_a_block_mask_on_a_ring(self, sharding, traced, causal):
    mask = self.block_mask()
    given = jax.device_put(mask) if traced else mask
    found = solve({"block_mask": given, "causal": causal}, sharding)
    want = self.whole_under_a_block_mask(causal)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)

  @staticmethod
  def block_mask():
    """Blocks of 8 x 12, six by four; the second half sees none of the first."""
    mask = np.random.default_rng(1).random((H, 6, 4)) < 0.6
    mask[:, 3:, :2] = False
    return mask

  @classmethod
  @functools.cache
  def whole_under_a_block_mask(cls, causal):
    return solve({"block_mask": cls.block_mask(), "causal": causal}, None)

  @parameterized.product(sharding=(RING, GATHER), traced=(False, True))
  def test_a_block_mask_of_one_block_on_each_device(self, sharding, traced):
    mask = np.array([[True, True], [False, True]])
    given = jax.device_put(mask) if traced else mask
    # Heads of their own: keys that several share take another way.
    keys = {"k": normal(1, B, T, H, D), "v": normal(2, B, T, H, DV)}
    found = solve({"block_mask": given, **keys}, sharding)
    want = solve({"block_mask": mask, **keys}, None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)

  def test_turns_in_which_nobody_sees_anything_compute_nothing(self):
    diagonal = np.eye(8, dtype=bool)[None]
    self.assertEqual(ring._turns(diagonal, 4), (True, False, False, False))
    diagonal[0, 0, 7] = True  # device 0 needs what it holds in turn 1
    self.assertEqual(ring._turns(diagonal, 4), (True, True, False, False))

  @parameterized.parameters(RING, GATHER)
  def test_blocks_that_shards_cut_are_refused(self, *sharding):
    with self.assertRaisesRegex(
      ValueError, r"\(16, 16\) does not divide.*2 dev"
    ):
      solve({"block_mask": np.ones((3, 3), bool)}, Sharding(*sharding))

  @parameterized.product(
    call=(ring.ring_attention, ring.gathered_attention),
    given=(
      (
        Extras(bias=jnp.zeros((1, 1, 1, T // 2))),
        f"bias has shape .*, {T // 2}.; on every device .* all {T} keys",
      ),
      (
        Extras(relative=Relative(bias=jnp.zeros((1, 1, T - 1)))),
        f"relative_bias has {T - 1} entries; .* all {2 * T - 1}",
      ),
      (Extras(offset=jnp.int32(0)), "offset is set by the ring itself"),
    ),
  )
  def test_devices_refuse_what_does_not_span_all_of_them(self, call, given):
    extras, message = given

    def local(x):
      return call(blockwise, "seq", x, x, x, extras, Options(scale=1.0))

    split = jax.sharding.PartitionSpec(None, "seq")
    with (
      jax.set_mesh(MESH),
      self.assertRaisesRegex(ValueError, message),
    ):
      jax.eval_shape(
        jax.shard_map(
          local, in_specs=split, out_specs=(split, split), check_vma=False
        ),
        jax.ShapeDtypeStruct((B, T, H, D), jnp.float32),
      )


ZIGZAG = RING._replace(placement="zigzag")


class ZigzagTest(parameterized.TestCase):
  def test_the_order_gives_each_device_an_early_and_a_late_part(self):
    np.testing.assert_array_equal(
      zigzag.zigzag_order(12, 3), [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    )
    with self.assertRaisesRegex(ValueError, "length=10.*each of 3"):
      zigzag.zigzag_order(10, 3)

  @parameterized.named_parameters(
    ("plain", {}),
    ("segments_bias_per_head", OPTIONS["causal_segments_bias"]),
    (
      "bias_per_key_capped_dropout",
      {
        **OPTIONS["bias_per_key"],
        "logit_softcap": 2.0,
        "dropout_rate": 0.3,
        "dropout_seed": 3,
      },
    ),
  )
  def test_equals_the_whole_in_order(self, options):
    order = zigzag.zigzag_order(T, MESH.shape["seq"])
    # A causal mask of blocks of one position, in the order of the shards.
    mask = order[None, :] <= order[:, None]
    found = solve(options | {"causal": True}, ZIGZAG)
    want = solve(options | {"block_mask": mask, "causal": False}, None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      scale = max(1.0, np.abs(b).max())
      np.testing.assert_allclose(a, b, atol=2e-5 * scale)

  def work(self, sharding, count=4):
    """Products of a query and a key that each device computes, forward."""
    done = np.zeros(count)

    class Counting:
      CAPABILITIES = blockwise.CAPABILITIES

      @staticmethod
      def forward(q, k, v, extras, options):
        n = sizes(q, k, v, options.layout)
        if options.causal and extras.offset is not None:
          distance = jnp.arange(n.t)[:, None] + extras.offset
          pairs = (jnp.arange(n.s)[None] <= distance).sum()
        else:
          pairs = n.t * (n.s + 1) // 2 if options.causal else n.t * n.s

        def add(device, pairs):
          done[int(device)] += int(pairs)

        jax.debug.callback(add, jax.lax.axis_index("seq"), pairs)
        return blockwise.forward(q, k, v, extras, options)

    mesh = jax.make_mesh((count,), ("seq",), axis_types=(AUTO,))
    x = normal(0, 1, T, H, D)
    options = Options(scale=1.0, causal=True)
    with jax.set_mesh(mesh):
      attend = functools.partial(
        sharded.attend, Counting, extras=Extras(), options=options
      )
      jax.jit(functools.partial(attend, sharding=sharding))(x, x, x)
    jax.effects_barrier()
    return done

  def test_work_is_balanced(self):
    contiguous = self.work(Sharding(sequence="seq"))
    balanced = self.work(Sharding(sequence="seq", placement="zigzag"))
    self.assertEqual(contiguous.sum(), T * (T + 1) / 2)
    self.assertEqual(balanced.sum(), T * (T + 1) / 2)
    self.assertEqual(balanced.max(), balanced.min())
    # The last of 4 devices sees 3.5 of the 8 shards that all see together.
    self.assertGreater(contiguous.max() / contiguous.mean(), 1.7)

  @parameterized.named_parameters(
    ("window", dict(causal=True, window=9), ZIGZAG, "window counts positions"),
    (
      "relative",
      dict(causal=True, relative_bias=normal(5, 1, H, 2 * T - 1)),
      ZIGZAG,
      "relative_bias counts positions",
    ),
    ("open", {}, ZIGZAG, "balances causal attention"),
    (
      "gather",
      dict(causal=True),
      ZIGZAG._replace(gather=True),
      "'zigzag' is of a ring",
    ),
    (
      "unknown",
      dict(causal=True),
      RING._replace(placement="striped"),
      "placement='striped' is unknown; choose from contiguous, zigzag",
    ),
  )
  def test_what_it_cannot_do_is_named(self, options, sharding, message):
    with self.assertRaisesRegex(ValueError, message):
      solve(options, sharding)

  @parameterized.parameters((50, 50), (48, 44))
  def test_parts_that_are_not_alike_are_refused(self, queries, keys):
    q, k = (
      jax.ShapeDtypeStruct((B, n, H, D), jnp.float32) for n in (queries, keys)
    )
    attend = functools.partial(
      flash_attention, causal=True, sharding=ZIGZAG, backend="blockwise"
    )
    message = rf"a multiple of 4 for 2 devices, not \({queries}, {keys}\)"
    with (
      jax.set_mesh(MESH),
      self.assertRaisesRegex(ValueError, message),
    ):
      jax.eval_shape(attend, q, k, k)


class MergeTest(parameterized.TestCase):
  @parameterized.parameters("bthd", "bhtd", "bhdt")
  def test_parts_of_the_keys_merge_to_the_whole(self, layout):
    order = ["bthd".index(c) for c in layout]
    q, k, v = (
      normal(i, 2, n, 3, d).transpose(order)
      for i, (n, d) in enumerate(((5, 4), (11, 4), (11, 6)))
    )
    lengths = jnp.array([3, 11])  # the first example has no key in part two
    axis = layout.index("t")
    run = functools.partial(
      flash_attention, backend="blockwise", layout=layout, return_lse=True
    )
    parts = [
      run(q, *(jnp.split(x, [4], axis)[i] for x in (k, v)), kv_lengths=n)
      for i, n in ((0, jnp.minimum(lengths, 4)), (1, lengths - 4))
    ]
    found = merge(*parts, layout=layout)
    want = run(q, k, v, kv_lengths=lengths)
    for a, b in zip(found, want):
      np.testing.assert_allclose(a, b, atol=1e-5)


class ManualTest(parameterized.TestCase):
  @parameterized.parameters(
    (("data", "model", "seq"), Sharding()),  # nothing is left to split
    (("data",), Sharding(heads=("model",))),
    (("data", "seq"), Sharding()),  # what is left splits nothing
  )
  def test_kernels_lower_where_axes_are_split_by_hand(self, manual, sharding):
    spec = jax.sharding.PartitionSpec(manual)

    def local(q, k, v):
      def loss(q):
        return flash_attention(q, k, v, sharding=sharding, backend="tpu").sum()

      return jax.grad(loss)(q)

    split = jax.shard_map(
      local,
      in_specs=(spec,) * 3,
      out_specs=spec,
      axis_names=set(manual),
      check_vma=False,
    )
    arrays = [jax.ShapeDtypeStruct((8, 128, 2, 64), jnp.float32)] * 3
    with jax.set_mesh(MESH):
      lowered = jax.jit(split).trace(*arrays).lower(lowering_platforms=("tpu",))
    self.assertIn("tpu_custom_call", lowered.as_text())


if __name__ == "__main__":
  absltest.main()
