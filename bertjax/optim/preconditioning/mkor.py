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
from bertjax.optim.preconditioning.blocks import Blocks
from bertjax.optim.preconditioning.layers import Layer
from bertjax.optim.preconditioning.vectors import (
  are_there,
  clipped_vectors,
  leading_vectors,
  mean_vectors,
)

STORAGE = ("bfloat16", "float16", "float32")
SIDES = ("both", "left", "right")


class InverseFactors(NamedTuple):
  """Inverses; a side that is not preconditioned has None.

  Attributes:
    left: of output gradients, [*stack, outputs, outputs], or its diagonal
      blocks, [*stack, k, w, w].
    right: the same of (homogeneous) inputs.
  """

  left: Float[Array, "*blocks o o"] | None
  right: Float[Array, "*blocks i i"] | None


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
  block_width: int | None
  sides: str
  rank: int
  groups: int

  def wants(self, layer: Layer) -> tuple[str, ...]:
    return mean_vectors(layer, self.groups)

  def _blocks(self, layer: Layer) -> tuple[Blocks | None, Blocks | None]:
    """How left and right are divided; None for what is not preconditioned."""
    widths = dict(left=layer.size.outputs, right=layer.columns)
    most = self.max_width
    return tuple(
      Blocks(width, self.block_width)
      if self.sides in ("both", side) and (most is None or width <= most)
      else None
      for side, width in widths.items()
    )

  def init(self, layer: Layer) -> InverseFactors:
    return InverseFactors(
      *(
        None if side is None else side.identity(layer.size.stack, self.dtype)
        for side in self._blocks(layer)
      )
    )

  def refresh(
    self,
    layer: Layer,
    factors: InverseFactors,
    statistics: Statistics,
    count: Int[Array, ""],
  ) -> InverseFactors:
    del count
    pairs = clipped_vectors(layer, statistics, self.clip)
    if self.groups > self.rank:
      pairs = [leading_vectors(vectors, self.rank) for vectors in pairs]
    used = [
      (side, factor.astype(jnp.float32), side.split(vectors))
      for side, factor, vectors in zip(self._blocks(layer), factors, pairs)
      if side is not None
    ]
    if not used:
      return factors
    seen = are_there(pairs)
    new = iter(factor.astype(self.dtype) for factor in self._refreshed(used))

    def chosen(old):
      extra = (None,) * (old.ndim - seen.ndim)
      return jnp.where(seen[(..., *extra)], next(new), old)

    return InverseFactors(
      *(None if old is None else chosen(old) for old in factors)
    )

  def _refreshed(
    self, used: Sequence[tuple[Blocks, Array, Array]]
  ) -> list[Array]:
    """New inverses of (side, inverse, vectors); large ones are blended."""
    rule = inverse_factor.RULES[self.rule]
    norm = inverse_factor.NORMS[self.norm]
    large = [norm(factor) > self.threshold for _, factor, _ in used]
    instead = self.rule == "reference"
    if instead:
      # One flag for both, and a blend takes the refresh's place.
      flags = [side.any(flag) for (side, _, _), flag in zip(used, large)]
      flag = functools.reduce(jnp.logical_or, flags)
      large = [side.each(flag) for side, _, _ in used]
    new = []
    for flag, (side, factor, vectors) in zip(large, used):
      flag = flag[..., None, None]
      blended = inverse_factor.blend(factor, self.keep)
      if instead:
        found = jnp.where(flag, blended, rule(factor, vectors, self.decay))
      else:
        start = jnp.where(flag, blended, factor)
        found = rule(start, vectors, self.decay)
      new.append(side.unpadded(found))
    return new

  def direction(
    self,
    layer: Layer,
    factors: InverseFactors,
    gradient: Float[Array, "*stack o i"],
  ) -> Float[Array, "*stack o i"]:
    left, right = self._blocks(layer)
    if left is not None:
      gradient = left.times(factors.left.astype(jnp.float32), gradient)
    if right is not None:
      # G R = (R G^T)^T: R is symmetric.
      across = jnp.swapaxes(gradient, -1, -2)
      across = right.times(factors.right.astype(jnp.float32), across)
      gradient = jnp.swapaxes(across, -1, -2)
    return gradient


def mkor(
  *,
  rule: str = "reference",
  decay: float = 0.95,
  interval: int | None = 10,
  warmup_steps: int = 0,
  rank: int = 1,
  svd_groups: int | None = None,
  threshold: float = 2.0,
  keep: float = 0.9,
  norm: str = "max_abs",
  clip: float = 100.0,
  dtype: str = "bfloat16",
  wire_dtype: str = "bfloat16",
  max_width: int | None = None,
  block_width: int | None = None,
  sides: str = "both",
  rescale: str = "sum",
  kl_clip: float = 1e-3,
) -> Preconditioner:
  """D = L G R, with L and R kept as inverses and never inverted.

  Args:
    rule: "exact", "reference" or "paper", three different updates of an
      inverse: see `inverse_factor`.
    decay: of the factors, called momentum in the paper.
    interval: steps between refreshes; None: see `Preconditioner`.
    warmup_steps: the first steps, which all refresh.
    rank: vectors per side and refresh; beyond the paper's 1, tokens are divided
      into so many groups, each with its means.
    svd_groups: tokens are divided into so many groups, more than `rank`, and
      the vectors are the leading singular ones of the groups' means; that many
      means travel. None takes the means themselves.
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
    block_width: wider sides are divided into diagonal blocks, none wider, which
      saves all but a part of about block_width / width; None for no limit.
    sides: "both"; "left" preconditions by output gradients alone, "right" by
      inputs alone.
    rescale: see `Preconditioner`; the authors' code has "sum".
    kl_clip: for "kl".

  Raises:
    ValueError: names the option that does not fit.

  Reference: Mozaffari et al. 2023, arXiv:2306.01685, algorithm 1, and its code.
  """
  registry.lookup(inverse_factor.RULES, rule, "optim.precondition.rule")
  registry.lookup(inverse_factor.NORMS, norm, "optim.precondition.norm")
  registry.lookup(dict.fromkeys(STORAGE), dtype, "optim.precondition.dtype")
  registry.lookup(dict.fromkeys(SIDES), sides, "optim.precondition.sides")
  for field, value, fits, text in (
    ("decay", decay, 0 < decay < 1, "be between 0 and 1"),
    ("threshold", threshold, threshold > 1, "exceed 1, the identity's norm"),
    ("keep", keep, 0 <= keep < 1, "be in [0, 1)"),
    ("clip", clip, clip > 0, "be positive"),
    ("max_width", max_width, max_width is None or max_width > 0,
     "be positive, or None"),
    ("block_width", block_width, block_width is None or block_width > 0,
     "be positive, or None"),
    ("svd_groups", svd_groups, svd_groups is None or svd_groups > rank,
     f"exceed rank={rank}, or be None"),
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
    block_width=block_width,
    sides=sides,
    rank=rank,
    groups=rank if svd_groups is None else svd_groups,
  )
  return Preconditioner(
    method,
    interval=interval,
    warmup_steps=warmup_steps,
    rescale=rescale,
    kl_clip=kl_clip,
    wire_dtype=wire_dtype,
    groups=method.groups,
  )
