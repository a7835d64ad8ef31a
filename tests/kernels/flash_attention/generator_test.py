"""The counter generator: uniform, and independent in every direction."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from kernels.flash_attention import dropout

N = 1024
# A sound generator fails one of these in ten million runs of the suite; seeds
# are fixed, so it either always fails or never.
SIGMA = 5.5


def words(seed=0, batch=0, head=0, rows=N, columns=N):
  """uint32 [rows, columns] of one head."""
  seed = dropout.make_seed(seed)
  index = jnp.arange(rows)[:, None]
  lines = dropout.row_words(seed, jnp.int32(batch), jnp.int32(head), index)
  return np.asarray(
    dropout.bits(lines, dropout.column_word(seed, jnp.arange(columns)[None]))
  )


def kept(x, rate):
  """+-: a fair variable of mean 0 and variance 1 per element."""
  x = (x >= np.uint32(rate * 2**32)) - (1 - rate)
  return x / np.sqrt(rate * (1 - rate))


def correlations(a, b):
  """Of every row of a with every row of b, standard normal if independent."""
  return a @ b.T / np.sqrt(a.shape[1])


class UniformityTest(parameterized.TestCase):
  @parameterized.parameters(0, 8, 16, 24)
  def test_every_byte_is_uniform(self, shift):
    byte = (words() >> np.uint32(shift)) & np.uint32(255)
    counts = np.bincount(byte.ravel(), minlength=256)
    self.assertGreater(stats.chisquare(counts).pvalue, 1e-7)

  @parameterized.parameters(1e-4, 0.1, 0.5, 0.999)
  def test_the_rate_is_met_exactly(self, rate):
    seed = dropout.make_seed(1)
    mask = np.asarray(dropout.keep_mask(seed, 3, 4, 300, 500, rate))
    deviation = np.sqrt(rate * (1 - rate) / mask.size)
    self.assertAlmostEqual(1 - mask.mean(), rate, delta=SIGMA * deviation)

  def test_the_threshold_has_all_32_bits(self):
    x = jnp.asarray(words()[:1])
    # The word that decides at rate r is dropped, its successor is kept.
    signed = np.asarray(x).astype(np.int64) ^ 0x80000000
    for word in (signed[0, 3], signed[0, 77]):
      columns = int(np.flatnonzero(signed[0] == word)[0])
      for step, expected in ((0, True), (1, False)):
        seed = dropout.make_seed(0)
        rows = dropout.row_words(seed, *(jnp.int32(0),) * 3)
        keep = dropout.keep(
          rows,
          dropout.column_word(seed, jnp.int32(columns)),
          (int(word) + step) / 2**32,
        )
        self.assertEqual(bool(keep), expected)


class IndependenceTest(parameterized.TestCase):
  @parameterized.product(rate=(0.1, 0.5), axis=("rows", "columns"))
  def test_pairs_of_lines(self, rate, axis):
    x = kept(words(), rate)
    x = x if axis == "rows" else x.T
    z = correlations(x, x)[np.triu_indices(N, 1)]
    # 523,776 pairs: variance 1 +- 0.002; it also counts how often the four
    # corners of a rectangle agree.
    self.assertAlmostEqual(z.var(), 1.0, delta=SIGMA * 0.002)
    self.assertLess(np.abs(z).max(), 7.5)
    totals = x.sum(1) / np.sqrt(N)
    self.assertAlmostEqual(totals.var(), 1.0, delta=SIGMA * np.sqrt(2 / N))

  @parameterized.parameters(
    dict(batch=1), dict(head=1), dict(seed=1), dict(seed=2**32), dict(head=2)
  )
  def test_neighbouring_masks(self, **other):
    a, b = kept(words(), 0.5), kept(words(**other), 0.5)
    # Also shifted by a few rows or columns.
    for rows, columns in ((0, 0), (1, 0), (0, 1), (3, 2)):
      moved = np.roll(b, (rows, columns), (0, 1))
      self.assertLess(abs((a * moved).sum()) / N, SIGMA)
    z = correlations(a, b).ravel()
    self.assertAlmostEqual(z.var(), 1.0, delta=SIGMA * np.sqrt(2 / z.size))
    self.assertLess(np.abs(z).max(), 7.5)

  @parameterized.parameters((0, 1), (1, 0), (1, 1), (0, 64), (128, 0))
  def test_serial_correlation(self, rows, columns):
    x = words().astype(np.float64) / 2**32 - 0.5
    y = np.roll(x, (rows, columns), (0, 1))
    z = 12 * (x * y).sum() / N  # variance 1 / 12 each
    self.assertLess(abs(z), SIGMA)

  @parameterized.parameters("seed", "batch", "head", "rows", "columns")
  def test_one_flipped_bit_flips_half_of_the_word(self, name):
    rng = np.random.default_rng(2)
    count = 4096
    base = {
      key: rng.integers(0, 2**16, count).astype(np.uint32)
      for key in ("seed", "batch", "head", "rows", "columns")
    }

    def draw(at):
      zeros = jnp.zeros(count, jnp.uint32)
      seed = (jnp.asarray(at["seed"]), *(zeros,) * 5)
      lines = dropout.row_words(
        seed, *(jnp.asarray(at[key]) for key in ("batch", "head", "rows"))
      )
      columns = dropout.column_word(seed, jnp.asarray(at["columns"]))
      return np.asarray(dropout.bits(lines, columns))

    plain = draw(base)
    for bit in (0, 1, 7, 15):
      flipped = draw(base | {name: base[name] ^ np.uint32(1 << bit)})
      changed = np.unpackbits((plain ^ flipped).view(np.uint8)).reshape(-1, 32)
      # Each of the 32 output bits, over 4096 words.
      deviation = 0.5 / np.sqrt(count)
      np.testing.assert_allclose(changed.mean(0), 0.5, atol=SIGMA * deviation)


class SeedTest(absltest.TestCase):
  def test_shards_draw_the_mask_of_the_whole(self):
    whole = np.asarray(
      dropout.keep_mask(dropout.make_seed(4), 4, 6, 20, 30, 0.4)
    )
    part = dropout.make_seed(4, batch=1, head=2, row=5, column=7)
    found = dropout.keep_mask(part, 2, 3, 10, 11, 0.4)
    np.testing.assert_array_equal(found, whole[1:3, 2:5, 5:15, 7:18])

  def test_keys_of_every_generator_give_distinct_seeds(self):
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
      keys = jax.random.split(jax.random.key(0, impl=impl), 50)
      seeds = {tuple(np.asarray(dropout.make_seed(key))) for key in keys}
      self.assertLen(seeds, 50)

  def test_integers_and_words_agree(self):
    np.testing.assert_array_equal(
      dropout.make_seed(3 + (5 << 32)),
      dropout.make_seed(jnp.array([3, 5], jnp.uint32)),
    )

  def test_a_part_of_a_part_is_where_both_say(self):
    part = dropout.make_seed(4, batch=1, head=2)
    np.testing.assert_array_equal(
      dropout.make_seed(part, batch=3, row=5),
      dropout.make_seed(4, batch=4, head=2, row=5),
    )

  def test_anything_else_is_refused(self):
    with self.assertRaisesRegex(ValueError, r"float32\[3\].*PRNG key"):
      dropout.make_seed(jnp.ones(3))


if __name__ == "__main__":
  absltest.main()
