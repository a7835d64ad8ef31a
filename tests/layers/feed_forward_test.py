"""Activations and their written-out gradients."""

import importlib.util
import unittest

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.layers.feed_forward import gelu_tanh
from tests.layers import feed_forward_programs


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


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class TensorParallelTest(absltest.TestCase):
  def test_devices_send_activations_in_the_compute_dtype(self):
    shape, mlp_dim = (4, 128, 256), 512
    program = hardware.compile_for(
      "v5e:2x2", feed_forward_programs.gradients, shape=shape, mlp_dim=mlp_dim
    )
    mesh = {"data": 2, "fsdp": 1, "model": 2, "seq": 1}
    sent = {}
    for found in hardware.read_collectives(program.module):
      axes = found.axes(mesh)
      sent[axes] = sent.get(axes, 0) + found.operand_bytes
    rows = np.prod(shape) // mesh["data"]
    # The result, and the gradient of the input: two bytes a number.
    self.assertEqual(sent.pop(("model",)), 2 * rows * 2)
    # Gradients of the parameters: four, and half of each kernel a device.
    e, f = shape[-1], mlp_dim
    self.assertEqual(sent, {("data",): 4 * (2 * e * f // 2 + f // 2 + e)})


if __name__ == "__main__":
  absltest.main()
