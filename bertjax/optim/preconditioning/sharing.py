"""Who decomposes and keeps the factors of which layer: KAISA's workers.

Of W workers, the devices of the batch axes, a layer has `grad_worker_fraction`
W that keep its factors and precondition its gradient; the others receive the
direction. 1/W keeps least and sends directions at every step; 1 keeps all of
them everywhere and sends decompositions whenever they are new. In either case
each decomposition is computed once.

Layers of a stack are dealt out to workers by whole layers. What they do not
divide, and layers that are no part of a stack, are kept in rows instead (see
`memory`), and dealt out together to be decomposed. What no axis of the workers
divides is whole everywhere: the 24 input factors of width 1025 on a mesh of
data=16, where data=2, fsdp=8 would deal them out to eight.

Reference: Pauloski et al. 2021 (KAISA), arXiv:2107.01739, section 3.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
  matrices: Sequence[Float[Array, "*stack d d"]],
  fraction: float | None = None,
) -> list[Any]:
  """`function` of every matrix, by one worker of the mesh at hand each.

  All of one width are one batch, whatever layers they are of: a decomposition
  takes its compiler minutes, and where a stack has fewer layers than there are
  workers those of other stacks go to the idle ones.

  Args:
    function: batched over leading axes, [n, d, d] -> tree of [n, ...].
    matrices: symmetric ones, or stacks of them.
    fraction: which workers need what is found, as in `place`.
  """
  widths: dict[int, list[int]] = {}
  for number, x in enumerate(matrices):
    widths.setdefault(x.shape[-1], []).append(number)
  found: dict[int, Any] = {}
  for width, numbers in widths.items():
    stacks = {n: matrices[n].reshape(-1, width, width) for n in numbers}
    for number, made in _of_one_width(function, stacks, fraction).items():
      stack = matrices[number].shape[:-2]
      found[number] = jax.tree.map(
        lambda x, stack=stack: x.reshape(*stack, *x.shape[1:]), made
      )
  return [found[number] for number in range(len(matrices))]


def _of_one_width(
  function: Callable[[Array], Any],
  stacks: dict[int, Float[Array, "n d d"]],
  fraction: float | None,
) -> dict[int, Any]:
  """`function` of each stack.

  Stacks that workers divide are dealt out as they are kept; the rest is dealt
  out as one stack.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = _free_axes(mesh)
  workers = math.prod(mesh.shape[axis] for axis in axes)
  dealt = {n: x for n, x in stacks.items() if len(x) % workers == 0}
  rest = {n: x for n, x in stacks.items() if n not in dealt}
  if workers == 1:
    found = _parted(function, list(dealt.values()))
  elif not rest:
    found = _by_workers(function, list(dealt.values()), axes)
  else:
    width = next(iter(rest.values())).shape[-1]
    needed = owner_axes(mesh.shape, fraction)
    in_rows = width % workers == 0 and needed == axes
    *found, others = _by_workers(
      function, [*dealt.values(), _joined(rest.values())], axes, in_rows
    )
    found += _split(others, [len(x) for x in rest.values()])
  return dict(zip((*dealt, *rest), found, strict=True))


def _by_workers(
  function: Callable[[Array], Any],
  stacks: Sequence[Float[Array, "n d d"]],
  axes: tuple[str, ...],
  rest_in_rows: bool | None = None,
) -> list[Any]:
  """`function` of stacks, each worker of its share of all.

  Args:
    function: see `decompose`.
    stacks: kept where they are dealt out, and so is what is found.
    axes: of the workers.
    rest_in_rows: the last stack is no such one: workers do not divide it, and
      each of them needs some rows of all that is found, or else all of it.
  """
  shares, rows, whole = (
    PartitionSpec(axes),
    PartitionSpec(None, axes),
    PartitionSpec(),
  )
  ins: list[Any] = [shares] * len(stacks)
  outs = list(ins)
  stacks = list(stacks)
  if rest_in_rows is not None:
    number = len(stacks[-1])
    kept = jax.tree.map(
      lambda x: rows if rest_in_rows and x.ndim > 2 else whole,
      jax.eval_shape(function, stacks[-1]),
    )
    ins[-1], outs[-1] = rows if rest_in_rows else whole, kept

  def local(*parts):
    parts = list(parts)
    if rest_in_rows is not None:
      parts[-1] = _own_share(parts[-1], axes, rest_in_rows)
    found = _parted(function, parts)
    if rest_in_rows is not None:
      found[-1] = jax.tree.map(
        lambda x, spec: _sent(x, number, axes, in_rows=spec == rows),
        found[-1],
        kept,
      )
    return found

  return jax.shard_map(
    local, in_specs=tuple(ins), out_specs=outs, check_vma=False
  )(*stacks)


def _own_share(
  stack: Array, axes: tuple[str, ...], in_rows: bool
) -> Float[Array, "share d d"]:
  """Of all of a stack, or of some rows of it, the matrices of this worker.

  The last workers have copies where the stack is too short.
  """
  number, workers = len(stack), jax.lax.axis_size(axes)
  share = -(-number // workers)
  if not in_rows:
    own = jax.lax.axis_index(axes) * share + jnp.arange(share)
    return stack[jnp.minimum(own, number - 1)]
  padded = stack[jnp.minimum(jnp.arange(share * workers), number - 1)]
  return jax.lax.all_to_all(padded, axes, 0, 1, tiled=True)


def _sent(
  x: Float[Array, "share *d"], number: int, axes: tuple[str, ...], in_rows: bool
) -> Float[Array, "n *d"]:
  """The inverse of `_own_share`."""
  if in_rows:
    return jax.lax.all_to_all(x, axes, 1, 0, tiled=True)[:number]
  # Not gathered: with more workers than matrices most of it would be copies.
  places = jnp.arange(number) - jax.lax.axis_index(axes) * len(x)
  own = (places >= 0) & (places < len(x))
  own = own.reshape(-1, *(1,) * (x.ndim - 1))
  found = x[jnp.clip(places, 0, len(x) - 1)]
  return jax.lax.psum(jnp.where(own, found, jnp.zeros_like(found)), axes)


def _parted(
  function: Callable[[Array], Any], stacks: Sequence[Float[Array, "n d d"]]
) -> list[Any]:
  """`function` of each stack, called once."""
  return _split(function(_joined(stacks)), [len(x) for x in stacks])


def _joined(stacks: Iterable[Array]) -> Array:
  stacks = list(stacks)
  return stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)


def _split(joined: Any, sizes: Sequence[int]) -> list[Any]:
  """The inverse of `_joined`, of a tree."""
  ends = itertools.accumulate(sizes)
  return [
    jax.tree.map(lambda x, n=n, end=end: x[end - n : end], joined)
    for n, end in zip(sizes, ends, strict=True)
  ]


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
