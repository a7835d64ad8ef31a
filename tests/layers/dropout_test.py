"""Dropout zeroes at its rate, rescales, and repeats."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers.dropout import Dropout, dropout, keep_mask


class DropoutTest(parameterized.TestCase):
  @parameterized.product(
    rate=(0.1, 0.5, 0.9), dtype=(jnp.float32, jnp.bfloat16)
  )
  def test_rate_and_scale(self, rate, dtype):
    x = jnp.ones((101, 1003), dtype)  # odd: half of the last word is unused
    y = np.asarray(dropout(x, jax.random.key(0), rate), np.float32)
    # 4 standard deviations of 101,303 draws at the most
    self.assertAlmostEqual((y == 0).mean(), rate, delta=4 * 0.5 / 318)
    kept = float(jnp.asarray(1 / (1 - rate), dtype))
    np.testing.assert_allclose(y[y != 0], kept, rtol=1e-6)

  def test_neighbours_in_one_random_word_are_independent(self):
    kept = np.asarray(keep_mask(jax.random.key(1), (500, 400), 0.5))
    agree = (kept[:, ::2] == kept[:, 1::2]).mean()
    self.assertAlmostEqual(agree, 0.5, delta=4 * 0.5 / 316)  # 100,000 pairs

  def test_a_key_decides(self):
    x = jnp.ones((7, 9))
    a, b = (dropout(x, jax.random.key(0), 0.5) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    c = dropout(x, jax.random.key(1), 0.5)
    self.assertTrue((a != c).any())

  def test_evaluation_is_the_identity_and_needs_no_key(self):
    x = jnp.arange(6.0)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, train=False), x)

  def test_the_gradient_passes_where_the_value_did(self):
    x = jnp.ones((8, 8))
    value, pull = jax.vjp(lambda x: dropout(x, jax.random.key(2), 0.3), x)
    np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], value)


if __name__ == "__main__":
  absltest.main()
