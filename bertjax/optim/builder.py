"""From `optim` of a config to an optimizer: one table, one builder.

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

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bertjax import fields, registry
from bertjax.optim import (
  by_layer,
  loss_scale,
  rates,
  selection,
  trust_ratio,
)
from bertjax.optim.adamw import adam, adamw
from bertjax.optim.clip import clip_tree
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
from bertjax.optim.optimizer import Optimizer
from bertjax.optim.preconditioning import build_preconditioning
from bertjax.optim.schedules import build_schedule
from bertjax.optim.surrounding import frozen_names, kept_factors, surround
from bertjax.optim.zero_one_adam import zero_one_adam
from bertjax.parallel.error_feedback import Workers
from bertjax.parallel.sharding import parameter_shardings

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
    spec: `name`, that row's options, and the options of `surround`:
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
    for name, parameter in inspect.signature(surround).parameters.items()
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
      frozen=frozen_names(
        params,
        spec.get("freeze", ()),
        kept_factors(params, spec.get("freeze_lowest"), stacked),
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
    transform=surround(
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
    spec: options of `surround`.
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


# Options of `surround` that a loop over layers knows.
_CLIPPING = {"clip_norm", "clip_scope"}


def _layerwise(
  transform: optax.GradientTransformation,
  params: Any,
  stacked: selection.AxesFn,
  mesh: Mesh | None,
  clip_norm: float | None,
) -> Callable[[Any, Any, Any], tuple[Any, Any]] | None:
  """See `Optimizer.layerwise`; its state is that of `surround`."""
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
  kept = kept_factors(params, freeze_lowest, stacked)

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
