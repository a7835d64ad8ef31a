"""Attention split over 8 devices equals the whole one, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kernels.flash_attention import Sharding, flash_attention
from kernels.flash_attention.ring import merge
from tests.kernels.flash_attention.cases import normal

B, T, H, KV, D, DV = 4, 48, 4, 2, 8, 16
MESH = jax.make_mesh(
  (2, 2, 2),
  ("data", "model", "seq"),
  axis_types=(jax.sharding.AxisType.Auto,) * 3,
)
BATCH_AND_HEADS = Sharding(batch=("data",), heads=("model",))
RING = Sharding(batch=("data",), heads=("model",), sequence="seq")
GATHER = RING._replace(gather=True)
IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (B, T))))

OPTIONS = {
  "plain": {},
  "segments": {"segment_ids": IDS},
  "bias_per_head": {"bias": normal(5, 1, H, T, T)},
  "bias_per_key": {"bias": normal(5, B, 1, 1, T)},
  "alibi_causal": {"alibi_slopes": jnp.arange(H) / 8, "causal": True},
  "window_dropout": {
    "window": (9, 20),
    "dropout_rate": 0.3,
    "dropout_seed": 7,
    "segment_ids": IDS,
  },
}


def solve(options, sharding, **more):
  """(out, lse) and gradients of q, k, v, bias and slopes."""
  options = dict(options)
  diff = {
    "q": normal(0, B, T, H, D),
    "k": normal(1, B, T, KV, D),
    "v": normal(2, B, T, KV, DV),
  }
  for key in ("bias", "alibi_slopes"):
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
  return found, grads


class ShardedTest(parameterized.TestCase):
  @parameterized.product(
    name=tuple(OPTIONS), sharding=(BATCH_AND_HEADS, RING, GATHER)
  )
  def test_equals_the_whole(self, name, sharding):
    found = solve(OPTIONS[name], sharding)
    want = solve(OPTIONS[name], None)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      scale = max(1.0, float(jnp.abs(b).max()))
      np.testing.assert_allclose(a, b, atol=2e-5 * scale)

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

  def test_a_block_mask_on_a_ring_is_refused(self):
    with self.assertRaisesRegex(ValueError, "block_mask"):
      solve({"block_mask": np.ones((3, 3), bool)}, RING)


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


if __name__ == "__main__":
  absltest.main()
