"""A maximum whose gradient does not compare floating-point numbers."""

import jax
import jax.numpy as jnp


def largest(x: jax.Array, axis: int) -> jax.Array:
  """`x.max(axis)`; of equals the first has the gradient.

  JAX's own asks where x equals its maximum. A compiler may compute x once for
  the maximum and once for that question, rounded differently as after a norm;
  then nothing is equal and the gradient is 0 / 0.
  """
  x = jnp.asarray(x)  # NumPy's argmax is of 64 bits
  where = jnp.expand_dims(jax.lax.stop_gradient(x).argmax(axis), axis)
  places = jax.lax.broadcasted_iota(where.dtype, x.shape, axis % x.ndim)
  # A sum of one number; a gather's gradient would be a scatter, which is slow.
  return jnp.where(places == where, x, 0).sum(axis)
