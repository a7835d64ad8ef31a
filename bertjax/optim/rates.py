"""Rates of their own for some parameters, down to none at all.

Factors multiply the finished update, after LAMB's trust ratio (before it they
would cancel) and together with the weight decay, so they scale the schedule.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bertjax import rules
from bertjax.optim import selection

# Path name -> factor of the update: a number, or an array that broadcasts
# against the leaf (one number per layer of a scanned stack).
Factors = dict[str, float | np.ndarray]


class Depth(NamedTuple):
  """Where a parameter sits in its stack.

  Attributes:
    layer: 0 for embeddings, 1..num_layers for layers; an array that broadcasts
      against the leaf for a scanned stack.
    num_layers: layers in that stack.
  """

  layer: int | np.ndarray
  num_layers: int


_LAYER = re.compile(r"^(.*?)(?:^|/)layers(?:_(\d+))?(?:/|$)")
_EMBEDDINGS = re.compile(r"^(.*?)(?:^|/)embeddings(?:/|$)")


def layer_depths(
  params: Any, stacked_axes: selection.AxesFn
) -> dict[str, Depth]:
  """Depth of the parameters of embeddings and layers, by path name.

  Layers are `.../layers_3/...`, or `.../layers/...` with a stacked axis;
  embeddings are `.../embeddings/...` and belong to the stack beside them. Other
  parameters (heads, pooler) have no entry.

  Raises:
    ValueError: there are no layers, a scanned stack has no stacked axis, or
      embeddings have no stack beside them while there are several.
  """
  leaves = selection.by_name(params)
  depths: dict[str, Depth] = {}
  unscanned: dict[str, tuple[str, int]] = {}
  sizes: dict[str, int] = {}
  for name, leaf in leaves.items():
    if not (found := _LAYER.search(name)):
      continue
    stack, index = found.groups()
    if index is not None:
      unscanned[name] = (stack, int(index))
      sizes[stack] = max(sizes.get(stack, 0), int(index) + 1)
      continue
    axes = stacked_axes(name, leaf)
    if len(axes) != 1:
      raise ValueError(
        f"parameter {name!r} looks scanned but has {len(axes)} stacked axes;"
        " pass logical_axes with one axis named 'layers'."
      )
    num_layers = sizes[stack] = leaf.shape[axes[0]]
    shape = [1] * len(leaf.shape)
    shape[axes[0]] = num_layers
    depths[name] = Depth(
      np.arange(1, num_layers + 1).reshape(shape), num_layers
    )
  if not sizes:
    raise ValueError(
      "no parameter lies under 'layers' or 'layers_<i>'; layerwise_decay and"
      " freeze_lowest need a stack of layers."
    )
  for name, (stack, index) in unscanned.items():
    depths[name] = Depth(index + 1, sizes[stack])
  for name in leaves:
    found = _EMBEDDINGS.search(name)
    if name in depths or not found:
      continue
    stack = found.group(1)
    if stack not in sizes:
      if len(sizes) > 1:
        raise ValueError(
          f"embeddings {name!r} have no layers beside them; stacks are"
          f" {', '.join(sorted(repr(s) for s in sizes))}."
        )
      (stack,) = sizes
    depths[name] = Depth(0, sizes[stack])
  return depths


def layerwise_factors(
  params: Any, decay: float, stacked_axes: selection.AxesFn
) -> Factors:
  """decay^(L - l) for layer l of 1..L, decay^L for embeddings, 1 for the rest.

  Args:
    params: parameters, possibly abstract.
    decay: in (0, 1]; 0.8 to 0.95 in fine-tuning.
    stacked_axes: (name, leaf) -> axis of a scanned stack.

  Raises:
    ValueError: `decay` out of range, or see `layer_depths`.
  """
  if not 0 < decay <= 1:
    raise ValueError(f"optim.layerwise_decay={decay} must be in (0, 1].")
  return {
    name: decay ** (depth.num_layers - depth.layer)
    for name, depth in layer_depths(params, stacked_axes).items()
  }


def multiplier_factors(
  params: Any, multipliers: Sequence[tuple[str, float]]
) -> Factors:
  """Factors of `[(regex, factor), ...]`; first match wins, 1 for the rest.

  Raises:
    ValueError: a factor that is not positive, or a regex that matches nothing.
  """
  for pattern, factor in multipliers:
    if not factor > 0:
      raise ValueError(
        f"optim.lr_multipliers: factor {factor} of {pattern!r} must be"
        " positive; list the pattern in optim.freeze to stop parameters."
      )
  pairs = [(pattern, float(factor)) for pattern, factor in multipliers]
  return selection.by_name(
    rules.match([*pairs, (".*", 1.0)], params, "optim.lr_multipliers")
  )


def frozen_factors(
  params: Any, num_lowest: int, stacked_axes: selection.AxesFn
) -> Factors:
  """0 for embeddings and the lowest layers, 1 above; scanned leaves mixed.

  Raises:
    ValueError: `num_lowest` is not a number of layers, or see `layer_depths`.
  """
  depths = layer_depths(params, stacked_axes)
  most = min(depth.num_layers for depth in depths.values())
  if isinstance(num_lowest, bool) or not 0 <= num_lowest <= most:
    raise ValueError(
      f"optim.freeze_lowest={num_lowest} must be between 0 (embeddings only)"
      f" and the {most} layers."
    )
  return {
    name: np.float64(depth.layer > num_lowest)
    if isinstance(depth.layer, int)
    else (depth.layer > num_lowest).astype(np.float64)
    for name, depth in depths.items()
  }


def rate_factors(
  params: Any,
  multipliers: Sequence[tuple[str, float]],
  decay: float | None,
  stacked_axes: selection.AxesFn,
) -> Factors:
  """`multiplier_factors` times `layerwise_factors`, of those that there are."""
  factors = multiplier_factors(params, multipliers) if multipliers else {}
  if decay is not None:
    for name, factor in layerwise_factors(params, decay, stacked_axes).items():
      factors[name] = factors.get(name, 1.0) * factor
  return factors


def scaled(tree: Any, factors: Factors) -> Any:
  """Each leaf times its factor; a missing entry is 1."""

  def one(path, leaf):
    factor = np.asarray(factors.get(rules.path_name(path), 1.0))
    if np.all(factor == 1):
      return leaf
    factor = jnp.asarray(factor, leaf.dtype)
    return leaf * (
      factor.reshape([1] * leaf.ndim) if factor.ndim == 0 else factor
    )

  return jax.tree_util.tree_map_with_path(one, tree)


def scale_by_factors(factors: Factors) -> optax.GradientTransformation:
  """Multiplies each update by its factor; a missing entry is 1."""
  return optax.stateless(lambda updates, params: scaled(updates, factors))


def freeze(
  transform: optax.GradientTransformation,
  frozen: Callable[[str, Any], bool],
) -> optax.GradientTransformationExtraArgs:
  """Runs `transform` on what is not frozen; the rest gets a zero update.

  Frozen parameters have no optimizer state, no weight decay, and do not count
  in a global norm inside `transform`.

  Args:
    transform: any optimizer.
    frozen: (name, leaf) -> bool.
  """

  def mask(value):
    return lambda tree: jax.tree_util.tree_map_with_path(
      lambda path, leaf: frozen(rules.path_name(path), leaf) == value, tree
    )

  return optax.chain(
    optax.masked(transform, mask(False)),
    optax.masked(optax.set_to_zero(), mask(True)),
  )
