"""Dropout zeroes at its rate, rescales, and repeats."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from bertjax.layers.dropout import (
  Dropout,
  dropout,
  hashed_bits,
  random_words,
)
from bertjax.parallel.mesh import make_mesh


class DropoutTest(parameterized.TestCase):
  @parameterized.product(
    rate=(0.1, 0.5, 0.9),
    dtype=(jnp.float32, jnp.bfloat16),
    generator=("threefry2x32", "rbg"),
  )
  def test_rate_and_scale(self, rate, dtype, generator):
    x = jnp.ones((101, 1003), dtype)
    key = jax.random.key(0, impl=generator)
    y = np.asarray(dropout(x, key, rate), np.float32)
    # 4 standard deviations of 101,303 draws at the most
    self.assertAlmostEqual((y == 0).mean(), rate, delta=4 * 0.5 / 318)
    kept = float(jnp.asarray(1 / (1 - rate), dtype))
    np.testing.assert_allclose(y[y != 0], kept, rtol=1e-6)

  def test_a_key_decides(self):
    x = jnp.ones((7, 9))
    a, b = (dropout(x, jax.random.key(0), 0.5) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    c = dropout(x, jax.random.key(1), 0.5)
    self.assertTrue((a != c).any())

  def test_the_key_chooses_the_generator(self):
    for impl in ("rbg", "unsafe_rbg"):
      key = jax.random.key(0, impl=impl)
      np.testing.assert_array_equal(
        random_words(key, (7, 9)), jax.random.bits(key, (7, 9), jnp.uint16)
      )
    key = jax.random.key(0, impl="threefry2x32")
    np.testing.assert_array_equal(
      random_words(key, (7, 9)), hashed_bits(key, (7, 9))
    )

  def test_evaluation_is_the_identity_and_needs_no_key(self):
    x = jnp.arange(6.0)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, train=False), x)

  def test_the_gradient_passes_where_the_value_did(self):
    x = jnp.ones((8, 8))
    value, pull = jax.vjp(lambda x: dropout(x, jax.random.key(2), 0.3), x)
    np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], value)


class RowsOfWorkersTest(parameterized.TestCase):
  """Inside `shard_map` rows draw what they draw in the whole batch."""

  @parameterized.parameters(((8, 3, 5),), ((16, 7),), ((4,),))
  def test_words_are_those_of_the_whole(self, shape):
    mesh = make_mesh(data=4, fsdp=2, devices=jax.devices())
    key = jax.random.key(5)
    draw = jax.shard_map(
      lambda key: hashed_bits(key, (shape[0] // 4, *shape[1:])),
      in_specs=PartitionSpec(),
      out_specs=PartitionSpec("data"),
      axis_names={"data"},
      check_vma=False,
    )
    with jax.set_mesh(mesh):
      found = jax.jit(draw)(key)
    np.testing.assert_array_equal(found, hashed_bits(key, shape))


class PlatformWordsTest(parameterized.TestCase):
  """On a mesh each device draws its own part of the words, and no more."""

  SHAPE = (16, 6, 64)

  def drawn(self, *, workers=False, **axes):
    """Words on a mesh, and what the program draws on one device."""
    mesh = make_mesh(**axes, devices=jax.devices())
    key = jax.random.key(3, impl="rbg")

    def words(key):
      return random_words(key, self.SHAPE)

    if workers:  # an outer split by hand, as of compressed averages
      words = jax.shard_map(
        lambda key: random_words(key, (self.SHAPE[0] // 2, *self.SHAPE[1:])),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
        check_vma=False,
      )
    with jax.set_mesh(mesh):
      lowered = jax.jit(words).lower(key)
      found = jax.jit(words)(key)
    draws = re.findall(
      r"rng_bit_generator.*tensor<([\dx]+)xui16>\)", lowered.as_text()
    )
    for shard in found.addressable_shards:  # copies are equal
      np.testing.assert_array_equal(shard.data, np.asarray(found)[shard.index])
    return np.asarray(found), draws

  @parameterized.parameters(
    (dict(data=8), "2x6x64"),
    (dict(data=2, fsdp=4), "2x6x64"),
    (dict(data=4, model=2), "4x6x64"),
    (dict(data=4, seq=2), "4x3x64"),
  )
  def test_a_device_draws_its_part(self, axes, expected):
    words, draws = self.drawn(**axes)
    self.assertEqual(draws, [expected])
    self.assertLen(np.unique(words.reshape(16 * 6, 64), axis=0), 16 * 6)
    self.assertAlmostEqual((words < 2**15).mean(), 0.5, delta=0.03)

  def test_workers_of_several_devices_divide_their_own_rows(self):
    words, draws = self.drawn(data=2, fsdp=4, workers=True)
    self.assertEqual(draws, ["2x6x64"])
    half = words[:8].reshape(8 * 6, 64)
    self.assertLen(np.unique(half, axis=0), 8 * 6)

  def test_workers_draw_different_words(self):
    words, _ = self.drawn(data=2, fsdp=4, workers=True)
    self.assertLen(np.unique(words.reshape(16 * 6, 64), axis=0), 16 * 6)

  def test_rows_that_do_not_divide_are_drawn_whole(self):
    mesh = make_mesh(devices=jax.devices())
    key = jax.random.key(0, impl="rbg")
    with jax.set_mesh(mesh):
      words = jax.jit(lambda key: random_words(key, (3, 5)))(key)
    np.testing.assert_array_equal(words, jax.random.bits(key, (3, 5), "uint16"))


class HashedBitsTest(parameterized.TestCase):
  """The words behave like random ones in what dropout could notice."""

  SHAPE = (4, 96, 256)

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.draw = staticmethod(
      jax.jit(lambda seed: hashed_bits(jax.random.key(seed), cls.SHAPE))
    )
    cls.words = np.stack([np.asarray(cls.draw(seed)) for seed in range(8)])

  def assert_uniform(self, values, num_values):
    counts = np.bincount(values.ravel(), minlength=num_values)
    statistic, probability = scipy.stats.chisquare(counts)
    self.assertGreater(probability, 1e-4, f"chi square {statistic}")

  @parameterized.parameters(0, 8, 16, 24)
  def test_every_byte_is_uniform(self, shift):
    self.assert_uniform((self.words >> shift) & 255, 256)

  @parameterized.parameters(1, 2, 3)
  def test_pairs_along_an_axis_are_independent(self, axis):
    top = np.moveaxis(self.words >> 28, axis, 0).astype(np.int64)
    for lag in (1, 2, 16):
      if lag < len(top):
        self.assert_uniform(top[lag:] * 16 + top[:-lag], 256)

  def test_keys_give_independent_words(self):
    top = (self.words >> 28).astype(np.int64)
    self.assert_uniform(top[1:] * 16 + top[:-1], 256)

  @parameterized.parameters(0.1, 0.5)
  def test_rows_and_columns_keep_as_many_as_coins_would(self, rate):
    # Counts that vary too little betray a counter, too much a pattern.
    kept = self.words >= rate * 2**32
    for axis in (2, 3):
      counts = kept.sum(axis)
      n = kept.shape[axis]
      variance = n * rate * (1 - rate)
      self.assertAlmostEqual(
        counts.var() / variance, 1.0, delta=5 * (2 / counts.size) ** 0.5
      )

  def test_a_flipped_bit_of_the_index_flips_half_of_the_word(self):
    flat = self.words.reshape(8, -1)
    for bit in range(16):
      other = np.arange(flat.shape[1]) ^ (1 << bit)
      inside = other < flat.shape[1]
      changed = flat[:, inside] ^ flat[:, other[inside]]
      each = [((changed >> i) & 1).mean() for i in range(32)]
      # Pairs count twice: at least 8 * 2**15 distinct ones.
      np.testing.assert_allclose(each, 0.5, atol=5 * 0.5 / 2**9)

  def test_words_do_not_depend_on_the_mesh(self):
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("a", None, "b"))
    words = jax.jit(
      lambda: hashed_bits(jax.random.key(3), self.SHAPE),
      out_shardings=sharding,
    )()
    np.testing.assert_array_equal(words, self.words[3])


if __name__ == "__main__":
  absltest.main()
