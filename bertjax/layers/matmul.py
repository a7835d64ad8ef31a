"""Matrix products in the compute dtype with float32 accumulation, both ways."""

import functools

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from bertjax.parallel.sharding import platform


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`jnp.einsum` accumulating in float32, operands in the order of the output.

  XLA's CPU backend has no bfloat16 x bfloat16 -> float32 product for a
  transposed result, so the operand that owns the first free letter goes first.
  """
  inputs, out = spec.split("->")
  lhs, rhs = inputs.split(",")
  free = [c for c in out if (c in lhs) != (c in rhs)]
  if free and free[0] in rhs:
    lhs, rhs, a, b = rhs, lhs, b, a
  return jnp.einsum(
    f"{lhs},{rhs}->{out}", a, b, preferred_element_type=jnp.float32
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: Dtype) -> jax.Array:
  """Two-operand einsum: operands cast to `dtype`, sums kept in float32.

  Differentiating an ordinary mixed-precision product multiplies the float32
  cotangent with a bfloat16 operand, which a CPU computes in float32: about four
  times slower than the forward product. Here the cotangent is cast as well.

  Args:
    spec: such as "bte,ef->btf"; every letter of an operand must occur in the
      other operand or in the output.
    a: left operand, any float dtype.
    b: right operand, any float dtype.
    dtype: dtype of the multiplications.

  Returns:
    The product, float32; cast it to the compute dtype after adding the bias.
  """
  return _product(spec, a.astype(dtype), b.astype(dtype))


@jax.custom_vjp
def finished(x: jax.Array) -> jax.Array:
  """x; on a TPU, what makes it is not fused with what it is used for.

  An epilogue of a product that sums in many steps is a part of each of them.
  """
  return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


finished.defvjp(lambda x: (finished(x), None), lambda _, g: (g,))


def _forward(spec, a, b, dtype):
  return einsum(spec, a, b, dtype), (a, b)


def _backward(spec, dtype, residuals, g):
  a, b = residuals
  inputs, out = spec.split("->")
  lhs, rhs = inputs.split(",")
  g = g.astype(dtype)
  da = _product(f"{out},{rhs}->{lhs}", g, b.astype(dtype))
  db = _product(f"{out},{lhs}->{rhs}", g, a.astype(dtype))
  return da.astype(a.dtype), db.astype(b.dtype)


einsum.defvjp(_forward, _backward)
