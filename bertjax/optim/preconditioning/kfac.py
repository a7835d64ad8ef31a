"""K-FAC as KAISA has it: covariances of inputs and output gradients.

Martens & Grosse 2015, arXiv:1503.05671; Pauloski et al. 2021 (KAISA),
arXiv:2107.01739. The Fisher matrix is the empirical one: gradients are those of
the batch's own labels.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bertjax import registry
from bertjax.optim.preconditioning import sharing
from bertjax.optim.preconditioning.base import Preconditioner, Statistics
from bertjax.optim.preconditioning.eva import check_damping
from bertjax.optim.preconditioning.layers import Layer


class Eigen(NamedTuple):
  """A covariance's eigenvectors, in columns, and eigenvalues."""

  vectors: Float[Array, "*stack d d"]
  values: Float[Array, "*stack d"]


@flax.struct.dataclass
class KfacFactors:
  """Covariances and what was last made of them, float32.

  Attributes:
    output: of output gradients.
    input: of (homogeneous) inputs.
    left: of `output`: an `Eigen`, or the damped inverse.
    right: of `input`.
    grad_worker_fraction: which workers keep them, see `sharing`.
  """

  output: Float[Array, "*stack o o"]
  input: Float[Array, "*stack i i"]
  left: Eigen | Array
  right: Eigen | Array
  grad_worker_fraction: float | None = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Kfac:
  """Fields as the arguments of `kfac`."""

  form: str
  damping: float
  decay: float
  inverse_interval: int
  grad_worker_fraction: float | None

  def wants(self, layer: Layer) -> tuple[str, ...]:
    names = ("token_count", "input_gram", "output_gram")
    return (*names, "input_sum") if layer.bias else names

  def init(self, layer: Layer) -> KfacFactors:
    def identity(width):
      return jnp.tile(
        jnp.eye(width, dtype=jnp.float32), (*layer.size.stack, 1, 1)
      )

    def made(width):
      if self.form == "inverse":
        return identity(width)
      ones = jnp.ones((*layer.size.stack, width), jnp.float32)
      return Eigen(identity(width), ones)

    rows, columns = layer.size.outputs, layer.columns
    return KfacFactors(
      identity(rows),
      identity(columns),
      made(rows),
      made(columns),
      self.grad_worker_fraction,
    )

  def refresh(
    self,
    layer: Layer,
    factors: KfacFactors,
    statistics: Statistics,
    count: Int[Array, ""],
  ) -> KfacFactors:
    seen = statistics["token_count"].sum(-1) > 0
    decay = jnp.where(seen, self.decay, 1.0)[..., None, None]

    def averaged(old, new):
      return decay * old + (1 - decay) * new

    output = averaged(factors.output, statistics["output_gram"])
    inputs = averaged(factors.input, _input_covariance(layer, statistics))
    output, inputs = sharing.keep((output, inputs), self.grad_worker_fraction)
    return factors.replace(output=output, input=inputs)

  def refresh_jointly(
    self, factors: Mapping[str, KfacFactors], count: Int[Array, ""]
  ) -> dict[str, KfacFactors]:
    """Decomposes all covariances, if that is due."""
    fraction = self.grad_worker_fraction

    def decomposed():
      sides = [side for x in factors.values() for side in (x.output, x.input)]
      found = sharing.decompose(self._made, sides, fraction)
      return sharing.keep(tuple(found), fraction)

    made = jax.lax.cond(
      count % self.inverse_interval == 0,
      decomposed,
      lambda: tuple(
        side for x in factors.values() for side in (x.left, x.right)
      ),
    )
    pairs = zip(made[::2], made[1::2], strict=True)
    return {
      path: old.replace(left=left, right=right)
      for (path, old), (left, right) in zip(factors.items(), pairs, strict=True)
    }

  def _made(self, covariance: Array) -> Eigen | Array:
    if self.form == "inverse":
      eye = jnp.broadcast_to(
        jnp.eye(covariance.shape[-1], dtype=jnp.float32), covariance.shape
      )
      return jnp.linalg.inv(covariance + self.damping * eye)
    values, vectors = jnp.linalg.eigh(covariance)
    # A covariance has no negative ones but by rounding.
    return Eigen(vectors, jnp.maximum(values, 0.0))

  def direction(
    self,
    layer: Layer,
    factors: KfacFactors,
    gradient: Float[Array, "*stack o i"],
  ) -> Float[Array, "*stack o i"]:
    del layer
    # Owners precondition; whoever needs the direction gathers it.
    gradient = sharing.at_owners(gradient, self.grad_worker_fraction)
    found = self._preconditioned(factors.left, factors.right, gradient)
    return sharing.at_owners(found, self.grad_worker_fraction)

  def _preconditioned(
    self, left: Eigen | Array, right: Eigen | Array, gradient: Array
  ) -> Array:
    if self.form == "inverse":
      return left @ gradient @ right

    def transposed(x):
      return jnp.swapaxes(x, -1, -2)

    rotated = transposed(left.vectors) @ gradient @ right.vectors
    products = left.values[..., :, None] * right.values[..., None, :]
    rotated = rotated / (products + self.damping)
    return left.vectors @ rotated @ transposed(right.vectors)


