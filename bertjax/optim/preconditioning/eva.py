"""Eva: curvature of two vectors per layer, inverted in closed form.

Zhang, Shi, Li 2023, arXiv:2308.02123. The factors of K-FAC are replaced by the
outer products of their mean vectors, so nothing quadratic is ever stored.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bertjax.optim.preconditioning.base import Preconditioner, Statistics
from bertjax.optim.preconditioning.layers import Layer
from bertjax.optim.preconditioning.vectors import (
  are_there,
  clipped_vectors,
  mean_vectors,
)


class EvaVectors(NamedTuple):
  """Moving averages, float32.

  Attributes:
    left: of mean output gradients, [*stack, outputs].
    right: of mean (homogeneous) inputs, [*stack, inputs].
  """

  left: Float[Array, "*stack o"]
  right: Float[Array, "*stack i"]


@dataclasses.dataclass(frozen=True)
class Eva:
  """Fields as the arguments of `eva`."""

  damping: float
  decay: float
  clip: float

  def wants(self, layer: Layer) -> tuple[str, ...]:
    return mean_vectors(layer)

  def init(self, layer: Layer) -> EvaVectors:
    stack, _, outputs = layer.size
    return EvaVectors(
      jnp.zeros((*stack, outputs), jnp.float32),
      jnp.zeros((*stack, layer.columns), jnp.float32),
    )

  def refresh(
    self,
    layer: Layer,
    factors: EvaVectors,
    statistics: Statistics,
    count: Int[Array, ""],
  ) -> EvaVectors:
    # The first batch counts whole: there is no zero to average with.
    decay = jnp.where(count == 0, 0.0, self.decay)
    new = clipped_vectors(layer, statistics, self.clip)
    decay = jnp.where(are_there(new), decay, 1.0)[..., None]
    return EvaVectors(
      *(decay * v + (1 - decay) * u[..., 0, :] for v, u in zip(factors, new))
    )

  def direction(
    self,
    layer: Layer,
    factors: EvaVectors,
    gradient: Float[Array, "*stack o i"],
  ) -> Float[Array, "*stack o i"]:
    del layer
    g, a = factors.left[..., :, None], factors.right[..., None, :]

    def square(v):
      return jnp.sum(jnp.square(v), axis=(-2, -1), keepdims=True)

    along = jnp.sum(g * gradient * a, axis=(-2, -1), keepdims=True)
    share = along / (square(g) * square(a) + self.damping)
    return (gradient - share * (g * a)) / self.damping


def eva(
  *,
  damping: float = 0.03,
  decay: float = 0.95,
  interval: int | None = 1,
  warmup_steps: int = 0,
  clip: float = 100.0,
  wire_dtype: str = "float32",
  rescale: str = "kl",
  kl_clip: float = 1e-3,
) -> Preconditioner:
  """D = (damping I + v v^T)^-1 G with v = g (x) a, mean gradient and input.

  Args:
    damping: positive.
    decay: of the vectors' moving averages.
    interval: steps between refreshes; None: see `Preconditioner`.
    warmup_steps: the first steps, which all refresh.
    clip: bound on every element of a vector.
    wire_dtype: of vectors that devices add up.
    rescale: see `Preconditioner`.
    kl_clip: for "kl".

  Raises:
    ValueError: names the option that does not fit.
  """
  check_damping(damping)
  if not 0 <= decay < 1:
    raise ValueError(f"optim.precondition.decay={decay} must be in [0, 1).")
  return Preconditioner(
    Eva(damping, decay, clip),
    interval=interval,
    warmup_steps=warmup_steps,
    rescale=rescale,
    kl_clip=kl_clip,
    wire_dtype=wire_dtype,
  )


def check_damping(damping: float) -> None:
  """Refuses what is not positive."""
  if not damping > 0:
    raise ValueError(f"optim.precondition.damping={damping} must be positive.")
