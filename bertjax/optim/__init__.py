"""Optimizers: one table, one builder, everything an optax transformation.

A new optimizer is a file with a function `(learning_rate, *, ...)` that returns
a `GradientTransformationExtraArgs`, and a row in `OPTIMIZERS`; the battery of
tests then covers it. Of the context below a row takes what its signature names:

  stacked_axes: (name, leaf) -> axes that replicate layers.
  norm_axes: (name, leaf) -> mesh axes of per-layer norms, inside shard_map.
  global_norm_axes: the same for norms of the whole gradient.
  workers: who averages, for an optimizer that does so itself.
  total_steps: of the phase.
  trainable: (name, leaf) -> None, or which of the leaf's layers train.
  rate_factors: of the learning rate, by path name (`rates.Factors`), for an
    optimizer of which it is not enough to multiply its updates by them.

A second-order method (`optim.precondition`) stands before any of them; see the
table `preconditioning.PRECONDITIONERS`.

An optimizer that needs *local* gradients (compressed all-reduce) returns a
`LocalGradientTransformation` (`local.local_chain`); the step builder then runs
it inside `jax.shard_map` on gradients that nobody has averaged.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bertjax import fields, registry
from bertjax.layers.statistics import Wanted
from bertjax.optim import (
  by_layer,
  clip,
  loss_scale,
  rates,
  selection,
  trust_ratio,
)
from bertjax.optim.adamw import adam, adamw, scale_by_adam
from bertjax.optim.clip import clip_by_global_norm, clip_tree, global_norm
from bertjax.optim.freezing import freeze_now
from bertjax.optim.lamb import lamb
from bertjax.optim.lars import lars
from bertjax.optim.local import LocalGradientTransformation
from bertjax.optim.onebit_adam import (
  compressed_gradient_adam,
  onebit_adam,
  onebit_sgd,
  rows_mask,
)
from bertjax.optim.onebit_lamb import onebit_lamb
from bertjax.optim.preconditioning import (
  PRECONDITIONERS,
  CurvatureState,
  PreconditioningTransformation,
  build_preconditioning,
  curvature_metrics,
  memory,
  switch_now,
)
from bertjax.optim.schedules import (
  SCHEDULES,
  Schedule,
  build_schedule,
  square_root_scaling,
)
from bertjax.optim.state import (
  adapt,
  gradient_norm,
  hand_over,
  schedule_step,
  state_shardings,
)
from bertjax.optim.trust_ratio import layer_statistics, scale_by_trust_ratio
from bertjax.optim.zero_one_adam import zero_one_adam
from bertjax.parallel import error_feedback
from bertjax.parallel.error_feedback import Workers
from bertjax.parallel.sharding import parameter_shardings

__all__ = [
  "OPTIMIZERS",
  "PRECONDITIONERS",
  "SCHEDULES",
  "CurvatureState",
  "LocalGradientTransformation",
  "Optimizer",
  "PreconditioningTransformation",
  "Schedule",
  "adam",
  "adamw",
  "adapt",
  "build_optimizer",
  "build_schedule",
  "clip_by_global_norm",
  "clip_tree",
  "compressed_gradient_adam",
  "curvature_metrics",
  "freeze_now",
  "global_norm",
  "gradient_norm",
  "hand_over",
  "lamb",
  "lars",
  "layer_statistics",
  "onebit_adam",
  "onebit_lamb",
  "onebit_sgd",
  "scale_by_adam",
  "scale_by_trust_ratio",
  "schedule_step",
  "square_root_scaling",
  "state_shardings",
  "switch_now",
  "zero_one_adam",
]


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """What the step builder needs.

  Attributes:
    transform: `init(params)`, `update(grads, state, params, **extra)`.
    schedule: step -> learning rate, for logs. Its steps are those that the
      transformation has counted, without skipped ones: see `schedule_step`.
    local_gradients: gradients must reach `update` un-reduced, inside shard_map.
    statistics: of linear layers that `update` takes as `statistics=`; None if
      it takes none.
    compact_every: steps between two looks, on the host, at whether a part of
      the state can be given up (`compact`); None if it never can.
    reset_errors: whether a resumed run forgets what its compressed averages
      still owed.
    layerwise: the same as `transform` and `optax.apply_updates`, one layer
      after another; None where that is no gain.
  """

  transform: optax.GradientTransformationExtraArgs
  schedule: Schedule
  local_gradients: bool = False
  statistics: Wanted | None = None
  compact_every: int | None = None
  reset_errors: bool = False
  layerwise: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None

  def apply(
    self, grads: Any, opt_state: Any, params: Any, **extra: Any
  ) -> tuple[Any, Any]:
    """New parameters and optimizer state.

    Args:
      grads: a tree like the parameters.
      opt_state: the optimizer's state.
      params: parameters.
      **extra: what else the transformation takes.
    """
    if self.layerwise is not None:
      return self.layerwise(grads, opt_state, params)
    updates, opt_state = self.transform.update(
      grads, opt_state, params, **extra
    )
    return optax.apply_updates(params, updates), opt_state

  def resumed(self, opt_state: Any) -> Any:
    """What a run goes on with, of what its last checkpoint held."""
    return (
      error_feedback.forgotten(opt_state) if self.reset_errors else opt_state
    )

  def compact(self, opt_state: Any) -> Any:
    """The state without what its next steps do not read; it may wait."""
    return memory.release(opt_state)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adam": adam,
  "adamw": adamw,
  "compressed_gradient_adam": compressed_gradient_adam,
  "lamb": lamb,
  "lars": lars,
  "onebit_adam": onebit_adam,
  "onebit_lamb": onebit_lamb,
  "onebit_sgd": onebit_sgd,
  "sgd": optax.sgd,
  "zero_one_adam": zero_one_adam,
}


def build_optimizer(
  spec: Mapping[str, Any],
  *,
  total_steps: int,
  params: Any,
  logical_axes: Any = None,
  param_specs: Any = None,
  tokens_per_step: int | float | None = None,
  mesh: Mesh | None = None,
  linear_layers: Callable[[], Mapping[str, int]] | None = None,
) -> Optimizer:
  """The optimizer that a config's `optim` describes.

      gradient -> clip -> precondition -> optimizer of the table -> factors

  Args:
    spec: `name`, that row's options, and the options of `_surround`:
      `learning_rate` (the peak, required), `schedule` (a row of `SCHEDULES`),
      `precondition` (see `build_preconditioning`), `clip_norm`, `clip_scope`,
      `lr_multipliers`, `layerwise_decay`, `freeze`, `freeze_lowest`. With an
      optimizer that compresses, `reset_errors`: a resumed run begins without
      the errors of its checkpoint, as DeepSpeed's do; False keeps them. For
      float16 `loss_scale`, options of `loss_scale.scaled`.
    total_steps: steps of the run, for the schedule.
    params: parameters, possibly abstract (`jax.ShapeDtypeStruct`); only paths,
      shapes and dtypes are read.
    logical_axes: tree like `params` of tuples of logical axis names; an axis
      named "layers" is a scanned stack, whose layers have norms of their own.
      None says that no parameter is stacked.
    param_specs: tree like `params` of PartitionSpecs, when `update` runs inside
      `jax.shard_map`; None under jit, where norms are global by themselves.
    tokens_per_step: tokens of a global batch, padding included, for schedules
      that count in tokens.
    mesh: of the run. An optimizer that averages by itself does so over its axis
      "data"; without a mesh it has nobody to average with.
    linear_layers: for `precondition`: gives linear layers by path with the
      number of summed axes of their kernels; None reads them off `params`.

  Raises:
    ValueError: names the field of an unknown option or a bad value; or a
      parameter that is not float32.
  """
  spec = dict(spec)
  fields.check({"optim": spec})
  selection.check_float32(params)
  builder = registry.lookup(OPTIMIZERS, spec.get("name", ""), "optim.name")
  common = [
    name
    for name, parameter in inspect.signature(_surround).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
  ]
  takes = inspect.signature(builder).parameters
  resets = {"reset_errors"} if "workers" in takes else set()
  _check_options(spec, {*common, *takes, *resets, *_OWN_OPTIONS})
  reset_errors = spec.pop("reset_errors", False)
  scale = spec.pop("loss_scale", None)

  stacked = (
    selection.no_axes
    if logical_axes is None
    else selection.stacked_from_logical(logical_axes)
  )
  context = _context(
    takes,
    params,
    logical_axes,
    stacked,
    param_specs,
    mesh,
    spec,
  ) | {"total_steps": total_steps}
  if "learning_rate" not in spec:
    raise ValueError("optim.learning_rate is required: the peak rate.")
  schedule = build_schedule(
    spec.pop("schedule", {"name": "constant"}),
    learning_rate=spec.pop("learning_rate"),
    total_steps=total_steps,
    tokens_per_step=tokens_per_step,
  )
  before = spec.pop("precondition", None)
  if before is not None:
    if param_specs is not None:
      raise ValueError("optim.precondition runs under jit, not in shard_map.")
    before = build_preconditioning(
      before,
      params=params,
      stacked=stacked,
      learning_rate=schedule,
      total_steps=total_steps,
      linear_layers=linear_layers,
      logical_axes=logical_axes,
      frozen=_frozen(
        params,
        spec.get("freeze", ()),
        _kept(params, spec.get("freeze_lowest"), stacked),
      ),
    )
  for field in ("no_decay", "no_adaptation", "uncompressed"):
    if spec.get(field):
      # Checked against all parameters: freezing may hide some of them.
      spec[field] = selection.resolve(spec[field], params, f"optim.{field}")
  if "mask" in spec:
    spec["mask"] = rows_mask(spec["mask"], params)
  options = {key: spec.pop(key) for key in common if key in spec}
  transform = registry.build(
    OPTIMIZERS,
    spec,
    "optim",
    learning_rate=schedule,
    **{key: value for key, value in context.items() if key in takes},
  )
  local = (
    isinstance(transform, LocalGradientTransformation)
    or options.get("clip_scope") == "per_shard"
  )
  if before is not None and local:
    raise ValueError(
      "optim.precondition needs the gradient of the batch, which"
      f" optim.name={builder.__name__!r} or optim.clip_scope='per_shard' does"
      " not have; use another optimizer and the scope 'global'."
    )
  optimizer = Optimizer(
    transform=_surround(
      transform,
      before,
      params,
      stacked,
      context.get("global_norm_axes"),
      context.get("workers"),
      "rate_factors" in takes,
      **options,
    ),
    schedule=schedule,
    local_gradients=local,
    statistics=None if before is None else before.wanted,
    compact_every=None if before is None else before.compact_every,
    reset_errors=reset_errors,
    layerwise=(
      _layerwise(transform, params, stacked, mesh, options.get("clip_norm"))
      if before is None and not local and not options.keys() - _CLIPPING
      else None
    ),
  )
  if scale is None:
    return optimizer
  return registry.call(
    loss_scale.scaled, scale, "optim.loss_scale", optimizer=optimizer
  )


# Options that no row of the table and nothing around it takes.
_OWN_OPTIONS = ("name", "schedule", "precondition", "loss_scale")


def _context(
  takes: Collection[str],
  params: Any,
  logical_axes: Any,
  stacked: selection.AxesFn,
  param_specs: Any,
  mesh: Mesh | None,
  spec: Mapping[str, Any],
) -> dict[str, Any]:
  """What a row of the table may take besides its options.

  Args:
    takes: names of what it takes; only the dear ones are looked up.
    params: see `build_optimizer`; likewise logical_axes, param_specs and mesh.
    stacked: (name, leaf) -> stacked axes.
    spec: options of `_surround`.
  """
  context: dict[str, Any] = {"stacked_axes": stacked}
  if "workers" in takes:
    context["workers"] = _workers(params, logical_axes, stacked, mesh)
  if param_specs is not None:
    context |= {
      "norm_axes": trust_ratio.norm_axes_from_specs(param_specs, stacked),
      "global_norm_axes": trust_ratio.norm_axes_from_specs(param_specs),
    }
  if "trainable" in takes:
    context["trainable"] = _trainable(
      params, spec.get("freeze_lowest"), stacked
    )
  if "rate_factors" in takes:
    context["rate_factors"] = rates.rate_factors(
      params,
      spec.get("lr_multipliers", ()),
      spec.get("layerwise_decay"),
      stacked,
    )
  return context


# Options of `_surround` that a loop over layers knows.
_CLIPPING = {"clip_norm", "clip_scope"}


def _layerwise(
  transform: optax.GradientTransformation,
  params: Any,
  stacked: selection.AxesFn,
  mesh: Mesh | None,
  clip_norm: float | None,
) -> Callable[[Any, Any, Any], tuple[Any, Any]] | None:
  """See `Optimizer.layerwise`; its state is that of `_surround`."""
  names = by_layer.looped(params, stacked, by_layer.on_chip_bytes(mesh))
  if not isinstance(transform, by_layer.StagedTransformation) or not names:
    return None

  def apply(grads, state, params):
    first, clipped, inner, *rest = state
    if clip_norm is not None:
      grads, norm = clip_tree(grads, clip_norm)
    applied = by_layer.apply(
      transform, grads, inner, params, stacked=stacked, names=names
    )
    if clip_norm is None:
      # Read as the gradients are; one more pass over them would be a third.
      norm = jnp.sqrt(applied.gradient_square)
    state = first, clipped._replace(norm=norm), applied.state, *rest
    return applied.params, state

  return apply


def _workers(
  params: Any, logical_axes: Any, stacked: selection.AxesFn, mesh: Mesh | None
) -> Workers:
  """Who averages, and how parameters are sharded within each of them."""
  if mesh is None or logical_axes is None:
    return Workers(mesh, stacked_axes=stacked)
  shardings = parameter_shardings(params, logical_axes, mesh)
  specs = {
    name: sharding.spec
    for name, sharding in selection.by_name(shardings).items()
  }
  return Workers(mesh, specs, stacked)


def _trainable(
  params: Any, freeze_lowest: int | None, stacked: selection.AxesFn
) -> Callable[[str, Any], Any]:
  """(name, leaf) -> None, or booleans: which layers `freeze_lowest` leaves."""
  kept = _kept(params, freeze_lowest, stacked)

  def trainable(name: str, leaf: Any) -> Any:
    if np.all(kept.get(name, 1.0)):
      return None
    return np.broadcast_to(kept[name] > 0, leaf.shape)

  return trainable


def _check_options(spec: Mapping[str, Any], allowed: set[str]) -> None:
  context = {
    "stacked_axes",
    "norm_axes",
    "global_norm_axes",
    "workers",
    "total_steps",
    "trainable",
    "rate_factors",
  }
  allowed = allowed - context
  for key in spec:
    if key in context:
      raise ValueError(f"optim.{key} is set by the library; remove it.")
    if key not in allowed:
      close = difflib.get_close_matches(key, allowed, n=1)
      hint = f" Did you mean {close[0]!r}?" if close else ""
      raise ValueError(
        f"optim.{key} is not an option of optim.name={spec['name']!r}; it"
        f" takes {', '.join(sorted(allowed - {'name'}))}.{hint}"
      )


def _surround(
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
  """
  factors: rates.Factors = {}
  if not has_factors:
    factors = rates.rate_factors(
      params, lr_multipliers, layerwise_decay, stacked
    )
  kept = _kept(params, freeze_lowest, stacked)
  # Zeroes the gradient too: a frozen layer must not count in the clipped norm.
  partly = {name: factor for name, factor in kept.items() if np.any(factor)}
  frozen = _frozen(params, freeze, kept)
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


def _kept(
  params: Any, freeze_lowest: int | None, stacked: selection.AxesFn
) -> rates.Factors:
  """0 for what `freeze_lowest` freezes, by path name; see `_surround`."""
  if freeze_lowest is None:
    return {}
  return rates.frozen_factors(params, freeze_lowest, stacked)


def _frozen(
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
  """What stands before the optimizer; see `_surround`."""
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
