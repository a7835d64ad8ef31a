"""Vectors that stand for a batch: means of tokens, or what an SVD finds."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bertjax.optim.preconditioning.base import Statistics
from bertjax.optim.preconditioning.layers import Layer


def mean_vectors(layer: Layer, groups: int = 1) -> tuple[str, ...]:
  """Statistics of mean inputs and output gradients.

  The mean gradient of all tokens is a bias's gradient, which costs nothing.
  """
  names = ("token_count", "input_sum")
  return names if layer.bias and groups == 1 else (*names, "output_sum")


def clipped_vectors(
  layer: Layer, statistics: Statistics, clip: float
) -> tuple[Float[Array, "*stack r o"], Float[Array, "*stack r i"]]:
  """Output gradients and homogeneous inputs, per group, clipped by element.

  Those of a group without tokens are 0.
  """
  g, a = statistics["output_sum"], statistics["input_sum"]
  if layer.bias:
    # Of counts shards would have to tell each other.
    one = jnp.any(g != 0, -1) | jnp.any(a != 0, -1)
    a = jnp.concatenate([a, one[..., None].astype(a.dtype)], axis=-1)
  return jnp.clip(g, -clip, clip), jnp.clip(a, -clip, clip)


def are_there(vectors: Sequence[Array]) -> Bool[Array, "*stack"]:
  """Whether a layer saw tokens that the loss reaches, by its vectors."""
  left, right = (jnp.any(v != 0, axis=(-2, -1)) for v in vectors)
  return left | right


def leading_vectors(
  vectors: Float[Array, "*stack n d"], rank: int
) -> Float[Array, "*stack r d"]:
  """r vectors w with the mean of w w^T next to that of all u u^T.

  By a truncated singular value decomposition of the n vectors, through their
  n x n products (the Gram trick): O(n^2 d). With r = n the means are equal.
  """
  gram = jnp.matmul(
    vectors,
    jnp.swapaxes(vectors, -1, -2),
    precision=jax.lax.Precision.HIGHEST,
  )
  _, q = jnp.linalg.eigh(gram)  # ascending
  # w_j = sqrt(r / n) sigma_j v_j, and sigma_j v_j = sum_k q_kj u_k.
  leading = jnp.swapaxes(q[..., -rank:], -1, -2)
  found = jnp.matmul(leading, vectors, precision=jax.lax.Precision.HIGHEST)
  return (rank / vectors.shape[-2]) ** 0.5 * found
