"""Linear is the einsum that its spec says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers.linear import Linear


class LinearTest(parameterized.TestCase):
  @parameterized.parameters(
    ("be,ef->bf", (2, 5), (7,)),
    ("bte,ehd->bthd", (2, 3, 5), (4, 6)),
    ("bthd,hde->bte", (2, 3, 4, 6), (5,)),
    ("bte,ehd->bhdt", (2, 3, 5), (4, 6)),
    ("bhdt,hde->bte", (2, 4, 6, 3), (5,)),
  )
  def test_value_and_gradients_equal_einsum(self, spec, shape, features):
    letters = spec.split("->")[0].split(",")[1]
    layer = Linear(spec, features, (None,) * len(letters))
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda p: p.value, params, is_leaf=_boxed)
    params["bias"] += 0.5

    def plain(params, x):
      return jnp.einsum(spec, x, params["kernel"]) + 0.5

    value, pull = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x)
    wanted, plain_pull = jax.vjp(plain, params, x)
    np.testing.assert_allclose(value, wanted, atol=1e-6)  # float32
    (found, dx), (want, dx_plain) = pull(value), plain_pull(value)
    np.testing.assert_allclose(dx, dx_plain, atol=1e-5)
    np.testing.assert_allclose(found["kernel"], want["kernel"], atol=1e-5)

  @parameterized.parameters(
    ("bte,ehd->bhdt", (24, 5)), ("bte,ehd->bthd", (5, 24))
  )
  def test_the_kernels_gradient_is_made_of_arrays_as_they_are(
    self, spec, shape
  ):
    """The operand whose last axis is summed goes first: [hd, e] or [e, hd]."""
    layer = Linear(spec, (4, 6), (None,) * 3)
    x = jnp.ones((2, 3, 5))
    params = layer.init(jax.random.key(1), x)["params"]

    def loss(params):
      return (layer.apply({"params": params}, x) ** 2).sum()

    made = jax.make_jaxpr(jax.grad(loss))(params)
    products = re.findall(r":f32\[(\d+),(\d+)\] = dot_general", str(made))
    self.assertEqual([tuple(map(int, p)) for p in products], [shape])


def _boxed(leaf):
  return hasattr(leaf, "value")


if __name__ == "__main__":
  absltest.main()
