"""LayerNorm and its written-out gradient equal autodiff of the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers.norm import STATISTICS, layer_norm

EPSILON = 1e-3  # large enough for its place to matter


def plain(x, scale, bias):
  x = x.astype(jnp.float32)
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / jnp.sqrt(variance + EPSILON) * scale + bias


class LayerNormTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.x, self.scale, self.bias, self.g = (
      jnp.asarray(rng.normal(size=s), jnp.float32)
      for s in ((2, 5, 7), (1, 1, 7), (1, 1, 7), (2, 5, 7))
    )

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_value_and_gradient_equal_autodiff(self, dtype):
    x = (3.0 + self.x).astype(dtype)
    value, pull = jax.vjp(
      lambda x, s, b: layer_norm(x, s[0, 0], b[0, 0], EPSILON),
      x,
      self.scale,
      self.bias,
    )
    wanted, plain_pull = jax.vjp(plain, x, self.scale, self.bias)
    np.testing.assert_allclose(value, wanted, atol=1e-5)
    for found, want in zip(pull(self.g), plain_pull(self.g)):
      self.assertEqual(found.dtype, want.dtype)
      # The gradient of a bfloat16 input rounds to 8 bits.
      rtol = 1e-5 if found.dtype == jnp.float32 else 2**-7
      np.testing.assert_allclose(
        found.astype(jnp.float32),
        want.astype(jnp.float32),
        rtol=rtol,
        atol=1e-5,
      )

  @parameterized.parameters((True, 1), (False, 2))
  def test_in_a_loop_statistics_can_be_kept(self, in_loop, times):
    @functools.partial(
      jax.checkpoint,
      policy=jax.checkpoint_policies.save_only_these_names(STATISTICS),
    )
    def normed(x):
      y = layer_norm(x, self.scale[0, 0], self.bias[0, 0], EPSILON, in_loop)
      return (y * y).sum()  # its gradient reads y, which is made once more

    made = str(jax.make_jaxpr(jax.grad(normed))(self.x))
    self.assertEqual(made.count(" rsqrt "), times)

  def test_the_backward_pass_keeps_the_input_and_two_numbers_a_row(self):
    _, pull = jax.vjp(
      lambda x: layer_norm(x, self.scale[0, 0], self.bias[0, 0], EPSILON),
      self.x.astype(jnp.bfloat16),
    )
    kept = sum(x.nbytes for x in jax.tree.leaves(pull))
    size = self.x.size
    self.assertLessEqual(kept, 2 * size + 2 * 4 * size // 7 + 2 * 4 * 7)


if __name__ == "__main__":
  absltest.main()
