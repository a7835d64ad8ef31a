"""A state of w workers becomes one of any other number, errors kept.

Only the mean of the workers' errors and the servers' errors reach an average.
So each new worker gets the mean of the old ones, and the servers' errors are
cut anew: the sum on both sides of the law in `compressed` stays what it was,
exactly for numbers of workers that are powers of two. With the same number of
workers and the same sharding nothing changes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from bertjax.parallel.error_feedback import AXIS, is_per_worker
from bertjax.parallel.grids import order_of
from bertjax.rules import path_name


def recut_workers(old: Array, workers: int) -> Array:
  """`[w, ...]` -> `[workers, ...]`: the mean for everybody."""
  if old.shape[0] == workers:
    return old
  return jnp.broadcast_to(old.mean(0), (workers, *old.shape[1:]))


def joined_servers(old: Array, shape: Sequence[int]) -> Array:
  """The servers' errors of a parameter, in its own shape.

  Args:
    old: `[workers, *shards, rows, piece]`.
    shape: of the whole parameter.
  """
  shards = old.shape[1:-2]
  local = [size // count for size, count in zip(shape, shards, strict=True)]
  rows, piece = old.shape[-2:]
  x = jnp.moveaxis(old, 0, -2).reshape(*shards, rows, old.shape[0] * piece)
  x = x[..., : math.prod(local) // max(rows, 1)]
  order = order_of(local, rows)
  x = x.reshape(*shards, *(local[axis] for axis in order))
  x = jnp.moveaxis(x, range(-len(shape), 0), [i - len(shape) for i in order])
  pairs = [i + k * len(shape) for i in range(len(shape)) for k in (0, 1)]
  return x.transpose(pairs).reshape(shape)


def cut_servers(whole: Array, wanted: Sequence[int]) -> Array:
  """The inverse of `joined_servers`, for a state of shape `wanted`."""
  workers, *shards, rows, piece = wanted
  local = [size // count for size, count in zip(whole.shape, shards)]
  x = whole.reshape([n for pair in zip(shards, local) for n in pair])
  ndim = whole.ndim
  order = [2 * axis + 1 for axis in order_of(local, rows)]
  x = x.transpose([*range(0, 2 * ndim, 2), *order])
  x = x.reshape(*shards, rows, math.prod(local) // max(rows, 1))
  missing = workers * piece - x.shape[-1]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
  x = x.reshape(*shards, rows, workers, piece)
  return jnp.moveaxis(x, -2, 0)


def adapt(
  saved: Mapping[str, tuple[int, ...]], wanted: Any
) -> tuple[Any, Callable[[Any], Any]]:
  """How a checkpoint of other workers is read: `Checkpointer.restore(adapt=)`.

  Args:
    saved: shapes in the checkpoint, by path name.
    wanted: abstract state with shardings.

  Returns:
    What to read, and what makes the wanted state of it.
  """
  readable, recut = [], []
  leaves, treedef = jax.tree_util.tree_flatten_with_path(wanted)
  parameters = _parameter_shapes(wanted)
  for path, leaf in leaves:
    name = path_name(path)
    shape = saved.get(name, leaf.shape)
    function = None
    if shape != leaf.shape and name in parameters:
      function = _recut(parameters[name], shape, leaf)
    if function is not None:
      leaf = jax.ShapeDtypeStruct(
        shape, leaf.dtype, sharding=_placement(shape, leaf)
      )
    readable.append(leaf)
    recut.append(function)
  if not any(recut):
    return wanted, lambda state: state

  def finish(state):
    return jax.tree.unflatten(
      treedef,
      [
        x if function is None else function(x)
        for x, function in zip(jax.tree.leaves(state), recut)
      ],
    )

  return jax.tree.unflatten(treedef, readable), finish


def _parameter_shapes(state: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
  """By name of a leaf of a per-worker node: its kind, its parameter's shape."""
  found = {}
  nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_per_worker)
  for prefix, node in nodes:
    if not is_per_worker(node):
      continue
    by_parameter = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(node):
      kind, *rest = path_name(path).split("/")
      name = path_name((*prefix, *path))
      if kind == "server":
        found[name] = "server", by_parameter["/".join(["tree", *rest])]
        continue
      key = "/".join(rest if kind == "worker" else [kind, *rest])
      by_parameter[key] = leaf.shape[1:]
      found[name] = "worker", leaf.shape[1:]
  return found


def _recut(
  parameter: tuple[str, tuple[int, ...]], saved: tuple[int, ...], leaf: Any
) -> Callable[[Array], Array] | None:
  """What turns a saved array into `leaf`; None if it is another parameter's."""
  kind, shape = parameter
  if kind == "worker":
    if saved[1:] != shape:
      return None

    def function(x):
      return recut_workers(x, leaf.shape[0])
  else:
    shards = saved[1:-2]
    if len(shards) != len(shape) or any(s % k for s, k in zip(shape, shards)):
      return None

    def function(x):
      return cut_servers(joined_servers(x, shape), leaf.shape)

  return jax.jit(function, out_shardings=leaf.sharding)


def _placement(shape: tuple[int, ...], leaf: Any) -> Any:
  """Where an array of another number of workers lies until it is recut."""
  sharding = leaf.sharding
  if not isinstance(sharding, NamedSharding):
    return sharding
  sizes = sharding.mesh.shape
  entries = [None] * len(shape)
  if len(shape) == leaf.ndim and shape[1:] == leaf.shape[1:]:
    entries[1:] = sharding.spec[1:]
  for i, size in enumerate(shape):
    if entries[i] is None and size % sizes[AXIS] == 0:
      entries[i] = AXIS
      break
  return NamedSharding(sharding.mesh, PartitionSpec(*entries))
