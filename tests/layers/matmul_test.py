"""The mixed-precision einsum equals jnp.einsum, and so do its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers.matmul import einsum

SPECS = (
  ("bte,ef->btf", (2, 3, 5), (5, 7)),
  ("bte,ehd->bthd", (2, 3, 5), (5, 4, 6)),
  ("bthd,hde->bte", (2, 3, 4, 6), (4, 6, 5)),
  ("bthd,bshd->bhts", (2, 3, 4, 6), (2, 7, 4, 6)),
  ("bhts,bshd->bthd", (2, 4, 3, 7), (2, 7, 4, 6)),
  ("bme,ve->bmv", (2, 3, 5), (11, 5)),
)


def operands(shapes):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


class EinsumTest(parameterized.TestCase):
  @parameterized.product(spec=SPECS, dtype=(jnp.float32, jnp.bfloat16))
  def test_values_and_gradients_equal_the_plain_product(self, spec, dtype):
    spec, *shapes = spec
    a, b = operands(shapes)
    g = operands([jnp.einsum(spec, a, b).shape])[0]
    value, pull = jax.vjp(lambda a, b: einsum(spec, a, b, dtype), a, b)
    plain, plain_pull = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a, b)
    # Each operand rounds to 8 bits; sums of at most 24 products of size 1-10.
    atol = 1e-5 if dtype == jnp.float32 else 0.2
    np.testing.assert_allclose(value, plain, atol=atol)
    self.assertEqual(value.dtype, jnp.float32)
    for found, want in zip(pull(g), plain_pull(g)):
      self.assertEqual(found.dtype, jnp.float32)
      np.testing.assert_allclose(found, want, atol=atol)

  def test_bfloat16_sums_are_kept_in_float32(self):
    # 1 + 512 / 2^9 would stay 1 in a bfloat16 accumulator.
    a = jnp.concatenate([jnp.ones(1), jnp.full(512, 2.0**-9)])[None]
    found = einsum("ae,eb->ab", a, jnp.ones((513, 1)), jnp.bfloat16)
    self.assertEqual(float(found[0, 0]), 2.0)

  def test_second_derivatives_equal_the_plain_product(self):
    a, b = operands([(2, 3, 5), (5, 7)])

    def energy(product):
      return lambda a, b: jnp.sum(jnp.tanh(product("bte,ef->btf", a, b)))

    ours = energy(lambda s, a, b: einsum(s, a, b, jnp.float32))
    direction = jnp.cos(b)

    def along(fn):  # Hessian times a vector, by reverse over reverse
      return jax.grad(
        lambda b: jnp.vdot(jax.grad(fn, argnums=1)(a, b), direction)
      )(b)

    np.testing.assert_allclose(
      along(ours),
      along(energy(jnp.einsum)),
      atol=1e-5,  # float32
    )


if __name__ == "__main__":
  absltest.main()
