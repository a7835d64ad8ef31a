"""Heads of queries that share heads of keys: [b, h, ...] as [b, k, r, ...]."""

import jax
import jax.numpy as jnp


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """einsum in float32; k are heads of keys, r queries' heads of one of them."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def split(x: jax.Array, kv_heads: int) -> jax.Array:
  """[b, h, ...] -> [b, heads of keys, queries' heads per key head, ...]."""
  return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def join(x: jax.Array) -> jax.Array:
  """The inverse of `split`."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])
