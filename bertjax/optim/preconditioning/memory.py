"""Where factors lie on a mesh, and how they are given up.

Factors are sharded over "fsdp", as parameters and moments are: a stack by its
layers, so that whoever holds a layer's factors preconditions it, anything else
by rows; what that axis does not divide is whole everywhere. Those of K-FAC may
lie over other axes of the batch (see `sharing`).

Once a switch is thrown nothing reads them. A compiled step cannot free what it
is given, so the loop does between two steps: in place of every factor remains
one number per shard (a checkpoint cannot hold an array of none), and the step
is compiled again, without them.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from bertjax.optim.preconditioning import sharing
from bertjax.optim.preconditioning.base import CurvatureState
from bertjax.optim.preconditioning.kfac import KfacFactors
from bertjax.rules import path_name


def is_curvature(node: Any) -> bool:
  """Whether a node of a state is a preconditioner's."""
  return isinstance(node, CurvatureState)


def shard(state: CurvatureState, replicated: Any) -> CurvatureState:
  """A sharding for every leaf.

  Args:
    state: possibly abstract.
    replicated: what is not a factor gets it, and factors, too, if it is a
      PartitionSpec, which knows no mesh.
  """

  def layer(factors):
    fraction = getattr(factors, "grad_worker_fraction", None)
    mesh = replicated.mesh
    return jax.tree.map(
      lambda leaf: NamedSharding(
        mesh, sharing.place(leaf.shape, mesh.shape, fraction)
      ),
      factors,
    )

  whole = jax.tree.map(lambda _: replicated, state)
  if not isinstance(replicated, NamedSharding):
    return whole
  factors = jax.tree.map(
    layer, state.factors, is_leaf=lambda x: isinstance(x, KfacFactors)
  )
  return whole._replace(factors=factors)


def release(opt_state: Any) -> Any:
  """The state without the factors of a preconditioner that has given up.

  It waits for the last step. Where no switch is thrown the state is returned
  as it is.
  """

  def one(node):
    if (
      not is_curvature(node) or node.switch is None or not bool(node.switch.on)
    ):
      return node
    return node._replace(factors=jax.tree.map(_remains, node.factors))

  return jax.tree.map(one, opt_state, is_leaf=is_curvature)


def _remains(factor: Any) -> jax.Array:
  """One zero per shard of a (possibly abstract) factor."""
  sharding = factor.sharding
  local = sharding.shard_shape(factor.shape)
  shape = tuple(n // max(k, 1) for n, k in zip(factor.shape, local))
  return jnp.zeros(shape, factor.dtype, device=sharding)


def was_released(
  saved: Mapping[str, tuple[int, ...]], wanted: Any
) -> dict[str, tuple[int, ...]]:
  """Factors that a checkpoint does not hold, and what it holds instead.

  Args:
    saved: shapes in the checkpoint, by path name.
    wanted: abstract state.
  """
  found = {}
  nodes = jax.tree_util.tree_leaves_with_path(wanted, is_leaf=is_curvature)
  for prefix, node in nodes:
    if not is_curvature(node):
      continue
    prefix = (*prefix, jax.tree_util.GetAttrKey("factors"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(node.factors):
      name = path_name((*prefix, *path))
      shape = saved.get(name, leaf.shape)
      if math.prod(shape) < leaf.size and len(shape) == leaf.ndim:
        found[name] = shape
  return found


def without(state: Any, names: Mapping[str, Any], wanted: Any) -> Any:
  """A restored state with the remains of released factors on this mesh.

  Args:
    state: as it was read.
    names: of `was_released`.
    wanted: abstract state with shardings.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x, leaf: _remains(leaf) if path_name(path) in names else x,
    state,
    wanted,
  )
