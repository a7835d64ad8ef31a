"""Inverse Kronecker factors kept by rank-one (or rank-r) updates: MKOR's core.

J [.., d, d] is what a rule keeps instead of a factor, u_k [.., r, d] are r
vectors that stand for the batch, s = 1 / r. Three rules, because the paper's
formula, its prose and its code are three:

  exact      J <- inverse of decay J^-1 + (1 - decay) s sum_k u_k u_k^T, which
             is what "Sherman-Morrison of the momentum of the covariance" means.
             What no vector ever points to grows by 1/decay: the stabiliser is
             load-bearing.
  reference  the authors' code: J is drawn to the identity, then one update of
             weight 1. K = decay J + (1 - decay) I; J <- inverse of
             K^-1 + s sum_k u_k u_k^T. Its eigenvalues stay in (0, 1].
  paper      algorithm 1 as printed, for rank 1: J <- decay J + (1 - decay) /
             (decay^2 (1 + decay (1 - decay) u^T J u)) (J u)(J u)^T. The plus
             sign keeps J positive definite; it is the inverse of nothing, tends
             to 0 for short u and diverges for vectors of length sqrt(d).

Work is O(r d^2). Arithmetic is float32 (or that of the arguments); results are
symmetrised, for rounding would add up.

Reference: Mozaffari et al. 2023, arXiv:2306.01685, equations 5 and 6.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Factor = Float[Array, "*stack d d"]
Vectors = Float[Array, "*stack r d"]
Rule = Callable[[Factor, Vectors, float], Factor]

# Products of vectors with factors cost little and must not lose digits.
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _transposed(x: Array) -> Array:
  return jnp.swapaxes(x, -1, -2)


def _symmetric(x: Factor) -> Factor:
  return (x + _transposed(x)) / 2


def _identity(x: Factor) -> Factor:
  return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def _downdate(
  factor: Factor, vectors: Vectors, weight: float, identity: float
) -> Factor:
  """J - J U^T (identity I + weight U J U^T)^-1 weight U J, by Woodbury."""
  projected = _product(vectors, factor)  # [.., r, d]: rows J u_k
  inner = weight * _product(projected, _transposed(vectors))
  if vectors.shape[-2] == 1:
    solved = weight * projected / (identity + inner)
  else:
    inner += identity * _identity(inner)
    solved = weight * jnp.linalg.solve(inner, projected)
  return factor - _product(_transposed(projected), solved)


def exact(factor: Factor, vectors: Vectors, decay: float) -> Factor:
  """The inverse of the moving average; see the top of this file."""
  weight = (1 - decay) / vectors.shape[-2]
  return _symmetric(_downdate(factor, vectors, weight, decay) / decay)


def reference(factor: Factor, vectors: Vectors, decay: float) -> Factor:
  """The authors' code; see the top of this file."""
  drawn = decay * factor + (1 - decay) * _identity(factor)
  return _symmetric(_downdate(drawn, vectors, 1 / vectors.shape[-2], 1.0))


def paper(factor: Factor, vectors: Vectors, decay: float) -> Factor:
  """Algorithm 1 as printed; see the top of this file.

  Raises:
    ValueError: several vectors.
  """
  if vectors.shape[-2] != 1:
    raise ValueError("rule 'paper' is for rank 1.")
  projected = _product(vectors, factor)
  square = _product(projected, _transposed(vectors))
  scale = (1 - decay) / (decay**2 * (1 + decay * (1 - decay) * square))
  outer = _product(_transposed(projected), projected)
  return _symmetric(decay * factor + scale * outer)


RULES: dict[str, Rule] = {
  "exact": exact,
  "reference": reference,
  "paper": paper,
}


def max_abs(factor: Factor) -> Float[Array, "*stack"]:
  """Largest entry."""
  return jnp.max(jnp.abs(factor), axis=(-2, -1))


def frobenius(factor: Factor) -> Float[Array, "*stack"]:
  """Frobenius norm / sqrt(d): the identity has 1 at every width."""
  return jnp.linalg.norm(factor, axis=(-2, -1)) / factor.shape[-1] ** 0.5


def spectral(factor: Factor, steps: int = 8) -> Float[Array, "*stack"]:
  """Largest eigenvalue by power iteration, from below.

  It starts from the row of the largest diagonal entry, which for a positive
  definite matrix already has a good part of the largest eigenvector.

  Args:
    factor: symmetric.
    steps: products with it.
  """
  row = jnp.argmax(jnp.diagonal(factor, axis1=-2, axis2=-1), axis=-1)
  v = jnp.take_along_axis(factor, row[..., None, None], axis=-2)
  norm = jnp.ones(v.shape[:-1], v.dtype)
  for _ in range(steps):
    length = jnp.linalg.norm(v, axis=-1)
    v = v / jnp.where(length > 0, length, 1.0)[..., None]
    v = _product(v, factor)
    norm = jnp.linalg.norm(v, axis=-1)
  return jnp.squeeze(norm, -1)


NORMS: dict[str, Callable[[Factor], Array]] = {
  "max_abs": max_abs,
  "frobenius": frobenius,
  "spectral": spectral,
}


def blend(factor: Factor, keep: float) -> Factor:
  """`keep J + (1 - keep) I`."""
  return keep * factor + (1 - keep) * _identity(factor)
