"""Logical axis names of arrays, and the table that maps them to the mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax.rules import path_name

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

RULES: Rules = (
  ("batch", ("data", "fsdp")),
  ("length", "seq"),
  ("vocab", "model"),
  ("mlp", "model"),
  ("heads", "model"),
  ("embed", "fsdp"),
  ("layers", None),
  ("head_dim", None),
  ("positions", None),
  ("types", None),
  ("classes", None),
  ("norm", None),
)


def platform() -> str:
  """The platform that the context's mesh is of; without a mesh, JAX's own."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def replicates_parameters(mesh: Mesh | jax.sharding.AbstractMesh) -> bool:
  """Whether every device of a mesh holds all parameters."""
  return all(n == 1 for axis, n in mesh.shape.items() if axis != "data")


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
  """Pins an activation's sharding by logical names.

  Without a mesh it does nothing; inside `shard_map` the axes that are already
  split by hand are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.auto_axes:
    return x

  def keep(axes):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(a for a in axes if a in mesh.auto_axes) or None

  partition = PartitionSpec(*map(keep, spec(names, RULES)))
  return jax.lax.with_sharding_constraint(x, partition)


def parts(
  shape: tuple[int, ...], names: tuple[str | None, ...]
) -> tuple[tuple[str, ...], ...]:
  """The mesh axes over which `constrain` splits an array, if they divide it.

  Of the mesh at hand, without the axes that are already split by hand: for each
  name those of its dimension, maybe none.

  Args:
    shape: of the array.
    names: logical names of its first dimensions.
  """
  mesh = jax.sharding.get_abstract_mesh()
  entries = []
  for size, axes in zip(shape, spec(names, RULES)):
    axes = (axes,) if isinstance(axes, str) else axes or ()
    axes = tuple(a for a in axes if a in mesh.auto_axes and mesh.shape[a] > 1)
    divides = size % math.prod(mesh.shape[a] for a in axes) == 0
    entries.append(axes if divides else ())
  return tuple(entries)


def by_hand(axis: str, mesh: Mesh | jax.sharding.AbstractMesh) -> set[str]:
  """The `axis_names` of a `jax.shard_map` over one axis of a mesh.

  With it go all that split nothing. Where any axis is left automatic, JAX
  annotates every operation with a sharding of its own: a quarter of LAMB's step
  and more than a third of 1-bit Adam's, which take longer to compile.
  """
  return {axis} | {name for name, size in mesh.shape.items() if size == 1}


def split_by_hand(axis: str) -> bool:
  """Whether this is traced inside `shard_map` over a mesh axis."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and axis in mesh.manual_axes


def first_row(rows: int) -> jax.Array | int:
  """Where in the global batch the rows begin that are traced.

  0, but inside `shard_map` over "data", where every shard has rows of its own.

  Args:
    rows: that are traced.
  """
  if not split_by_hand("data"):
    return 0
  return jax.lax.axis_index("data") * rows


def global_rows(rows: int) -> int:
  """How many rows the batch has of which so many are traced; see `first_row`.

  Args:
    rows: that are traced.
  """
  if not split_by_hand("data"):
    return rows
  return rows * jax.sharding.get_abstract_mesh().shape["data"]


def avoid_gathers() -> bool:
  """Whether XLA might fail to partition a gather from a split axis.

  Where a `shard_map` over "data" leaves it an operand that is split over two
  more axes of the mesh, it ends the process.
  """
  if not split_by_hand("data"):
    return False
  mesh = jax.sharding.get_abstract_mesh()
  return sum(mesh.shape[axis] > 1 for axis in mesh.auto_axes) > 1


def current_batch_shards() -> int:
  """`batch_shards` of the mesh that is set while tracing; 1 without one.

  Inside `shard_map` only axes that are not split by hand count.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(
    mesh.shape[axis] for axis in dict(RULES)["batch"] if axis in mesh.auto_axes
  )


def spec(names: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
  """The mesh axes of an array whose dimensions have these logical names.

  Raises:
    ValueError: a name that the rules do not list.
  """
  table = dict(rules)
  for name in names:
    if name is not None and name not in table:
      raise ValueError(
        f"logical axis {name!r} is in no sharding rule; known:"
        f" {', '.join(table)}."
      )
  return PartitionSpec(*(table[n] if n is not None else None for n in names))


def logical_axes(variables: Any) -> Any:
  """Per leaf, the tuple of logical names that its initializer declared.

  Args:
    variables: what `module.init` or its `jax.eval_shape` returned, boxed.
  """
  return jax.tree.map(
    lambda leaf: (
      tuple(leaf.names)
      if isinstance(leaf, nn.LogicallyPartitioned)
      else (None,) * leaf.ndim
    ),
    variables,
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )


def _axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
  if axes is None:
    return 1
  axes = (axes,) if isinstance(axes, str) else axes
  return math.prod(mesh.shape[a] for a in axes)


def parameter_shardings(
  abstract: Any, axes: Any, mesh: Mesh, rules: Rules = RULES
) -> Any:
  """A NamedSharding for every parameter.

  Args:
    abstract: tree of arrays or ShapeDtypeStructs, unboxed.
    axes: tree of `logical_axes`, same structure.
    mesh: the device mesh.
    rules: logical name to mesh axes.

  Raises:
    ValueError: a dimension that its mesh axis does not divide.
  """

  def one(path, leaf, names):
    partition = spec(names, rules)
    for size, name, axis in zip(leaf.shape, names, partition):
      count = _axis_size(mesh, axis)
      if size % count:
        hint = (
          "pad the vocabulary with data.tokenizer.pad_to_multiple"
          if name == "vocab"
          else f"use a divisor of {size} that divides the devices, such as"
          f" {math.gcd(size, count)}"
        )
        raise ValueError(
          f"mesh.{axis}={count} does not divide axis {name!r} of size {size} of"
          f" parameter {path_name(path)!r}; {hint}."
        )
    return NamedSharding(mesh, partition)

  return jax.tree_util.tree_map_with_path(
    one, abstract, axes, is_leaf=lambda x: hasattr(x, "shape")
  )


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Batch axis over data and fsdp; the other axes are left whole."""
  return NamedSharding(
    mesh, PartitionSpec(("data", "fsdp"), *(None,) * (ndim - 1))
  )


def batch_shards(mesh: Mesh) -> int:
  """Over how many shards the batch axis is split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def feed(mesh: Mesh) -> tuple[int, int]:
  """Which part of every batch this process reads, and of how many.

  Processes that hold shards of the same rows, as when `mesh.model` spans them,
  read the same part.

  Raises:
    ValueError: two processes share some of their rows, but not all.
  """
  shards = batch_shards(mesh)
  indices = batch_sharding(mesh, 1).devices_indices_map((shards,))
  held: dict[int, set[int]] = {}
  for device, (rows,) in indices.items():
    start, stop, _ = rows.indices(shards)
    held.setdefault(device.process_index, set()).update(range(start, stop))
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, parts)) != shards or len(set(map(len, parts))) > 1:
    sizes = ", ".join(f"{k}={v}" for k, v in mesh.shape.items())
    raise ValueError(
      f"mesh: {sizes} over {len(held)} processes gives some of them only a part"
      " of the rows of others; make mesh.model x mesh.seq divide the devices of"
      " a process, or the other way round."
    )
  mine = tuple(sorted(held[jax.process_index()]))
  return parts.index(mine), len(parts)


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's slice of the global batch becomes global arrays."""
  return {
    k: jax.make_array_from_process_local_data(batch_sharding(mesh, v.ndim), v)
    for k, v in batch.items()
  }
