"""A maximum with a gradient that needs no comparison of equals."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers.largest import largest


class LargestTest(parameterized.TestCase):
  @parameterized.product(axis=(0, 1, 2, -1), dtype=("float32", "bfloat16"))
  def test_is_the_maximum_and_has_its_gradient(self, axis, dtype):
    x = jax.random.permutation(jax.random.key(0), 60.0 - jnp.arange(60))
    x = (x - 30).reshape(3, 4, 5).astype(dtype)

    def weighted(maximum):
      def loss(x):
        found = maximum(x, axis)
        return (found * (1 + jnp.arange(found.size)).reshape(found.shape)).sum()

      return loss

    np.testing.assert_array_equal(largest(x, axis), x.max(axis))
    self.assertEqual(largest(x, axis).dtype, x.dtype)
    np.testing.assert_array_equal(
      jax.grad(weighted(largest))(x), jax.grad(weighted(jnp.max))(x)
    )

  def test_of_equals_the_first_has_the_gradient(self):
    x = jnp.array([[1.0, 3.0, 3.0], [-jnp.inf, -2.0, -jnp.inf]])
    found = jax.grad(lambda x: largest(x, 1).sum())(x)
    np.testing.assert_array_equal(found, [[0, 1, 0], [0, 1, 0]])


if __name__ == "__main__":
  absltest.main()
