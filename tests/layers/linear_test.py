"""Linear is the einsum that its spec says."""

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


def _boxed(leaf):
  return hasattr(leaf, "value")


if __name__ == "__main__":
  absltest.main()