def _input_covariance(layer: Layer, statistics: Statistics) -> Array:
  """[[x x^T, x], [x^T, 1]], averaged; without a bias its first block."""
  gram = statistics["input_gram"]
  if not layer.bias:
    return gram
  mean = statistics["input_sum"][..., 0, :, None]
  last = jnp.swapaxes(mean, -1, -2)
  one = jnp.ones_like(last[..., :1])
  return jnp.concatenate(
    [
      jnp.concatenate([gram, mean], axis=-1),
      jnp.concatenate([last, one], axis=-1),
    ],
    axis=-2,
  )


FORMS = ("eigen", "inverse")


def kfac(
  *,
  form: str = "eigen",
  damping: float = 1e-3,
  decay: float = 0.95,
  interval: int | None = 1,
  inverse_interval: int = 10,
  grad_worker_fraction: float | None = None,
  rescale: str = "kl",
  kl_clip: float = 1e-3,
) -> Preconditioner:
  """D = (G (x) A + damping)^-1 of the gradient, or with damped inverses.

  The moving averages start at the identity, as KAISA's do. Workers share the
  decompositions; see `sharing`.

  Args:
    form: "eigen" damps the products of eigenvalues; "inverse" is
      (G + damping I)^-1 and (A + damping I)^-1.
    damping: positive.
    decay: of the covariances' moving averages; 0 takes each batch's own.
    interval: steps between updates of covariances; None: see
      `Preconditioner`. It saves their communication and averages; the batch's
      own covariances come out of every backward pass, which knows of no step.
    inverse_interval: steps between decompositions, a multiple of `interval`.
    grad_worker_fraction: part of the workers that keep a layer's factors and
      precondition it: KAISA's communication-optimal 1, its memory-optimal 0
      (meaning 1 / workers), or what axes of the mesh make between. None: as
      parameters are sharded, over "fsdp".
    rescale: see `Preconditioner`.
    kl_clip: for "kl".

  Raises:
    ValueError: names the option that does not fit.
  """
  registry.lookup(dict.fromkeys(FORMS), form, "optim.precondition.form")
  check_damping(damping)
  sharing.check_fraction(grad_worker_fraction)
  if not 0 <= decay < 1:
    raise ValueError(f"optim.precondition.decay={decay} must be in [0, 1).")
  made = Preconditioner(
    Kfac(form, damping, decay, inverse_interval, grad_worker_fraction),
    interval=interval,
    rescale=rescale,
    kl_clip=kl_clip,
  )
  if inverse_interval < 1 or inverse_interval % (interval or 1):
    raise ValueError(
      f"optim.precondition.inverse_interval={inverse_interval} must be a"
      f" multiple of interval={interval}."
    )
  return made
