"""Matrix products in the compute dtype with float32 accumulation, both ways."""

import functools
import math

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from bertjax.parallel.sharding import platform, replicates_parameters


def _product(
  spec: str, a: jax.Array, b: jax.Array, exchanged: str = ""
) -> jax.Array:
  """`jnp.einsum` accumulating in float32, operands in the order of the output.

  XLA's CPU backend has no bfloat16 x bfloat16 -> float32 product for a
  transposed result, so the operand that owns the first free letter goes first.
  """
  inputs, out = spec.split("->")
  lhs, rhs = inputs.split(",")
  free = [c for c in out if (c in lhs) != (c in rhs)]
  if free and free[0] in rhs:
    lhs, rhs, a, b = rhs, lhs, b, a
  summed = set(lhs).intersection(rhs).difference(out)
  made = jnp.einsum(
    f"{lhs},{rhs}->{out}",
    a,
    b,
    preferred_element_type=(
      a.dtype if summed.intersection(exchanged) else jnp.float32
    ),
  )
  return made.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def einsum(
  spec: str, a: jax.Array, b: jax.Array, dtype: Dtype, exchanged: str = ""
) -> jax.Array:
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
    exchanged: letters that a mesh axis splits in both operands. Devices add up
      their parts of sums over them; they send them in `dtype`.

  Returns:
    The product, float32; cast it to the compute dtype after adding the bias.
  """
  return _product(spec, a.astype(dtype), _cast(spec, b, dtype), exchanged)


# A matrix this large in the compute dtype is not kept on chip for a cast.
_ON_CHIP_BYTES = 2**25


def _cast(spec: str, b: jax.Array, dtype: Dtype) -> jax.Array:
  """`b.astype(dtype)`, on a TPU apart from a product that sums long rows.

  The product would cast b anew for each part of its result; with sums shorter
  than rows of the result that hides behind the multiplications. It is also
  faster if these sums run along the rows of b, which is turned for it.
  """
  cast = b.astype(dtype)
  if b.dtype == cast.dtype or platform() != "tpu":
    return cast
  inputs, out = spec.split("->")
  letters = inputs.split(",")[1]
  kept = math.prod(n for c, n in zip(letters, b.shape) if c in out)
  if b.size <= kept**2 or cast.nbytes > _ON_CHIP_BYTES:
    return cast
  if b.ndim == 2 and letters[1] in out:
    return jax.lax.optimization_barrier(cast.T).T
  return jax.lax.optimization_barrier(cast)


@jax.custom_vjp
def finished(x: jax.Array) -> jax.Array:
  """x; on a TPU, what makes it is not fused with what it is used for.

  An epilogue of a product that sums in many steps is a part of each of them.
  """
  return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


finished.defvjp(lambda x: (finished(x), None), lambda _, g: (g,))


@jax.custom_vjp
def held(kernel: jax.Array, other: jax.Array) -> jax.Array:
  """kernel; on a TPU, cast to the compute dtype only where it is used.

  XLA casts all layers of a stack before it loops over them: a pass over every
  weight, where the product with one layer's would hide its cast. It does not
  if the kernel is multiplied by a 1 that another parameter of the layer seems
  to have a part in; a barrier does not stop it.

  Args:
    kernel: float32.
    other: float32, of the same layer, such as the bias.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # One number of a sharded array would have to be sent around.
  if platform() != "tpu" or not replicates_parameters(mesh):
    return kernel
  bits = jax.lax.bitcast_convert_type(other.reshape(-1)[0], jnp.int32)
  # Integers: a float's product with 0 need not be 0.
  return kernel * ((bits | 1) & 1).astype(kernel.dtype)


held.defvjp(
  lambda kernel, other: (held(kernel, other), None), lambda _, g: (g, None)
)


@jax.custom_vjp
def _own_sum(x: jax.Array) -> jax.Array:
  return x


_own_sum.defvjp(lambda x: (x, None), lambda _, g: (g,))


def shared(x: jax.Array) -> jax.Array:
  """x, as the input of several products whose outputs a mesh axis splits.

  Devices of "model" hold parts of the gradient of each of them. Added up before
  anything else joins, such as a residual's gradient, they are sent as one.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return _own_sum(x) if mesh.shape.get("model", 1) > 1 else x


def _forward(spec, a, b, dtype, exchanged):
  return einsum(spec, a, b, dtype, exchanged), (a, b)


def _backward(spec, dtype, exchanged, residuals, g):
  a, b = residuals
  inputs, out = spec.split("->")
  lhs, rhs = inputs.split(",")
  g = g.astype(dtype)
  back = f"{out},{rhs}->{lhs}"
  da = _product(back, g, _cast(back, b, dtype), exchanged)
  db = _product(f"{out},{lhs}->{rhs}", g, a.astype(dtype))
  return da.astype(a.dtype), db.astype(b.dtype)


einsum.defvjp(_forward, _backward)
