"""Activations and their written-out gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers.feed_forward import gelu_tanh


class GeluTanhTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_gradient_equals_autodiff(self, dtype):
    x = jnp.linspace(-9.0, 9.0, 397).astype(dtype)
    found = jax.vmap(jax.grad(gelu_tanh))(x)
    plain = jax.vmap(jax.grad(jax.nn.gelu))(x.astype(jnp.float32))
    self.assertEqual(found.dtype, dtype)
    # 1 - tanh^2 cancels: a few float32 roundings of 1; bfloat16 has 8 bits.
    atol = 5e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(found.astype(jnp.float32), plain, atol=atol)

  def test_gradient_equals_finite_differences_in_float64(self):
    with jax.enable_x64(True):
      x = jnp.linspace(-6.0, 6.0, 31, dtype=jnp.float64)
      found = jax.vmap(jax.grad(gelu_tanh))(x)
      step = 1e-6
      slope = (gelu_tanh(x + step) - gelu_tanh(x - step)) / (2 * step)
      np.testing.assert_allclose(found, slope, atol=1e-8)

  def test_the_backward_pass_keeps_the_input_alone(self):
    x = jnp.ones((3, 5))
    _, pull = jax.vjp(gelu_tanh, x)
    self.assertEqual(sum(a.nbytes for a in jax.tree.leaves(pull)), x.nbytes)


if __name__ == "__main__":
  absltest.main()
