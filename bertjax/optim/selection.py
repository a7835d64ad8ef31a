"""Which parameters a rule selects, by path name and never by size."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bertjax import rules

# A list of regular expressions on path names, or (name, leaf) -> bool.
Rule = Sequence[str] | Callable[[str, Any], bool]

# (name, leaf) -> axes of the leaf that only replicate layers.
AxesFn = Callable[[str, Any], tuple[int, ...]]

# Logical axis names that replicate a layer instead of widening it.
STACKED = ("layers",)


def is_bias_or_norm(name: str, leaf: Any = None) -> bool:
  """True for biases and for the scale and offset of a normalisation."""
  del leaf
  return name.rsplit("/", 1)[-1] in ("bias", "scale", "offset")


def everything(name: str, leaf: Any = None) -> bool:
  """True."""
  del name, leaf
  return True


def either(first: Rule, second: Rule) -> Callable[[str, Any], bool]:
  """Selects what one of two rules selects; expressions are not checked."""

  def selects(rule, name, leaf):
    if callable(rule):
      return rule(name, leaf)
    return any(re.search(pattern, name) for pattern in rule)

  return lambda name, leaf: (
    selects(first, name, leaf) or selects(second, name, leaf)
  )


def resolve(rule: Rule, tree: Any, field: str) -> Callable[[str, Any], bool]:
  """Turns a rule into a function (name, leaf) -> bool.

  Args:
    rule: regular expressions (`re.search` on the path name) or a callable,
      which is returned as it is.
    tree: the parameters that the expressions are checked against.
    field: the config field that holds the rule, for messages.

  Raises:
    ValueError: an expression that matches no parameter.
  """
  if callable(rule):
    return rule
  if isinstance(rule, str):
    raise ValueError(
      f"{field}={rule!r} is a string; give a list of regular expressions."
    )
  pairs = [(pattern, True) for pattern in rule] + [(".*", False)]
  matched = by_name(rules.match(pairs, tree, field))
  return lambda name, leaf: matched[name]


def select(rule: Rule, tree: Any, field: str) -> Any:
  """A tree like `tree` of Python booleans: does `rule` select the leaf?"""
  chosen = resolve(rule, tree, field)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: bool(chosen(rules.path_name(path), leaf)), tree
  )


def by_name(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  """Leaves of `tree` by path name."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {rules.path_name(path): leaf for path, leaf in leaves}


def _is_axes(leaf: Any) -> bool:
  # A tuple of names or numbers is one parameter's axes, not a container.
  return leaf is None or (
    isinstance(leaf, tuple)
    and not hasattr(leaf, "_fields")
    and all(a is None or isinstance(a, str | int) for a in leaf)
  )


def axes_by_name(tree: Any) -> dict[str, tuple]:
  """`{path name: axes}` of a tree of tuples (or PartitionSpecs) per leaf."""
  return {
    name: () if axes is None else tuple(axes)
    for name, axes in by_name(tree, is_leaf=_is_axes).items()
  }


def stacked_from_logical(logical_axes: Any) -> AxesFn:
  """The stacked axes that a tree of logical axis names declares.

  Args:
    logical_axes: tree like the parameters whose leaves are tuples (or
      PartitionSpecs) of logical names, e.g. `("layers", "embed", "mlp")`.

  Returns:
    (name, leaf) -> positions of the names in `STACKED`.
  """
  axes = {
    name: tuple(i for i, axis in enumerate(names) if axis in STACKED)
    for name, names in axes_by_name(logical_axes).items()
  }

  def stacked(name: str, leaf: Any) -> tuple[int, ...]:
    del leaf
    if name not in axes:
      raise ValueError(
        f"logical_axes has no entry for parameter {name!r}; give one tuple of"
        " axis names per parameter."
      )
    return axes[name]

  return stacked


def with_logical_axis(
  logical_axes: Any, axis: str
) -> Callable[[str, Any], bool]:
  """Selects the parameters that have a logical axis of this name.

  Args:
    logical_axes: as for `stacked_from_logical`.
    axis: its name.
  """
  names = axes_by_name(logical_axes)
  return lambda name, leaf: axis in names.get(name, ())


def no_axes(name: str, leaf: Any) -> tuple[int, ...]:
  """No axis is stacked: every tensor is one layer."""
  del name, leaf
  return ()


def as_axes_fn(axes: AxesFn | Any | None) -> AxesFn:
  """Accepts a callable (name, leaf) -> axes, a tree of tuples, or None."""
  if axes is None:
    return no_axes
  if callable(axes):
    return axes
  table: Mapping[str, tuple[int, ...]] = axes_by_name(axes)
  return lambda name, leaf: table[name]


def check_float32(params: Any) -> None:
  """Refuses parameters that are not float32.

  Raises:
    ValueError: names the first such parameter. An update of 1e-4 of a weight is
      lost in bfloat16's 8 bits, so low precision belongs to the computation and
      the optimizer owns the float32 master copy.
  """
  for name, leaf in by_name(params).items():
    if leaf.dtype != jnp.float32:
      raise ValueError(
        f"params: {name} is {leaf.dtype}; an optimizer needs float32"
        " parameters. Keep them in float32 and cast inside the model (its"
        " `dtype` field)."
      )
