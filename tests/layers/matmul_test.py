"""The mixed-precision einsum equals jnp.einsum, and so do its derivatives."""

import importlib.util
import re
import unittest
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.hardware import compile_for
from bertjax.layers import matmul
from bertjax.layers.matmul import einsum
from bertjax.parallel.mesh import make_mesh
from tests.layers import matmul_programs

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

  @parameterized.parameters(
    (8, 4, jnp.bfloat16, True),  # sums of 8 for rows of 4
    (4, 8, jnp.bfloat16, False),
    (8, 4, jnp.float32, False),  # nothing to cast
  )
  def test_a_tpu_casts_apart_from_long_sums(self, summed, kept, dtype, apart):
    a, b = operands([(3, summed), (summed, kept)])
    with mock.patch.object(matmul, "platform", lambda: "tpu"):
      made = jax.make_jaxpr(lambda a, b: einsum("te,ef->tf", a, b, dtype))(a, b)
    self.assertEqual("optimization_barrier" in str(made), apart)

  def test_what_a_tpu_casts_apart_has_its_sums_along_the_rows(self):
    def barriers(fn, *args):
      made = str(jax.make_jaxpr(fn)(*args))
      return re.findall(r":bf16(\[\S*\]) = optimization_barrier", made)

    def product(a, b):
      return einsum("te,ef->tf", a, b, jnp.bfloat16)

    def back(b, g):  # sums over f, which is last already
      return jax.vjp(lambda a: product(a, b), jnp.ones((3, 4)))[1](g)

    with mock.patch.object(matmul, "platform", lambda: "tpu"):
      self.assertEqual(
        barriers(product, *operands([(3, 8), (8, 4)])), ["[4,8]"]
      )
      self.assertEqual(barriers(back, *operands([(4, 8), (3, 8)])), ["[4,8]"])


class HeldTest(parameterized.TestCase):
  @parameterized.parameters(0.0, -0.0, 1.5, -3.0, np.inf, -np.inf, np.nan)
  def test_kernel_and_gradient_are_the_same_bit_by_bit(self, first):
    kernel = jnp.asarray([[0.1, -0.0, 1e30], [np.inf, np.nan, -7.0]])
    bias = jnp.asarray([first, 2.0, 3.0])
    g = jnp.asarray([[1.0, np.inf, -2.0], [0.0, 3.0, np.nan]])
    with mock.patch.object(matmul, "platform", lambda: "tpu"):
      found, pull = jax.vjp(matmul.held, kernel, bias)
    np.testing.assert_array_equal(found, kernel)
    dkernel, dbias = pull(g)
    np.testing.assert_array_equal(dkernel, g)
    np.testing.assert_array_equal(dbias, np.zeros(3))

  def test_elsewhere_nothing_is_multiplied(self):
    args = jnp.ones((2, 3)), jnp.ones(3)
    self.assertNotIn(" mul ", str(jax.make_jaxpr(matmul.held)(*args)))

  @parameterized.parameters((dict(data=8), True), (dict(fsdp=2), False))
  def test_only_whole_parameters_are_held(self, shape, held):
    args = jnp.ones((2, 8)), jnp.ones(8)
    with (
      jax.set_mesh(make_mesh(**shape)),
      mock.patch.object(matmul, "platform", lambda: "tpu"),
    ):
      found = str(jax.make_jaxpr(matmul.held)(*args))
    self.assertEqual(" mul " in found, held)

  @unittest.skipUnless(
    importlib.util.find_spec("libtpu"),
    "libtpu is not installed: pip install 'bertjax[test]'",
  )
  def test_a_tpu_does_not_cast_a_stack_before_its_loop(self):
    sizes = dict(layers=3, rows=256, width=512)
    stack = re.compile(r"bf16\[3,512,512\]\S* convert\(")
    held = compile_for("v5e:1x1", matmul_programs.scanned, **sizes)
    self.assertNotRegex(held.text, stack)
    plain = compile_for("v5e:1x1", matmul_programs.scanned, held=False, **sizes)
    self.assertRegex(plain.text, stack)


if __name__ == "__main__":
  absltest.main()
