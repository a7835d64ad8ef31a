"""Workers of a mesh, their averages, and the errors that they keep.

A worker is a slice of the mesh along one axis, "data". Within it parameters may
be sharded over the other axes: averages then run between devices that hold the
same shard. With "fsdp" as the fast axis this is the hierarchical mode: the
gradient is summed inside the worker in full precision, each device exchanges
one bit per number of *its* shard with the other workers, and parameters,
moments and errors stay sharded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax.parallel.compressed import compressed_all_reduce
from bertjax.parallel.grids import Compression, grid_of
from bertjax.rules import path_name

AXIS = "data"
StackedFn = Callable[[str, Any], tuple[int, ...]]


class PerWorker(NamedTuple):
  """A tree like the parameters; each worker has leaves of its own.

  A leaf has the global shape `[workers, *parameter]` and is sharded over the
  workers; inside `jax.shard_map` over them its leading axis is 1.
  """

  tree: Any


class Drift(PerWorker):
  """How far each worker's parameters are from the common ones."""


def local_params(params: Any, state: Any) -> Any:
  """The parameters of this worker: the common ones and any `Drift` of a state.

  Inside `jax.shard_map` over the workers.
  """
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Drift))
  drifts = [node for node in nodes if isinstance(node, Drift)]
  if not drifts:
    return params
  by_name = {name: x[0] for node in drifts for name, x in _named(node.tree)}

  def moved(path, leaf):
    drift = by_name.get(path_name(path))
    return leaf if drift is None else leaf + drift

  return jax.tree_util.tree_map_with_path(moved, params)


class ErrorFeedback(NamedTuple):
  """What has not been sent yet; None where there is no error feedback.

  Attributes:
    worker: `PerWorker`.
    server: tree like the parameters, `[workers, *shards, rows, piece]`: shards
      per axis of the parameter, then the worker's piece of it
      (`grids.Grid`).
  """

  worker: Any
  server: Any


def _named(tree: Any) -> list[tuple[str, Any]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(path_name(path), leaf) for path, leaf in leaves]


def _entries(spec: Any, ndim: int) -> tuple:
  entries = tuple(spec)
  return entries + (None,) * (ndim - len(entries))


def _axes(entry: Any) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


