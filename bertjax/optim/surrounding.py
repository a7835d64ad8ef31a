"""What stands around every optimizer: clipping, freezing, factors of rates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from bertjax import registry
from bertjax.optim import clip, rates, selection, trust_ratio
from bertjax.optim.local import LocalGradientTransformation
from bertjax.optim.preconditioning import PreconditioningTransformation
from bertjax.parallel.error_feedback import Workers


def surround(
  transform: optax.GradientTransformation,
  before: PreconditioningTransformation | None,
  params: Any,
  stacked: selection.AxesFn,
  global_norm_axes: trust_ratio.MeshAxesFn | None,
  workers: Workers | None,
  has_factors: bool,
  *,
  clip_norm: float | None = None,
  clip_scope: str | None = None,
  lr_multipliers: Sequence[tuple[str, float]] = (),
  layerwise_decay: float | None = None,
  freeze: selection.Rule = (),
  freeze_lowest: int | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Puts around an optimizer what is the same for all of them.

  Args:
    transform: the optimizer.
    before: what makes directions of clipped gradients, if anything does.
    params: parameters, possibly abstract.
    stacked: (name, leaf) -> stacked axes.
    global_norm_axes: mesh axes of the gradient's norm, inside shard_map.
    workers: of an optimizer that takes local gradients.
    has_factors: the optimizer has those of the learning rate already.
    clip_norm: clips the global gradient norm; None only records it.
    clip_scope: "global" clips the gradient of the batch, by default;
      "per_shard" that of each data shard before they are averaged, as BERT was
      trained on TPU. The only one for an optimizer that takes local gradients.
    lr_multipliers: `[(regex, factor)]`, first match wins, 1 for the rest.
    layerwise_decay: factor per layer counted from the top.
    freeze: parameters that stay as they are and have no state.
    freeze_lowest: freezes the embeddings and this many layers. In a scanned
      stack the frozen layers keep (unused) state: they share their tensors.

  Raises:
    ValueError: names the field of a scope of clipping that does not fit the
      optimizer, or of a rule that leaves nothing to train.
  """
  factors: rates.Factors = {}
  if not has_factors:
    factors = rates.rate_factors(
      params, lr_multipliers, layerwise_decay, stacked
    )
  kept = kept_factors(params, freeze_lowest, stacked)
  # Zeroes the gradient too: a frozen layer must not count in the clipped norm.
  partly = {name: factor for name, factor in kept.items() if np.any(factor)}
  frozen = frozen_names(params, freeze, kept)
  if frozen and len(frozen) == len(selection.by_name(params)):
    raise ValueError("optim.freeze leaves no parameter to train.")

  wrapped = optax.chain(
    rates.scale_by_factors(partly),
    _clipping(transform, clip_norm, clip_scope, global_norm_axes, workers),
    *([] if before is None else [before]),
    transform,
    rates.scale_by_factors(factors),
    rates.scale_by_factors(partly),
  )
  wrapped = optax.with_extra_args_support(wrapped)
  if not frozen:
    return wrapped
  return rates.freeze(wrapped, lambda name, leaf: name in frozen)


def kept_factors(
  params: Any, freeze_lowest: int | None, stacked: selection.AxesFn
) -> rates.Factors:
  """0 for what `freeze_lowest` freezes, by path name; see `surround`."""
  if freeze_lowest is None:
    return {}
  return rates.frozen_factors(params, freeze_lowest, stacked)


def frozen_names(
  params: Any, freeze: selection.Rule, kept: rates.Factors
) -> set[str]:
  """Names of the parameters that have no part that trains."""
  by_rule = selection.resolve(freeze, params, "optim.freeze")
  return {
    name
    for name, leaf in selection.by_name(params).items()
    if by_rule(name, leaf) or not np.any(kept.get(name, 1.0))
  }


def _clipping(
  transform: optax.GradientTransformation,
  clip_norm: float | None,
  clip_scope: str | None,
  global_norm_axes: trust_ratio.MeshAxesFn | None,
  workers: Workers | None,
) -> optax.GradientTransformationExtraArgs:
  """What stands before the optimizer; see `surround`."""
  scopes = dict.fromkeys(("global", "per_shard"))
  if clip_scope is not None:
    registry.lookup(scopes, clip_scope, "optim.clip_scope")
  if clip_scope == "per_shard" and clip_norm is None:
    raise ValueError("optim.clip_scope='per_shard' needs optim.clip_norm.")
  if isinstance(transform, LocalGradientTransformation):
    if clip_scope == "global":
      raise ValueError(
        "optim.clip_scope='global' has no meaning for this optimizer: nobody"
        " has the averaged gradient whose norm it would take. Leave it out:"
        " clip_norm then clips each worker's own gradient."
      )
    return clip.clip_own(clip_norm, workers.count, workers.axis)
  if clip_scope == "per_shard":
    return clip.clip_per_shard(clip_norm)
  return clip.clip_by_global_norm(clip_norm, global_norm_axes)
