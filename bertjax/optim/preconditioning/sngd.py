"""SNGD and HyLo: the Fisher matrix of a batch, inverted in sample space.

Yang et al. 2021 (SENG), arXiv:2006.05924; Mu et al. 2022 (HyLo), SC22. With a
row's mean input a_k and its output gradient g_k, v_k = g_k (x) a_k and
F = sum_k v_k v_k^T / n, the inverse needs only the n x n kernel

    K_kl = (a_k . a_l) (g_k . g_l) / n,      F + damping I on G:
    D = (G - sum_k c_k g_k a_k^T / sqrt(n)) / damping,  c = (K + damping I)^-1 k

with k_k = g_k^T G a_k / sqrt(n). A row of several tokens counts as one sample:
its mean input and the sum of its gradients, as HyLo does for convolutions.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bertjax import registry
from bertjax.optim.preconditioning.base import Preconditioner, Statistics
from bertjax.optim.preconditioning.eva import check_damping
from bertjax.optim.preconditioning.layers import Layer


class SampleFactors(NamedTuple):
  """Samples and the inverse among them, float32.

  Attributes:
    left: output gradients, [*stack, n, outputs], over sqrt(number of rows).
    right: (homogeneous) inputs, [*stack, n, inputs].
    inverse: [*stack, n, n].
  """

  left: Float[Array, "*stack n o"]
  right: Float[Array, "*stack n i"]
  inverse: Float[Array, "*stack n n"]


@dataclasses.dataclass(frozen=True)
class Sngd:
  """Fields as the arguments of `sngd`."""

  rank: int
  reduction: str
  damping: float

  def wants(self, layer: Layer) -> tuple[str, ...]:
    del layer
    return ("input_rows", "output_rows")

  def init(self, layer: Layer) -> SampleFactors:
    stack, _, outputs = layer.size

    def zeros(*shape):
      return jnp.zeros((*stack, *shape), jnp.float32)

    n = self.rank
    return SampleFactors(
      zeros(n, outputs), zeros(n, layer.columns), zeros(n, n)
    )

  def refresh(
    self,
    layer: Layer,
    factors: SampleFactors,
    statistics: Statistics,
    count: Int[Array, ""],
  ) -> SampleFactors:
    del factors
    g, a = samples(layer, statistics)
    rows = g.shape[-2]
    if self.rank > rows or (self.reduction == "none" and self.rank != rows):
      raise ValueError(
        f"optim.precondition.rank={self.rank} does not fit a batch of {rows}"
        " rows: it must be their number with reduction='none', and at most that"
        " otherwise."
      )
    return REDUCTIONS[self.reduction](g, a, self.rank, self.damping, count)

  def direction(
    self,
    layer: Layer,
    factors: SampleFactors,
    gradient: Float[Array, "*stack o i"],
  ) -> Float[Array, "*stack o i"]:
    del layer
    g, a, inverse = factors
    along = jnp.sum((g @ gradient) * a, axis=-1, keepdims=True)
    coefficients = inverse @ along
    known = jnp.swapaxes(g * coefficients, -1, -2) @ a
    return (gradient - known) / self.damping


def samples(
  layer: Layer, statistics: Statistics
) -> tuple[Float[Array, "*stack n o"], Float[Array, "*stack n i"]]:
  """Output gradients, over sqrt(n), and (homogeneous) inputs of n rows."""
  g, a = statistics["output_rows"], statistics["input_rows"]
  # Of the mean over rows, so that g_k is the gradient of row k alone.
  g = g * g.shape[-2] ** 0.5
  if layer.bias:
    a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1)
  return g, a


def kernel(g: Array, a: Array) -> Float[Array, "*stack n n"]:
  """K of samples."""

  def gram(x):
    return jnp.matmul(
      x, jnp.swapaxes(x, -1, -2), precision=jax.lax.Precision.HIGHEST
    )

  return gram(g) * gram(a)


def _eye(x: Array) -> Array:
  return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def _inverse(g: Array, a: Array, damping: float) -> Array:
  products = kernel(g, a)
  return jnp.linalg.inv(products + damping * _eye(products))


def _all(g, a, rank, damping, count) -> SampleFactors:
  """SNGD: every row."""
  del rank, count
  return SampleFactors(g, a, _inverse(g, a, damping))


def _sampled(
  g: Array, a: Array, rank: int, damping: float, count: Int[Array, ""]
) -> SampleFactors:
  """Rows drawn, with replacement, by |v_k|^2, scaled to keep F's mean."""
  squares = jnp.sum(g * g, -1) * jnp.sum(a * a, -1)
  total = squares.sum(-1, keepdims=True)
  uniform = jnp.full_like(squares, 1 / squares.shape[-1])
  p = jnp.where(total > 0, squares / jnp.where(total > 0, total, 1.0), uniform)
  chosen = jax.random.categorical(
    jax.random.fold_in(jax.random.key(0), count),
    jnp.log(jnp.maximum(p, 1e-30))[..., None, :],
    axis=-1,
    shape=(*p.shape[:-1], rank),
  )
  p = jnp.take_along_axis(p, chosen, axis=-1)[..., None]
  g = jnp.take_along_axis(g, chosen[..., None], axis=-2)
  a = jnp.take_along_axis(a, chosen[..., None], axis=-2)
  g = g / jnp.sqrt(rank * jnp.maximum(p, 1e-30))
  return SampleFactors(g, a, _inverse(g, a, damping))


def _interpolated(
  g: Array, a: Array, rank: int, damping: float, count: Int[Array, ""]
) -> SampleFactors:
  """Rows that span the others, by pivoted Cholesky of the kernel.

  v_k is about sum_s P_ks v_s, so F is about V_s^T M V_s with M = P^T P, and
  its damped inverse has M (damping I + K_ss M)^-1 in the middle.
  """
  del count
  products = kernel(g, a)
  pivots = _pivots(products, rank)
  across = jnp.take_along_axis(products, pivots[..., None, :], axis=-1)
  inner = jnp.take_along_axis(across, pivots[..., :, None], axis=-2)
  scale = jnp.trace(inner, axis1=-2, axis2=-1)[..., None, None]
  # Pivots may be dependent: the kernel may have a lower rank.
  floor = 1e-6 * scale + jnp.finfo(products.dtype).tiny
  p = jnp.swapaxes(
    jnp.linalg.solve(inner + floor * _eye(inner), jnp.swapaxes(across, -1, -2)),
    -1,
    -2,
  )
  middle = jnp.swapaxes(p, -1, -2) @ p
  # M (damping I + K M)^-1 = (damping I + M K)^-1 M.
  inverse = jnp.linalg.solve(damping * _eye(inner) + middle @ inner, middle)
  return SampleFactors(
    jnp.take_along_axis(g, pivots[..., None], axis=-2),
    jnp.take_along_axis(a, pivots[..., None], axis=-2),
    inverse,
  )


def _pivots(products: Array, rank: int) -> Int[Array, "*stack rank"]:
  """Greedily, the row that the ones chosen explain least."""
  stack, n = products.shape[:-2], products.shape[-1]
  rows = jnp.arange(n).reshape((1,) * len(stack) + (n,))

  def one(step, carry):
    left, columns, chosen = carry
    pivot = jnp.argmax(left, axis=-1)[..., None]
    row = jnp.take_along_axis(products, pivot[..., None], axis=-2)[..., 0, :]
    at = jnp.take_along_axis(columns, pivot[..., None], axis=-2)
    column = row - jnp.sum(columns * at, axis=-1)
    best = jnp.take_along_axis(left, pivot, axis=-1)
    usable = best > 0
    column = jnp.where(
      usable, column / jnp.sqrt(jnp.where(usable, best, 1.0)), 0.0
    )
    columns = columns.at[..., step].set(column)
    left = jnp.maximum(left - column * column, 0.0)
    left = jnp.where(rows == pivot, 0.0, left)
    return left, columns, chosen.at[..., step].set(pivot[..., 0])

  start = (
    jnp.diagonal(products, axis1=-2, axis2=-1),
    jnp.zeros((*stack, n, rank), products.dtype),
    jnp.zeros((*stack, rank), jnp.int32),
  )
  return jax.lax.fori_loop(0, rank, one, start)[2]


# (g, a, rank, damping, steps before this one) -> factors.
REDUCTIONS: dict[str, Callable[..., SampleFactors]] = {
  "none": _all,
  "importance": _sampled,
  "interpolative": _interpolated,
}


def sngd(
  *,
  rank: int,
  reduction: str = "none",
  damping: float = 0.03,
  interval: int | None = 10,
  warmup_steps: int = 0,
  rescale: str = "kl",
  kl_clip: float = 1e-3,
) -> Preconditioner:
  """D = (F + damping I)^-1 G with F of the last refresh's batch.

  Args:
    rank: samples kept: the rows of a batch, of which an example has as many as
      it has choices; fewer with a reduction.
    reduction: "none" is SNGD. HyLo chooses among rows: "importance" draws them
      by their share in F, "interpolative" takes those that span the rest;
      `hylo` changes between the two during a run.
    damping: positive.
    interval: steps between refreshes; None: see `Preconditioner`.
    warmup_steps: the first steps, which all refresh.
    rescale: see `Preconditioner`.
    kl_clip: for "kl".

  Raises:
    ValueError: names the option that does not fit.
  """
  registry.lookup(REDUCTIONS, reduction, "optim.precondition.reduction")
  check_damping(damping)
  check_rank(rank)
  return Preconditioner(
    Sngd(rank, reduction, damping),
    interval=interval,
    warmup_steps=warmup_steps,
    rescale=rescale,
    kl_clip=kl_clip,
  )


def check_rank(rank: int) -> None:
  """Refuses what is no number of samples."""
  if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
    raise ValueError(
      f"optim.precondition.rank={rank!r} must be a positive int."
    )
