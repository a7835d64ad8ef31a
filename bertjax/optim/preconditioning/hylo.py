"""HyLo: few samples, chosen carefully only while the gradient changes much.

Mu et al. 2022, SC22. Both reductions of `sngd` keep as many samples. Where
training is *critical* the interpolative decomposition chooses them, which loses
least; elsewhere importance sampling, which costs least. A stretch of training
is critical if the gradient's norm has changed by a share over the last ones:

    |norm_t - norm_(t-1)| >= threshold norm_(t-1)

The paper's stretches are epochs, its gradient is added up over one, and a cut
of the learning rate begins a critical one as well. Here they are `window`
refreshes, the norm is averaged over them, for each layer (or stack) by itself,
and the learning rate is not asked. The norm is that of sum_k g_k (x) a_k / n
over n rows, which the kernel has: sqrt(sum_kl K_kl / n).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bertjax.optim.preconditioning.base import Preconditioner, Statistics
from bertjax.optim.preconditioning.eva import check_damping
from bertjax.optim.preconditioning.layers import Layer
from bertjax.optim.preconditioning.sngd import (
  SampleFactors,
  Sngd,
  check_rank,
  kernel,
  samples,
)


class Trend(NamedTuple):
  """The gradient's norm, watched.

  Attributes:
    seen: refreshes of this stretch.
    total: of their norms.
    earlier: mean norm of the last stretch; 0 before there is one.
    critical: whether this stretch is; the first is.
  """

  seen: Int[Array, ""]
  total: Float[Array, ""]
  earlier: Float[Array, ""]
  critical: Bool[Array, ""]


class HyloFactors(NamedTuple):
  """Samples, and what decides on the next ones."""

  samples: SampleFactors
  trend: Trend


@dataclasses.dataclass(frozen=True)
class Hylo:
  """Fields as the arguments of `hylo`."""

  rank: int
  damping: float
  threshold: float
  window: int

  def _with(self, reduction: str) -> Sngd:
    return Sngd(self.rank, reduction, self.damping)

  def wants(self, layer: Layer) -> tuple[str, ...]:
    return self._with("importance").wants(layer)

  def init(self, layer: Layer) -> HyloFactors:
    trend = Trend(
      seen=jnp.zeros((), jnp.int32),
      total=jnp.zeros((), jnp.float32),
      earlier=jnp.zeros((), jnp.float32),
      critical=jnp.ones((), bool),
    )
    return HyloFactors(self._with("importance").init(layer), trend)

  def refresh(
    self,
    layer: Layer,
    factors: HyloFactors,
    statistics: Statistics,
    count: Int[Array, ""],
  ) -> HyloFactors:
    def reduced(reduction):
      return lambda: self._with(reduction).refresh(
        layer, factors.samples, statistics, count
      )

    chosen = jax.lax.cond(
      factors.trend.critical, reduced("interpolative"), reduced("importance")
    )
    g, a = samples(layer, statistics)
    square = kernel(g, a).sum() / g.shape[-2]
    # Rounding may leave less than nothing of what cancels.
    norm = jnp.sqrt(jnp.maximum(square, 0.0))
    return HyloFactors(chosen, self.advance(factors.trend, norm))

  def advance(self, trend: Trend, norm: Float[Array, ""]) -> Trend:
    """The trend of the next refresh, after one that saw a norm."""
    seen, total = trend.seen + 1, trend.total + norm
    mean = total / self.window
    ends = seen == self.window
    change = jnp.abs(mean - trend.earlier) >= self.threshold * trend.earlier
    return Trend(
      seen=jnp.where(ends, 0, seen),
      total=jnp.where(ends, 0.0, total),
      earlier=jnp.where(ends, mean, trend.earlier),
      critical=jnp.where(ends, change, trend.critical),
    )

  def direction(
    self,
    layer: Layer,
    factors: HyloFactors,
    gradient: Float[Array, "*stack o i"],
  ) -> Float[Array, "*stack o i"]:
    return self._with("importance").direction(layer, factors.samples, gradient)


def hylo(
  *,
  rank: int,
  damping: float = 0.03,
  threshold: float = 0.25,
  window: int = 10,
  interval: int | None = 10,
  warmup_steps: int = 0,
  rescale: str = "kl",
  kl_clip: float = 1e-3,
) -> Preconditioner:
  """D = (F + damping I)^-1 G with F of some rows of the last refresh's batch.

  Args:
    rank: samples kept; about a tenth of a batch's rows in the paper.
    damping: positive.
    threshold: relative change of the gradient's norm, from one stretch to the
      next, from which on the stretch that follows is critical. 0: all are.
    window: refreshes of a stretch.
    interval: steps between refreshes; None: see `Preconditioner`.
    warmup_steps: the first steps, which all refresh.
    rescale: see `Preconditioner`.
    kl_clip: for "kl".

  Raises:
    ValueError: names the option that does not fit.
  """
  check_damping(damping)
  check_rank(rank)
  if not threshold >= 0:
    raise ValueError(
      f"optim.precondition.threshold={threshold} must not be negative."
    )
  if isinstance(window, bool) or not isinstance(window, int) or window < 1:
    raise ValueError(
      f"optim.precondition.window={window!r} must be a positive int."
    )
  return Preconditioner(
    Hylo(rank, damping, threshold, window),
    interval=interval,
    warmup_steps=warmup_steps,
    rescale=rescale,
    kl_clip=kl_clip,
  )
