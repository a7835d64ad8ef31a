"""Sequences end to end give what padded ones do."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kernels.flash_attention import flash_attention, varlen
from tests.draws import normal

LENGTHS = np.array([150, 3, 200, 40])
H, KV, D, DV, TOTAL = 4, 2, 8, 12, 420  # 27 places are beyond the last
ENDS = np.concatenate([[0], np.cumsum(LENGTHS)])


def relative(keys):
  """Terms of relative positions of TOTAL queries and so many keys."""
  n = TOTAL + keys - 1
  return {
    "relative_bias": normal(6, 1, H, n),
    "relative_keys": normal(7, KV, n, D),
    "relative_queries": normal(8, 1, n, D),
  }


def alone(options, keys, t, s):
  """The options of one sequence of t queries and s keys."""
  changes = {}
  for name in varlen.RELATIVE & set(options):
    # Of differences of positions from -(s - 1) to t - 1.
    axis = 2 if name == "relative_bias" else 1
    changes[name] = jax.lax.slice_in_dim(
      options[name], keys - s, keys + t - 1, axis=axis
    )
  return options | changes


def padded(x):
  rows = [x[a : a + n] for a, n in zip(ENDS, LENGTHS)]
  longest = LENGTHS.max()
  return jnp.stack(
    [jnp.pad(r, ((0, longest - len(r)), (0, 0), (0, 0))) for r in rows]
  )


def unpadded(x):
  rows = jnp.concatenate([x[i, :n] for i, n in enumerate(LENGTHS)])
  return jnp.pad(rows, ((0, TOTAL - len(rows)), (0, 0), (0, 0)))


class VarlenTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("plain", {}),
    ("causal", {"causal": True}),
    ("window_alibi", {"window": 30, "alibi_slopes": jnp.arange(H) / 16}),
    ("relative", relative(TOTAL)),
  )
  def test_equals_padded_sequences(self, options):
    x = (
      normal(0, TOTAL, H, D),
      normal(1, TOTAL, KV, D),
      normal(2, TOTAL, KV, DV),
    )
    weights = normal(3, TOTAL, H, DV)

    def packed(*x):
      out = varlen.flash_attention_varlen(
        *x, jnp.asarray(ENDS), backend="blockwise", **options
      )
      return (out * weights).sum(), out

    def separate(*x):
      q, k, v = map(padded, x)
      ids = jnp.arange(q.shape[1])[None] < LENGTHS[:, None]
      length = q.shape[1]
      out = flash_attention(
        q,
        k,
        v,
        segment_ids=ids,
        backend="blockwise",
        **alone(options, TOTAL, length, length),
      )
      return (unpadded(out) * weights).sum(), unpadded(out)

    found, want = (
      jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(*x)
      for f in (packed, separate)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, atol=1e-4)

  @parameterized.named_parameters(
    ("plain", {}),
    ("causal", {"causal": True}),
    ("alibi", {"alibi_slopes": jnp.arange(H) / 16}),
    ("window_alibi", {"window": 30, "alibi_slopes": jnp.arange(H) / 16}),
    ("relative", relative(300)),
    ("causal_bias", {"causal": True, "bias": normal(5, 1, H, TOTAL, 300)}),
    ("window_bias_per_key", {"window": 9, "bias": normal(5, 1, 1, 1, 300)}),
  )
  def test_queries_and_keys_may_be_cut_differently(self, options):
    kv_lengths = np.array([20, 100, 7, 160])  # more and fewer than queries
    kv_ends = np.concatenate([[0], np.cumsum(kv_lengths)])
    x = normal(0, TOTAL, H, D), normal(1, 300, KV, D), normal(2, 300, KV, DV)
    weights = normal(3, TOTAL, H, DV)

    def packed(*x):
      out, lse = varlen.flash_attention_varlen(
        *x,
        jnp.asarray(ENDS),
        jnp.asarray(kv_ends),
        backend="blockwise",
        return_lse=True,
        **options,
      )
      seen = jnp.where(lse == -jnp.inf, 0.0, lse)
      return (out * weights).sum() + seen.sum(), (out, seen)

    def separate(q, k, v):
      outs, lses = [], []
      for i, (rows, keys) in enumerate(zip(LENGTHS, kv_lengths)):
        here = slice(ENDS[i], ENDS[i] + rows)
        there = slice(kv_ends[i], kv_ends[i] + keys)
        own = alone(options, 300, int(rows), int(keys))
        if "bias" in options:
          bias = options["bias"]
          bias = bias[:, :, here] if bias.shape[2] > 1 else bias
          own["bias"] = bias[..., there]
        out, lse = flash_attention(
          q[None, here],
          k[None, there],
          v[None, there],
          backend="reference",
          return_lse=True,
          **own,
        )
        outs.append(out[0])
        lses.append(lse[0])
      missing = TOTAL - ENDS[-1]
      out = jnp.pad(jnp.concatenate(outs), ((0, missing), (0, 0), (0, 0)))
      lse = jnp.pad(jnp.concatenate(lses, axis=1), ((0, 0), (0, missing)))
      seen = jnp.where(lse == -jnp.inf, 0.0, lse)
      return (out * weights).sum() + seen.sum(), (out, seen)

    found, want = (
      jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(*x)
      for f in (packed, separate)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, atol=1e-4)

  def test_only_blocks_where_sequences_meet_are_visited(self):
    ids = np.asarray(varlen.segment_ids(jnp.asarray(ENDS), TOTAL))
    np.testing.assert_array_equal(
      ids, np.repeat([1, 2, 3, 4, 0], [*LENGTHS, TOTAL - LENGTHS.sum()])
    )
    found = varlen.meeting_blocks(jnp.asarray(ids), jnp.asarray(ids))
    same = np.equal.outer(ids, ids) & (ids > 0)
    for i, j in np.ndindex(found.shape):
      part = same[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
      self.assertEqual(found[i, j], part.any())
    self.assertFalse(found.all())

  def test_what_has_no_meaning_is_refused(self):
    q = normal(0, TOTAL, H, D)
    with self.assertRaisesRegex(ValueError, "block_mask is not an option"):
      varlen.flash_attention_varlen(q, q, q, ENDS, block_mask=None)


if __name__ == "__main__":
  absltest.main()