@dataclasses.dataclass(frozen=True)
class Workers:
  """Who averages.

  Attributes:
    mesh: with an axis "data" of workers; None is one worker, outside of
      `jax.shard_map`.
    specs: by path name of a parameter, its PartitionSpec; a missing one is
      whole.
    stacked_axes: (name, leaf) -> axes that only replicate layers.
  """

  mesh: Mesh | None = None
  specs: Mapping[str, PartitionSpec] = dataclasses.field(default_factory=dict)
  stacked_axes: StackedFn = lambda name, leaf: ()

  @property
  def count(self) -> int:
    """Workers."""
    return 1 if self.mesh is None else self.mesh.shape[AXIS]

  @property
  def axis(self) -> str | None:
    """The mesh axis to reduce over."""
    return None if self.mesh is None else AXIS

  def sum(self, tree: Any) -> Any:
    """Sum over workers in full precision."""
    return tree if self.axis is None else jax.lax.psum(tree, self.axis)

  def all(self, flag: jax.Array) -> jax.Array:
    """Whether `flag` is true on every worker."""
    if self.axis is None:
      return flag
    return jax.lax.pmin(flag.astype(jnp.int32), self.axis).astype(bool)

  def own(self, parts: Any) -> Any:
    """Gradients that add up to the batch's -> gradients that average to it."""
    return jax.tree.map(lambda g: g * jnp.asarray(self.count, g.dtype), parts)

  def zeros(self, params: Any) -> PerWorker:
    """A zero of each worker for each parameter."""
    return PerWorker(
      jax.tree.map(
        lambda p: jnp.zeros((self.count, *p.shape), jnp.float32), params
      )
    )

  def no_errors(self, params: Any, compression: Compression) -> ErrorFeedback:
    """The state before anything was sent."""
    if not compression.error_feedback:
      return ErrorFeedback(None, None)

    def server(path, leaf):
      name = path_name(path)
      shards = self._shards(name, len(leaf.shape))
      local = tuple(s // k for s, k in zip(leaf.shape, shards))
      depth = self._depth(name, leaf, compression)
      grid = grid_of(local, self.count, compression, depth)
      shape = (self.count, *shards, grid.rows, grid.piece)
      return jnp.zeros(shape, jnp.float32)

    return ErrorFeedback(
      self.zeros(params), jax.tree_util.tree_map_with_path(server, params)
    )

  def compressed_mean(
    self,
    tree: Any,
    errors: ErrorFeedback,
    compression: Compression,
    masks: Any = None,
  ) -> tuple[Any, ErrorFeedback]:
    """The workers' average by `compressed_all_reduce`, and new errors.

    It must run inside `jax.shard_map` over "data", the other axes automatic.

    Args:
      tree: this worker's; like the parameters, float32.
      errors: of `no_errors` or the last call.
      compression: scales.
      masks: tree like `tree` of booleans, what to send; None for everything.
    """
    named = _named(tree)
    names = [name for name, _ in named]
    leaves = [leaf for _, leaf in named]
    treedef = jax.tree.structure(tree)
    inputs = {"tensors": leaves}
    if masks is not None:
      inputs["masks"] = jax.tree.leaves(masks)
    if compression.error_feedback:
      inputs["worker"] = jax.tree.leaves(errors.worker)
      inputs["server"] = jax.tree.leaves(errors.server)
    reduce = functools.partial(
      self._reduce,
      compression=compression,
      stacked=[self._depth(n, leaf, compression) for n, leaf in named],
      sum_axes=[self._sum_axes(n, leaf, compression) for n, leaf in named],
    )
    if self._splits_workers():
      mesh = jax.sharding.get_abstract_mesh()
      specs = self._local_specs(names, leaves, inputs)
      outputs = {k: specs[k] for k in inputs if k != "masks"}
      reduce = jax.shard_map(
        reduce,
        in_specs=(specs,),
        out_specs=outputs,
        axis_names=set(mesh.auto_axes),
        # Scales are summed over these axes, which types can't show.
        check_vma=False,
      )
    found = reduce(inputs)
    mean = jax.tree.unflatten(treedef, found["tensors"])
    if not compression.error_feedback:
      return mean, errors
    return mean, ErrorFeedback(
      PerWorker(jax.tree.unflatten(treedef, found["worker"])),
      jax.tree.unflatten(treedef, found["server"]),
    )

  def _reduce(self, inputs, *, compression, stacked, sum_axes):
    """`compressed_all_reduce` on what this device holds."""
    worker = server = None
    if compression.error_feedback:
      worker = [e[0] for e in inputs["worker"]]
      server = [e.reshape(e.shape[-2:]) for e in inputs["server"]]
    mean, worker, server = compressed_all_reduce(
      inputs["tensors"],
      worker,
      server,
      axis=self.axis,
      compression=compression,
      stacked=stacked,
      masks=inputs.get("masks"),
      sum_axes=sum_axes,
    )
    found = {"tensors": mean}
    if compression.error_feedback:
      found["worker"] = [e[None] for e in worker]
      found["server"] = [
        e.reshape(old.shape) for e, old in zip(server, inputs["server"])
      ]
    return found

  def _local_specs(self, names, leaves, inputs):
    """Specs of `_reduce`'s inputs over the axes within a worker."""
    whole = [self._splits(n, x.ndim) for n, x in zip(names, leaves)]
    table = {
      "tensors": [PartitionSpec(*s) for s in whole],
      "masks": [PartitionSpec(*s) for s in whole],
      "worker": [PartitionSpec(None, *s) for s in whole],
      "server": [PartitionSpec(None, *s, None, None) for s in whole],
    }
    return {key: table[key] for key in inputs}

  def _splits(self, name: str, ndim: int) -> list[tuple[str, ...]]:
    """By dimension, the mesh axes of more than one device that split it."""
    return [
      tuple(a for a in _axes(entry) if self.mesh.shape[a] > 1)
      for entry in _entries(self._spec(name), ndim)
    ]

  def _spec(self, name: str) -> PartitionSpec:
    return self.specs.get(name, PartitionSpec())

  def _splits_workers(self) -> bool:
    if self.mesh is None:
      return False
    return any(n > 1 for axis, n in self.mesh.shape.items() if axis != AXIS)

  def _shards(self, name: str, ndim: int) -> tuple[int, ...]:
    return tuple(
      math.prod(self.mesh.shape[a] for a in _axes(entry)) if self.mesh else 1
      for entry in _entries(self._spec(name), ndim)
    )

  def _depth(self, name: str, leaf: Any, compression: Compression) -> int:
    """Leading axes that only replicate layers, if their scales differ."""
    if compression.granularity != "layer":
      return 0
    axes = self.stacked_axes(name, leaf)
    if tuple(axes) != tuple(range(len(axes))):
      raise ValueError(
        f"granularity='layer': the layers of {name!r} lie along axes {axes};"
        " they must be its first."
      )
    return len(axes)

  def _sum_axes(
    self, name: str, leaf: Any, compression: Compression
  ) -> tuple[str, ...]:
    depth = self._depth(name, leaf, compression)
    return sum(self._splits(name, leaf.ndim)[depth:], ())


def shard(node: Any, by_name: Mapping[str, Any], replicated: Any) -> Any:
  """Shardings of a `PerWorker` or `ErrorFeedback`, as a node like it.

  Args:
    node: of the state, possibly abstract.
    by_name: shardings (or PartitionSpecs) of the parameters.
    replicated: sharding of a replicated parameter, of the same kind.
  """

  def one(extra):
    def of_leaf(path, leaf):
      sharding = by_name.get(path_name(path), replicated)
      named = isinstance(sharding, NamedSharding)
      spec = sharding.spec if named else sharding
      ndim = leaf.ndim - 1 - extra
      spec = PartitionSpec(AXIS, *_entries(spec, ndim), *(None,) * extra)
      return NamedSharding(sharding.mesh, spec) if named else spec

    return of_leaf

  def tree(x, extra):
    return jax.tree_util.tree_map_with_path(one(extra), x)

  if isinstance(node, PerWorker):
    return type(node)(tree(node.tree, 0))
  if node.worker is None:
    return node
  return ErrorFeedback(PerWorker(tree(node.worker.tree, 0)),
                       tree(node.server, 2))  # fmt: skip


def is_per_worker(node: Any) -> bool:
  """Whether `shard` knows the node."""
  return isinstance(node, PerWorker | ErrorFeedback)


def forgotten(tree: Any) -> Any:
  """The tree as if nothing were owed: all `ErrorFeedback` in it is 0."""

  def zeros(node):
    if not isinstance(node, ErrorFeedback):
      return node
    return jax.tree.map(
      lambda x: jax.jit(jnp.zeros_like, out_shardings=x.sharding)(x), node
    )

  return jax.tree.map(
    zeros, tree, is_leaf=lambda x: isinstance(x, ErrorFeedback)
  )
