"""Layer-wise trust ratios (LARS, LAMB): You et al. 2017 and 2020.

A layer is one tensor of an unstacked model. What else a tensor may hold is said
by metadata, never guessed from sizes: *stacked* axes replicate a layer (scan
over layers, ensembles), a *split* axis holds several matrices side by side
(fused query, key, value). Each slice has a norm and a ratio of its own.

Under `jit` the norms of sharded arrays are global by themselves. Inside
`jax.shard_map` squares are summed over the mesh axes that shard the tensor, and
only over those.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bertjax import rules
from bertjax.optim import selection

# (name, leaf) -> the mesh axes that shard the leaf, inside shard_map.
MeshAxesFn = Callable[[str, Any], tuple[str, ...]]

# (name, leaf) -> None, or (axis, parts): `parts` equal blocks along `axis`.
SplitFn = Callable[[str, Any], tuple[int, int] | None]


class TrustRatioState(NamedTuple):
  """What the last update saw, float32: trees like the parameters.

  A leaf has one entry per slice: shape () for a plain tensor, [l] for a scanned
  one, [l, parts] or [parts] with a split axis.
  """

  ratio: Any
  weight_norm: Any
  update_norm: Any


class _Slices(NamedTuple):
  """How one leaf divides into slices."""

  kept: tuple[int, ...]  # non-negative, sorted: stacked axes and the split one
  split: tuple[int, int] | None  # (axis, parts)

  def shape(self, leaf: Any) -> tuple[int, ...]:
    """Shape of one number per slice."""
    return tuple(
      self.split[1]
      if self.split and axis == self.split[0]
      else leaf.shape[axis]
      for axis in self.kept
    )

  def expand(self, per_slice: Array, leaf: Any) -> Array:
    """One number per slice, shaped to broadcast against the leaf."""
    if self.split:
      axis, parts = self.split
      per_slice = jnp.repeat(
        per_slice, leaf.shape[axis] // parts, axis=self.kept.index(axis)
      )
    return per_slice.reshape(
      [n if i in self.kept else 1 for i, n in enumerate(leaf.shape)]
    )


def _slices(
  name: str, leaf: Any, stacked: selection.AxesFn, split: SplitFn | None
) -> _Slices:
  ndim = len(leaf.shape)

  def normal(axis: int) -> int:
    if not -ndim <= axis < ndim:
      raise ValueError(
        f"{name} of shape {tuple(leaf.shape)} has no axis {axis}; correct"
        " stacked_axes or split."
      )
    return axis % ndim

  kept = {normal(axis) for axis in stacked(name, leaf)}
  part = split(name, leaf) if split else None
  if part is not None:
    axis, parts = normal(part[0]), part[1]
    if leaf.shape[axis] % parts:
      raise ValueError(
        f"split of {name}: axis {axis} of length {leaf.shape[axis]} does not"
        f" divide into {parts} parts."
      )
    part = (axis, parts)
    kept.add(axis)
  return _Slices(tuple(sorted(kept)), part)


def sum_squares(
  tree: Any,
  *,
  stacked_axes: selection.AxesFn | Any | None = None,
  split: SplitFn | None = None,
  norm_axes: MeshAxesFn | None = None,
) -> Any:
  """Sum of squares of every slice, float32: a tree like `tree`.

  See `scale_by_trust_ratio` for the arguments.
  """
  stacked = selection.as_axes_fn(stacked_axes)
  paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
  totals, groups = [], defaultdict(list)
  for i, (path, leaf) in enumerate(paths):
    name = rules.path_name(path)
    slices = _slices(name, leaf, stacked, split)
    gone = tuple(a for a in range(leaf.ndim) if a not in slices.kept)
    total = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=gone)
    if slices.split:
      axis, parts = slices.split
      axis = slices.kept.index(axis)
      shape = (*total.shape[:axis], parts, -1, *total.shape[axis + 1 :])
      total = total.reshape(shape).sum(axis + 1)
    totals.append(total)
    if norm_axes is not None and (axes := tuple(norm_axes(name, leaf))):
      groups[axes].append(i)
  for axes, members in groups.items():
    # One collective per set of mesh axes, not one per tensor.
    summed = jax.lax.psum([totals[i] for i in members], axes)
    for i, total in zip(members, summed):
      totals[i] = total
  return jax.tree_util.tree_unflatten(treedef, totals)


def per_slice(
  tree: Any,
  reduce: Callable[..., Array],
  stacked_axes: selection.AxesFn | Any | None = None,
) -> Any:
  """`reduce(leaf, axis=...)` over every slice: a tree like `tree`."""
  stacked = selection.as_axes_fn(stacked_axes)

  def one(path, leaf):
    kept = _slices(rules.path_name(path), leaf, stacked, None).kept
    gone = tuple(a for a in range(leaf.ndim) if a not in kept)
    return reduce(leaf, axis=gone)

  return jax.tree_util.tree_map_with_path(one, tree)


def expand_slices(
  numbers: Any, tree: Any, stacked_axes: selection.AxesFn | Any | None = None
) -> Any:
  """One number per slice, shaped to broadcast against the leaves of `tree`."""
  stacked = selection.as_axes_fn(stacked_axes)

  def one(path, leaf, number):
    slices = _slices(rules.path_name(path), leaf, stacked, None)
    return slices.expand(number, leaf)

  return jax.tree_util.tree_map_with_path(one, tree, numbers)


def norm_axes_from_specs(
  specs: Any, stacked_axes: selection.AxesFn | Any | None = None
) -> MeshAxesFn:
  """The mesh axes to sum over, read off a tree of `PartitionSpec`s.

  Args:
    specs: tree like the parameters; the specs given to `jax.shard_map`.
    stacked_axes: a mesh axis that shards a stacked axis holds *other* layers
      and is left out. Leave this None for a norm over the whole tensor.
  """
  stacked = selection.as_axes_fn(stacked_axes)
  table = selection.by_name(
    specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec)
  )

  def norm_axes(name: str, leaf: Any) -> tuple[str, ...]:
    kept = {axis % max(leaf.ndim, 1) for axis in stacked(name, leaf)}
    axes: list[str] = []
    for i, entry in enumerate(table[name]):
      if entry is not None and i not in kept:
        axes.extend(entry if isinstance(entry, tuple) else (entry,))
    return tuple(axes)

  return norm_axes


def scale_by_trust_ratio(
  *,
  no_adaptation: selection.Rule = selection.is_bias_or_norm,
  stacked_axes: selection.AxesFn | Any | None = None,
  split: SplitFn | None = None,
  norm_axes: MeshAxesFn | None = None,
  phi_clip: tuple[float, float] | None = None,
  trust_clip: tuple[float, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Rescales the update of each layer to the length of its weights.

      u <- q u,   q = clip(phi(|w|) / |u|) if |w| > 0 and |u| > 0, else 1

  with |.| the L2 norm in float32 over one slice. So |u| = phi(|w|) exactly:
  nothing is added to the denominator.

  Args:
    no_adaptation: tensors with q = 1 (their norms are still recorded); regular
      expressions on path names or (name, leaf) -> bool.
    stacked_axes: (name, leaf) -> the axes that replicate layers, or a tree like
      the parameters of such tuples; None for an unstacked model.
    split: (name, leaf) -> (axis, parts) where several matrices lie side by side
      along an axis: (-3, 3) for `[..., 3, h, d]`, (-1, 3) for `[e, 3 * h * d]`;
      None for one ratio. Inside shard_map the split axis must be whole on every
      shard unless its length is `parts`.
    norm_axes: inside shard_map, (name, leaf) -> the mesh axes to sum squares
      over; `norm_axes_from_specs` makes one.
    phi_clip: (lowest, highest) weight norm, phi of the paper's analysis; None
      for the identity of its published code.
    trust_clip: (lowest, highest) ratio; an upper bound of 1 is LAMBC.

  Its `update` takes the norms of `measured`, a pair equal to (updates,
  params), if it is given: see `by_layer`.

  Raises:
    ValueError: empty clip interval, no `params` at update, or a regular
      expression that matches nothing.

  Reference: You et al. 2020, arXiv:1904.00962, algorithms 1 and 2.
  """
  for field, bounds in (("phi_clip", phi_clip), ("trust_clip", trust_clip)):
    if bounds is not None and not 0 <= bounds[0] <= bounds[1]:
      raise ValueError(
        f"optim.{field}={tuple(bounds)} must be (lowest, highest) with"
        " 0 <= lowest <= highest, or None."
      )
  stacked = selection.as_axes_fn(stacked_axes)

  def init(params):
    def fill(value):
      return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(
          _slices(rules.path_name(path), leaf, stacked, split).shape(leaf),
          value,
          jnp.float32,
        ),
        params,
      )

    selection.select(no_adaptation, params, "optim.no_adaptation")
    return TrustRatioState(fill(1.0), fill(0.0), fill(0.0))

  def norms(tree):
    squares = sum_squares(
      tree, stacked_axes=stacked, split=split, norm_axes=norm_axes
    )
    return jax.tree.map(jnp.sqrt, squares)

  def ratio(excluded, weight_norm, update_norm):
    if excluded:
      return jnp.ones_like(weight_norm)
    phi = weight_norm if phi_clip is None else jnp.clip(weight_norm, *phi_clip)
    usable = (weight_norm > 0) & (update_norm > 0)
    value = phi / jnp.where(usable, update_norm, 1.0)
    if trust_clip is not None:
      value = jnp.clip(value, *trust_clip)
    return jnp.where(usable, value, 1.0)

  def rescale(path, update, param, excluded, per_slice):
    if excluded:
      return update
    slices = _slices(rules.path_name(path), param, stacked, split)
    return update * slices.expand(per_slice, param).astype(update.dtype)

  def update(updates, state, params=None, *, measured=None, **extra_args):
    del state, extra_args
    if params is None:
      raise ValueError("params is required: the trust ratio needs the weights.")
    excluded = selection.select(no_adaptation, params, "optim.no_adaptation")
    of_updates, of_params = measured or (updates, params)
    weight_norm, update_norm = norms(of_params), norms(of_updates)
    ratios = jax.tree.map(ratio, excluded, weight_norm, update_norm)
    updates = jax.tree_util.tree_map_with_path(
      rescale, updates, params, excluded, ratios
    )
    return updates, TrustRatioState(ratios, weight_norm, update_norm)

  return optax.GradientTransformationExtraArgs(init, update)


def layer_statistics(opt_state: Any) -> dict[str, dict[str, Array]]:
  """Trust ratios and norms of the last update, by parameter path.

  Args:
    opt_state: any optimizer state; those of LAMB and LARS hold statistics.

  Returns:
    `{path name: {"ratio", "weight_norm", "update_norm"}}`, one number per slice
    (shape () or [l]...); empty when the optimizer keeps none.
  """
  found: dict[str, dict[str, Array]] = {}
  for node in jax.tree.leaves(
    opt_state, is_leaf=lambda x: isinstance(x, TrustRatioState)
  ):
    if isinstance(node, TrustRatioState):
      for field in TrustRatioState._fields:
        for name, leaf in selection.by_name(getattr(node, field)).items():
          found.setdefault(name, {})[field] = leaf
  return found
