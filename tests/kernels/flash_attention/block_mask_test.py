"""Patterns have the blocks that their papers say; tables list each once."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kernels.flash_attention import block_mask as bm
from kernels.flash_attention import flash_attention
from kernels.flash_attention.layouts import Sizes
from kernels.flash_attention.options import Extras, Options, Unsupported
from tests.draws import normal
from tests.kernels.flash_attention.oracle import softmax_attention

N = 16
PATTERNS = {
  "full": bm.full(N),
  "block_diagonal": bm.block_diagonal(N, 4),
  "sliding_window": bm.sliding_window(N, 2, 1),
  "longformer": bm.longformer(N, window=3, num_global=1),
  "big_bird": bm.big_bird(N, seed=3),
  "butterfly": bm.butterfly(N, num_global=1),
  "strided": bm.strided(N, 4),
  "fixed": bm.fixed(N, 4),
  "per_head": bm.per_head(lambda h: bm.big_bird(N, seed=h), 2),
}


class PatternTest(parameterized.TestCase):
  def test_butterfly_has_one_partner_per_bit(self):
    mask = bm.butterfly(N)
    np.testing.assert_array_equal(mask.sum(1), np.log2(N) + 1)
    want = {(i, i ^ bit) for i in range(N) for bit in (0, 1, 2, 4, 8)}
    self.assertEqual(set(map(tuple, np.argwhere(mask))), want)

  def test_big_bird_counts(self):
    mask = bm.big_bird(N, window=3, num_global=2, num_random=3, seed=1)
    self.assertTrue(mask[:2].all() and mask[:, :2].all())
    # Rows far from the edges: 3 of the window, 2 global, 3 random.
    np.testing.assert_array_equal(mask[4:-1].sum(1), 8)
    heads = bm.per_head(lambda h: bm.big_bird(N, seed=h), 3)
    self.assertFalse((heads[0] == heads[1]).all())
    np.testing.assert_array_equal(heads[1], bm.big_bird(N, seed=1))

  def test_longformer_is_a_band_and_a_stripe(self):
    i, j = np.indices((N, N))
    want = (abs(i - j) <= 2) | (i < 1) | (j < 1)
    found = bm.longformer(N, window=5, num_global=1)
    np.testing.assert_array_equal(found, want)
    with self.assertRaisesRegex(ValueError, "window=4 blocks must be odd"):
      bm.longformer(N, window=4, num_global=1)

  def test_sparse_transformer_patterns(self):
    i, j = np.indices((N, N))
    np.testing.assert_array_equal(
      bm.strided(N, 4), (abs(i - j) < 4) | ((i - j) % 4 == 0)
    )
    np.testing.assert_array_equal(
      bm.fixed(N, 4, 2), (i // 4 == j // 4) | (j % 4 >= 2)
    )

  @parameterized.parameters(*PATTERNS)
  def test_attention_equals_the_dense_masked_one(self, name):
    block, mask = 2, PATTERNS[name]
    q, k, v = (normal(i, 1, N * block, 2, 4) for i in range(3))
    found = flash_attention(q, k, v, block_mask=mask, backend="blockwise")
    shown = np.kron(mask, np.ones((block, block), bool))
    want, _ = softmax_attention(
      q, k, v, visible=shown if mask.ndim == 3 else shown[None, None]
    )
    np.testing.assert_allclose(found, want, atol=1e-5)

  @parameterized.product(shown=(False, True), traced=(False, True))
  def test_one_block_hides_or_shows_all(self, shown, traced):
    arrays = [normal(i, 1, N, 2, 4) for i in range(3)]
    mask = np.array([[shown]])
    mask = jax.device_put(mask) if traced else mask

    def solve(backend):
      def loss(*x):
        out, lse = flash_attention(
          *x, block_mask=mask, backend=backend, return_lse=True
        )
        return (out**2).sum(), (out, lse)

      return jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)

    found, want = solve("blockwise"), solve("reference")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)


class TableTest(parameterized.TestCase):
  @parameterized.parameters(*PATTERNS)
  def test_visited_tiles_are_those_of_the_mask(self, name):
    mask = PATTERNS[name]
    mask = mask if mask.ndim == 3 else mask[None]
    static, traced = bm.table(mask), jax.jit(bm.table)(jnp.asarray(mask))
    for found in (static, traced):
      self.assertEqual(int(found.count.sum()), mask.sum())
      for h, row in np.ndindex(mask.shape[:2]):
        visited = np.asarray(found.index[h, row, : found.count[h, row]])
        np.testing.assert_array_equal(visited, np.flatnonzero(mask[h, row]))
    self.assertEqual(static.index.shape[-1], mask.sum(-1).max())
    listed, count = bm.active_list(mask)
    self.assertEqual(count, mask.sum())
    np.testing.assert_array_equal(listed, np.argwhere(mask))
    dynamic, dynamic_count = jax.jit(bm.active_list)(jnp.asarray(mask))
    np.testing.assert_array_equal(dynamic[: int(dynamic_count)], listed)

  def test_what_pads_a_row_repeats_its_last_tile(self):
    mask = np.array([[[True, False, True], [False] * 3, [False, True, False]]])
    np.testing.assert_array_equal(
      bm.table(mask).index, [[[0, 2], [0, 0], [1, 1]]]
    )

  @parameterized.product(
    limits=((True, None), (False, (40, 9)), (True, (25, 3)), (False, None)),
    lengths=((100, 150), (150, 100), (96, 96)),
  )
  def test_tiles_that_position_hides_are_left_out(self, limits, lengths):
    causal, window = limits
    t, s = lengths
    rows, columns = np.arange(t)[:, None] + s - t, np.arange(s)[None]
    shown = np.ones((t, s), bool)
    if causal:
      shown &= columns <= rows
    if window:
      shown &= (columns >= rows - window[0]) & (columns <= rows + window[1])
    options = Options(scale=1.0, causal=causal, window=window)
    n = Sizes(1, 1, 1, t, s, 8, 8)
    found = bm.tile_map(n, Extras(), options, 16, 24)
    self.assertIsInstance(found.active, np.ndarray)
    offset = jnp.int32(s - t)
    traced = bm.tile_map(n, Extras(offset=offset), options, 16, 24)
    for i, j in np.ndindex(found.active.shape[1:]):
      part = shown[i * 16 : i * 16 + 16, j * 24 : j * 24 + 24]
      self.assertEqual(found.active[0, i, j], part.any())
      self.assertEqual(found.whole[0, i, j], part.all())
      self.assertEqual(traced.active[0, i, j], part.any())

  def test_tiles_that_cut_blocks_are_refused(self):
    extras = Extras(block_mask=np.ones((1, 2, 2), bool))
    n = Sizes(1, 1, 1, 64, 64, 8, 8)
    with self.assertRaisesRegex(Unsupported, r"\(24, 16\) do not divide"):
      bm.tile_map(n, extras, Options(scale=1.0), 24, 16)


if __name__ == "__main__":
  absltest.main()
