"""MKOR: Kronecker factors whose inverses are kept by rank-one updates.

Mozaffari, Li, Zhang, Mehri Dehnavi 2023, arXiv:2306.01685. Of a batch it sees
two vectors per layer, the mean input and the mean output gradient; a refresh is
O(d^2) work and O(d) communication, whatever the batch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bertjax import registry
from bertjax.optim.preconditioning import inverse_factor
from bertjax.optim.preconditioning.base import Preconditioner, Statistics
from bertjax.optim.preconditioning.layers import Layer

STORAGE = ("bfloat16", "float16", "float32")


class InverseFactors(NamedTuple):
  """Inverses; a side that is not preconditioned has None.

  Attributes:
    left: of output gradients, [*stack, outputs, outputs].
    right: of (homogeneous) inputs, [*stack, inputs, inputs].
  """

  left: Float[Array, "*stack o o"] | None
  right: Float[Array, "*stack i i"] | None


@dataclasses.dataclass(frozen=True)
class Mkor:
  """Fields as the arguments of `mkor`."""

  rule: str
  decay: float
  threshold: float
  keep: float
  norm: str
  clip: float
  dtype: str
  max_width: int | None
  rank: int

  def wants(self, layer: Layer) -> tuple[str, ...]:
    return mean_vectors(layer, self.rank)

  def _sides(self, layer: Layer) -> tuple[bool, bool]:
    """Whether left and right are preconditioned."""
    widths = layer.size.outputs, layer.columns
    most = self.max_width
    return tuple(most is None or width <= most for width in widths)

  def init(self, layer: Layer) -> InverseFactors:
    def identity(width):
      return jnp.tile(
        jnp.eye(width, dtype=self.dtype), (*layer.size.stack, 1, 1)
      )

    left, right = self._sides(layer)
    return InverseFactors(
      identity(layer.size.outputs) if left else None,
      identity(layer.columns) if right else None,
    )

  def refresh(
    self,
    layer: Layer,
    factors: InverseFactors,
    statistics: Statistics,
    count: Int[Array, ""],
  ) -> InverseFactors:
    del count
    g, a = clipped_vectors(layer, statistics, self.clip)
    pairs = [
      (factor.astype(jnp.float32), vectors)
      for factor, vectors in zip(factors, (g, a))
      if factor is not None
    ]
    if not pairs:
      return factors
    new = iter(factor.astype(self.dtype) for factor in self._refreshed(pairs))
    return InverseFactors(
      *(None if old is None else next(new) for old in factors)
    )

  def _refreshed(self, pairs: Sequence[tuple[Array, Array]]) -> list[Array]:
    """New inverses of (inverse, vectors); what is too large is blended."""
    rule = inverse_factor.RULES[self.rule]
    norm = inverse_factor.NORMS[self.norm]
    large = [norm(factor) > self.threshold for factor, _ in pairs]
    instead = self.rule == "reference"
    if instead:
      # One flag for both, and a blend takes the refresh's place.
      large = [functools.reduce(jnp.logical_or, large)] * len(pairs)
    new = []
    for flag, (factor, vectors) in zip(large, pairs):
      flag = flag[..., None, None]
      blended = inverse_factor.blend(factor, self.keep)
      if instead:
        refreshed = rule(factor, vectors, self.decay)
        new.append(jnp.where(flag, blended, refreshed))
      else:
        start = jnp.where(flag, blended, factor)
        new.append(rule(start, vectors, self.decay))
    return new

  def direction(
    self,
    layer: Layer,
    factors: InverseFactors,
    gradient: Float[Array, "*stack o i"],
  ) -> Float[Array, "*stack o i"]:
    del layer
    if factors.left is not None:
      gradient = factors.left.astype(jnp.float32) @ gradient
    if factors.right is not None:
      gradient = gradient @ factors.right.astype(jnp.float32)
    return gradient


def mean_vectors(layer: Layer, groups: int = 1) -> tuple[str, ...]:
  """Statistics of mean inputs and output gradients.

  The mean gradient of all tokens is a bias's gradient, which costs nothing.
  """
  names = ("token_count", "input_sum")
  return names if layer.bias and groups == 1 else (*names, "output_sum")


def clipped_vectors(
  layer: Layer, statistics: Statistics, clip: float
) -> tuple[Float[Array, "*stack r o"], Float[Array, "*stack r i"]]:
  """Output gradients and homogeneous inputs, per group, clipped by element."""
  g, a = statistics["output_sum"], statistics["input_sum"]
  if layer.bias:
    a = jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1)
  return jnp.clip(g, -clip, clip), jnp.clip(a, -clip, clip)


def mkor(
  *,
  rule: str = "reference",
  decay: float = 0.95,
  interval: int = 10,
  warmup_steps: int = 0,
  rank: int = 1,
  threshold: float = 2.0,
  keep: float = 0.9,
  norm: str = "max_abs",
  clip: float = 100.0,
  dtype: str = "bfloat16",
  wire_dtype: str = "bfloat16",
  max_width: int | None = None,
  rescale: str = "sum",
  kl_clip: float = 1e-3,
) -> Preconditioner:
  """D = L G R, with L and R kept as inverses and never inverted.

  Args:
    rule: "exact", "reference" or "paper", three different updates of an
      inverse: see `inverse_factor`.
    decay: of the factors, called momentum in the paper.
    interval: steps between refreshes.
    warmup_steps: the first steps, which all refresh.
    rank: vectors per side and refresh; beyond the paper's 1, tokens are divided
      into so many groups, each with its means.
    threshold: a factor whose norm exceeds it is blended with the identity:
      before the refresh; with rule "reference" instead of it, in both factors
      of the layer as soon as one is too large.
    keep: part of the factor in the blend. The authors' code means 0.9; by a
      slip it resets to the identity, which is 0.
    norm: "max_abs", "frobenius" (divided by sqrt(d)) or "spectral".
    clip: bound on every element of a vector.
    dtype: of stored factors: "bfloat16", "float16" or "float32". float16
      overflows after some hundred refreshes of a rule that grows.
    wire_dtype: of vectors that devices add up, of the same choice.
    max_width: sides that are wider are not preconditioned, which saves the
      square of their width in memory; None for no limit.
    rescale: see `Preconditioner`; the authors' code has "sum".
    kl_clip: for "kl".

  Raises:
    ValueError: names the option that does not fit.

  Reference: Mozaffari et al. 2023, arXiv:2306.01685, algorithm 1, and its code.
  """
  registry.lookup(inverse_factor.RULES, rule, "optim.precondition.rule")
  registry.lookup(inverse_factor.NORMS, norm, "optim.precondition.norm")
  registry.lookup(dict.fromkeys(STORAGE), dtype, "optim.precondition.dtype")
  for field, value, fits, text in (
    ("decay", decay, 0 < decay < 1, "be between 0 and 1"),
    ("threshold", threshold, threshold > 1, "exceed 1, the identity's norm"),
    ("keep", keep, 0 <= keep < 1, "be in [0, 1)"),
    ("clip", clip, clip > 0, "be positive"),
    ("max_width", max_width, max_width is None or max_width > 0,
     "be positive, or None"),
  ):  # fmt: skip
    if not fits:
      raise ValueError(f"optim.precondition.{field}={value} must {text}.")
  if rule == "paper" and rank != 1:
    raise ValueError(
      f"optim.precondition.rank={rank} needs rule='exact' or 'reference'; the"
      " printed one is for rank 1."
    )
  method = Mkor(
    rule=rule,
    decay=decay,
    threshold=threshold,
    keep=keep,
    norm=norm,
    clip=clip,
    dtype=dtype,
    max_width=max_width,
    rank=rank,
  )
  return Preconditioner(
    method,
    interval=interval,
    warmup_steps=warmup_steps,
    rescale=rescale,
    kl_clip=kl_clip,
    wire_dtype=wire_dtype,
    groups=rank,
  )
