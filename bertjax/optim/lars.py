"""LARS: layer-wise adaptive momentum SGD, LAMB's baseline (You et al. 2017)."""

from typing import Any

import optax

from bertjax.optim import selection, trust_ratio
from bertjax.optim.adamw import add_weight_decay


def lars(
  learning_rate: float | optax.Schedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.01,
  phi_clip: tuple[float, float] | None = None,
  trust_clip: tuple[float, float] | None = None,
  no_decay: selection.Rule = selection.is_bias_or_norm,
  no_adaptation: selection.Rule = selection.is_bias_or_norm,
  stacked_axes: selection.AxesFn | Any | None = None,
  split: trust_ratio.SplitFn | None = None,
  norm_axes: trust_ratio.MeshAxesFn | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum of the decayed gradient, at a fixed fraction of each layer.

      m <- momentum m + (1 - momentum) (g + weight_decay w)
      w <- w - lr_t (phi(|w|) / |m|) m

  No second moment, and the decay enters the momentum. This is the form that the
  LAMB paper analyses: the ratio is of the momentum. `optax.lars` has the form
  of the original paper, whose ratio is of the gradient and whose rate therefore
  carries another factor of 1000.

  Args:
    learning_rate: number or function step -> rate; relative, as in LAMB.
    momentum: decay of the first moment, in [0, 1).
    weight_decay: strength.
    phi_clip: see `trust_ratio.scale_by_trust_ratio`; likewise what follows.
    trust_clip: bounds on the ratio.
    no_decay: tensors without weight decay.
    no_adaptation: tensors with ratio 1.
    stacked_axes: axes that replicate layers.
    split: several matrices along one axis.
    norm_axes: mesh axes of the norms, inside shard_map.

  Raises:
    ValueError: an argument out of range or a rule that matches nothing.

  Reference: You et al. 2020, arXiv:1904.00962, algorithm 1; You et al. 2017,
    arXiv:1708.03888.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"optim.momentum={momentum} must be in [0, 1).")
  return optax.chain(
    add_weight_decay(weight_decay, no_decay),
    optax.ema(momentum, debias=False),
    trust_ratio.scale_by_trust_ratio(
      no_adaptation=no_adaptation,
      stacked_axes=stacked_axes,
      split=split,
      norm_axes=norm_axes,
      phi_clip=phi_clip,
      trust_clip=trust_clip,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )
