"""Who decomposes and keeps the factors of which layer: KAISA's workers.

Of W workers, the devices of the batch axes, a layer has `grad_worker_fraction`
W that keep its factors and precondition its gradient; the others receive the
direction. 1/W keeps least and sends directions at every step; 1 keeps all of
them everywhere and sends decompositions whenever they are new. In either case
each decomposition is computed once.

Layers of a stack are dealt out to workers by whole layers. A stack that they
do not divide is kept in rows instead (see `memory`), and decomposed after
padding it to a multiple. Of layers that are no part of a stack, factors are
decomposed by one worker each, by the layers' numbers, and sent to all; they are
kept in rows. What no axis of the workers divides is whole everywhere: the 24
input factors of width 1025 on a mesh of data=16, where data=2, fsdp=8 would
deal them out to eight.

Reference: Pauloski et al. 2021 (KAISA), arXiv:2107.01739, section 3.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

_FSDP = "fsdp"
_BATCH = ("data", _FSDP)


def check_fraction(fraction: float | None) -> None:
  """Refuses what is no fraction.

  Raises:
    ValueError: it is not in [0, 1].
  """
  if fraction is not None and not 0 <= fraction <= 1:
    raise ValueError(
      f"optim.precondition.grad_worker_fraction={fraction} must be in [0, 1],"
      " or None."
    )


def owner_axes(
  mesh: Mapping[str, int], fraction: float | None
) -> tuple[str, ...]:
  """Mesh axes over which layers are dealt out.

  Args:
    mesh: sizes by name.
    fraction: part of the workers that keep a layer; 0 for 1/W; None deals them
      out over "fsdp", as parameters are.

  Raises:
    ValueError: no axes of this mesh make that fraction.
  """
  sizes = {axis: mesh.get(axis, 1) for axis in _BATCH}
  if fraction is None:
    return (_FSDP,) if sizes[_FSDP] > 1 else ()
  large = tuple(axis for axis in _BATCH if sizes[axis] > 1)
  if fraction == 0:
    return large
  choices = {1: ()}
  for axes in (*((axis,) for axis in large), large):
    choices.setdefault(math.prod(sizes[axis] for axis in axes), axes)
  for size, axes in choices.items():
    if math.isclose(size * fraction, 1.0, rel_tol=1e-3):
      return axes
  possible = ", ".join(f"1/{size}" for size in sorted(choices))
  raise ValueError(
    f"optim.precondition.grad_worker_fraction={fraction} is not a fraction that"
    f" the axes data={sizes['data']}, fsdp={sizes[_FSDP]} make; choose from"
    f" {possible}, or 0 for the smallest."
  )


def place(
  shape: Sequence[int], mesh: Mapping[str, int], fraction: float | None
) -> PartitionSpec:
  """Where a factor [*stack, d, d], or its eigenvalues [*stack, d], is kept.

  A stack by its layers, over as many of the owners' axes as divide it; what
  none divides, and what is no stack, by rows in the same way; else whole
  everywhere.
  """
  axes = owner_axes(mesh, fraction)
  single = sorted(axes, key=lambda axis: -mesh[axis])
  choices = (axes, *((axis,) for axis in single))
  rank = len(shape)
  if rank < 2:
    return PartitionSpec()
  for axis in (0, rank - 2) if rank > 2 else (0,):
    for some in choices:
      size = math.prod(mesh[name] for name in some)
      if size > 1 and shape[axis] % size == 0:
        return PartitionSpec(
          *(None,) * axis, some if len(some) > 1 else some[0]
        )
  return PartitionSpec()


def keep(factors: Any, fraction: float | None) -> Any:
  """Factors, each where `place` has it on the mesh at hand.

  Said where they are made: the compiler would else gather decompositions at
  every step instead of at those that make new ones.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not _free_axes(mesh):
    return factors
  return jax.tree.map(
    lambda x: jax.lax.with_sharding_constraint(
      x, place(x.shape, mesh.shape, fraction)
    ),
    factors,
  )


def decompose(
  function: Callable[[Array], Any],
  matrices: Float[Array, "*stack d d"],
  owner: int = 0,
) -> Any:
  """`function` of a stack, each matrix by one worker of the mesh at hand.

  Args:
    function: batched over leading axes, [n, d, d] -> tree of [n, ...].
    matrices: symmetric.
    owner: number of the worker, modulo workers, if there is only one matrix.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = _free_axes(mesh)
  workers = math.prod(mesh.shape[axis] for axis in axes)
  if workers == 1:
    return function(matrices)
  stack, width = matrices.shape[:-2], matrices.shape[-1]
  number = math.prod(stack)
  flat = matrices.reshape(number, width, width)
  if number == 1:
    found = _by_owner(function, flat, axes, owner % workers)
  else:
    found = _by_all(function, flat, axes, workers)
  return jax.tree.map(lambda x: x[:number].reshape(*stack, *x.shape[1:]), found)


def _by_all(
  function: Callable[[Array], Any],
  flat: Float[Array, "n d d"],
  axes: tuple[str, ...],
  workers: int,
) -> Any:
  """Of as many matrices each, padded; [n + padding, ...]."""
  number, width = flat.shape[:2]
  padding = -number % workers
  if padding:
    eye = jnp.eye(width, dtype=flat.dtype)
    eyes = jnp.broadcast_to(eye, (padding, width, width))
    flat = jnp.concatenate([flat, eyes])
  dealt = PartitionSpec(axes)
  return jax.shard_map(
    function, in_specs=dealt, out_specs=dealt, check_vma=False
  )(flat)


def _by_owner(
  function: Callable[[Array], Any],
  flat: Float[Array, "1 d d"],
  axes: tuple[str, ...],
  owner: int,
) -> Any:
  """By one worker; the others add zeros to what it sends."""

  def one(flat):
    def nothing(flat):
      shapes = jax.eval_shape(function, flat)
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    mine = jax.lax.axis_index(axes) == owner
    return jax.lax.psum(jax.lax.cond(mine, function, nothing, flat), axes)

  whole = PartitionSpec()
  return jax.shard_map(one, in_specs=whole, out_specs=whole, check_vma=False)(
    flat
  )


def at_owners(
  x: Float[Array, "*stack o i"], fraction: float | None
) -> Float[Array, "*stack o i"]:
  """x, of which each worker holds the layers whose factors it keeps."""
  mesh = jax.sharding.get_abstract_mesh()
  if not _free_axes(mesh) or x.ndim < 3:
    return x
  dealt = place((*x.shape[:1], 1, 1), mesh.shape, fraction)
  return x if not any(dealt) else jax.lax.with_sharding_constraint(x, dealt)


def _free_axes(mesh: Any) -> tuple[str, ...]:
  """Batch axes of several devices; () if some are split by hand already."""
  if mesh.empty or set(_BATCH) & set(mesh.manual_axes):
    return ()
  return tuple(axis for axis in _BATCH if mesh.shape.get(axis, 1) > 1)
