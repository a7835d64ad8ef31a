"""LAMB: layer-wise adaptive Adam for very large batches (You et al. 2020).

The optimizer behind the 76-minute BERT. Published codes differ in small ways;
each difference is one argument here:

| code | arguments |
|---|---|
| paper v5, TF-Addons, optax, MLPerf by Google | the defaults |
| early paper version, cybertronai | `phi_clip=(0, 10), bias_correction=False` |
| DeepSpeed | `trust_clip=(0.01, 10)`, or (0.01, 0.3) for BERT-large at 64k |
| LAMBC | `trust_clip=(0, 1)` |
| apex, NVIDIA | `pre_norm="clip", skip_undecayed=True` |
| NVLAMB | `pre_norm="divide"` (or "clip") |
| N-LAMB, NN-LAMB | `nesterov="first"`, `"both"` |
| AdamW, for ablation | `adapt=False` |
"""

from typing import Any, Literal

import optax

from bertjax.optim import clip, selection, trust_ratio
from bertjax.optim.adamw import add_weight_decay, scale_by_adam
from bertjax.optim.by_layer import StagedTransformation


def lamb(
  learning_rate: float | optax.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.01,
  bias_correction: bool = True,
  grad_averaging: bool = True,
  nesterov: Literal["none", "first", "both"] = "none",
  pre_norm: Literal["none", "clip", "divide"] = "none",
  max_grad_norm: float | None = None,
  adapt: bool = True,
  skip_undecayed: bool = False,
  phi_clip: tuple[float, float] | None = None,
  trust_clip: tuple[float, float] | None = None,
  no_decay: selection.Rule = selection.is_bias_or_norm,
  no_adaptation: selection.Rule = selection.is_bias_or_norm,
  stacked_axes: selection.AxesFn | Any | None = None,
  split: trust_ratio.SplitFn | None = None,
  norm_axes: trust_ratio.MeshAxesFn | None = None,
  global_norm_axes: trust_ratio.MeshAxesFn | None = None,
  mu_dtype: str = "float32",
) -> optax.GradientTransformationExtraArgs:
  """Adam's step, decayed, at a fixed fraction of the length of each layer.

      r = m^ / (sqrt(v^) + eps)            Adam's direction, per coordinate
      u = r + weight_decay w
      q = phi(|w|) / |u|                   per layer; 1 if either is 0
      w <- w - lr_t q u

  The rate is relative: 6e-3 moves every adapted layer by 0.6 % of its norm,
  whatever the gradient. Hence a parameter that must not move has to be frozen
  (masked out), and a zero-initialised tensor starts with q = 1.

  Args:
    learning_rate: number or function step -> rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: outside the square root.
    weight_decay: strength; inside the ratio, so it acts on the direction only.
    bias_correction: divide the moments by (1 - b^t).
    grad_averaging: weigh the gradient by (1 - b1) in the first moment.
    nesterov: "first" is N-LAMB, "both" NN-LAMB.
    pre_norm: what happens to the gradient before the moments: "divide" by its
      global norm, "clip" that norm to `max_grad_norm`, or "none".
    max_grad_norm: for `pre_norm="clip"` alone; None is the published 1.
    adapt: False forces q = 1, which is AdamW.
    skip_undecayed: True forces q = 1 where there is no weight decay (apex).
    phi_clip: bounds on |w| in the ratio's numerator.
    trust_clip: bounds on the ratio.
    no_decay: tensors without weight decay.
    no_adaptation: tensors with q = 1, independent of `no_decay`.
    stacked_axes: see `trust_ratio.scale_by_trust_ratio`; likewise split and
      norm_axes.
    split: several matrices along one axis, e.g. fused query, key and value.
    norm_axes: mesh axes of the per-layer norms, inside shard_map.
    global_norm_axes: mesh axes of the gradient's global norm, inside
      shard_map. It differs from `norm_axes` where a stacked axis is sharded.
    mu_dtype: storage of the first moment.

  Returns:
    A transformation whose state holds the trust ratios and norms; read them
    with `trust_ratio.layer_statistics`.

  Raises:
    ValueError: an argument out of range or a rule that matches nothing.

  Reference: You et al. 2020, arXiv:1904.00962, algorithm 2. Departures: none
    by default; the paper's text has phi clipped, its code the identity.
  """
  if not adapt or (skip_undecayed and weight_decay == 0):
    unadapted = selection.everything
  elif skip_undecayed:
    unadapted = selection.either(no_decay, no_adaptation)
  else:
    unadapted = no_adaptation
  before = _pre_norm(pre_norm, max_grad_norm, global_norm_axes)

  def stages(stacked_axes):
    direction = (
      *before,
      scale_by_adam(
        b1,
        b2,
        eps,
        bias_correction=bias_correction,
        grad_averaging=grad_averaging,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
      ),
      add_weight_decay(weight_decay, no_decay),
    )
    scale = (
      trust_ratio.scale_by_trust_ratio(
        no_adaptation=unadapted,
        stacked_axes=stacked_axes,
        split=split,
        norm_axes=norm_axes,
        phi_clip=phi_clip,
        trust_clip=trust_clip,
      ),
      optax.scale_by_learning_rate(learning_rate),
    )
    return direction, scale

  if before or split is not None or norm_axes is not None:
    # The gradient's norm is of all layers; a split axis counts from the left.
    direction, scale = stages(stacked_axes)
    return optax.chain(*direction, *scale)
  return StagedTransformation(stages, stacked_axes)


def _pre_norm(
  form: str,
  max_grad_norm: float | None,
  global_norm_axes: trust_ratio.MeshAxesFn | None,
) -> list[optax.GradientTransformation]:
  """What stands before the moments; see `lamb`."""
  if form == "clip":
    max_norm = 1.0 if max_grad_norm is None else max_grad_norm
    return [clip.clip_by_global_norm(max_norm, global_norm_axes)]
  if max_grad_norm is not None:
    raise ValueError(
      f"optim.max_grad_norm={max_grad_norm} goes with optim.pre_norm='clip',"
      f" not {form!r}."
    )
  if form == "divide":
    return [clip.normalize_by_global_norm(global_norm_axes)]
  if form == "none":
    return []
  raise ValueError(
    f"optim.pre_norm={form!r} is unknown; choose from none, clip, divide."
  )
