"""Random numbers that cost no program of their own."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
  draws = np.random.default_rng(seed).normal(size=shape)
  # NumPy rounds, by way of float32: JAX would compile it for every shape.
  return jax.device_put(draws.astype(np.float32).astype(dtype))
