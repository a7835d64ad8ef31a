"""Optimizers that finish a layer before they begin the next one.

A layer-wise ratio needs norms of a whole update before any of it is applied. On
a stack of layers XLA reads it all for the norms and once more for the update:
gradient, moments and weights cross the memory bus ten times. One layer fits
into a TPU's on-chip memory, so a loop over layers reads and writes each number
once: seven crossings.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from bertjax import rules
from bertjax.hardware.chips import CHIPS
from bertjax.optim import selection
from bertjax.parallel.sharding import replicates_parameters

Transforms = Sequence[optax.GradientTransformation]

# Gradient, two moments, weights and the update of a layer.
_ARRAYS = 5
# Smaller slices cost more in loop iterations than they save in traffic.
_LEAST_BYTES = 2**20


class StagedTransformation(optax.GradientTransformationExtraArgs):
  """A chain of two stages, the second of which takes norms of the first's.

  The second takes them of the pair (updates, parameters) that it is given as
  `measured`, if it is.

  Attributes:
    stages: stacked axes -> the transformations of each stage.
  """

  stages: Callable[[selection.AxesFn | Any | None], tuple[Transforms, ...]]

  def __new__(
    cls,
    stages: Callable[[selection.AxesFn | Any | None], tuple[Transforms, ...]],
    stacked_axes: selection.AxesFn | Any | None,
  ):
    first, second = stages(stacked_axes)
    chain = optax.chain(*first, *second)
    made = super().__new__(cls, chain.init, chain.update)
    made.stages = stages
    return made


class Applied(NamedTuple):
  """What `apply` returns.

  Attributes:
    params: the new ones.
    state: likewise.
    gradient_square: sum of the squares of all gradients.
  """

  params: Any
  state: Any
  gradient_square: Float[Array, ""]


def on_chip_bytes(mesh: Mesh | None) -> int:
  """What one layer's arrays may take; 0 where a loop over layers is no gain.

  That is on anything but a TPU, and where parameters are sharded: the norms of
  every slice would be an exchange of its own.
  """
  if mesh is None or not replicates_parameters(mesh):
    return 0
  device = mesh.devices.flat[0]
  if device.platform != "tpu":
    return 0
  for chip in CHIPS.values():
    if device.device_kind.startswith(chip.device_kinds):
      return chip.vmem_bytes
  return 0


def looped(
  params: Any, stacked: selection.AxesFn, on_chip: int
) -> frozenset[str]:
  """Names of the parameters that a loop over their layers is worth while for.

  Args:
    params: possibly abstract.
    stacked: (name, leaf) -> stacked axes.
    on_chip: bytes that the arrays of one slice may take.
  """

  def fits(name, leaf):
    if tuple(stacked(name, leaf)) != (0,):
      return False
    size = 4 * leaf.size // leaf.shape[0]
    return size >= _LEAST_BYTES and _ARRAYS * size <= on_chip

  leaves = selection.by_name(params)
  return frozenset(name for name, leaf in leaves.items() if fits(name, leaf))


def apply(
  transform: StagedTransformation,
  grads: Any,
  state: Any,
  params: Any,
  *,
  stacked: selection.AxesFn,
  names: Collection[str],
) -> Applied:
  """`update` and `optax.apply_updates` in one, layer by layer.

  Args:
    transform: the optimizer.
    grads: float32.
    state: of the transform.
    params: float32.
    stacked: (name, leaf) -> stacked axes, as the transform has them.
    names: of the parameters to loop over; axis 0 holds their layers.
  """
  owners = frozenset(selection.by_name(params))
  rest = owners - frozenset(names)
  whole = [_only(tree, owners, rest) for tree in (grads, state, params)]
  new_params, new_state, square = _step(transform, stacked, False, *whole)
  found_params, found_state = _by_path(new_params), _by_path(new_state)
  for name in sorted(names):
    parts = [_only(tree, owners, {name}) for tree in (grads, state, params)]
    new_params, new_state, added = _loop(transform, owners, *parts)
    square += added
    found_params |= _by_path(new_params)
    # Counters are those of the first call.
    found_state = _by_path(new_state) | found_state
  return Applied(_like(params, found_params), _like(state, found_state), square)


def _step(transform, stacked, on_chip, grads, state, params):
  """Parameters, state and square of the gradient after one update."""
  first, second = transform.stages(stacked)
  split = len(first)
  square = sum(
    (jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)),
    start=jnp.zeros((), jnp.float32),
  )
  updates, begun = optax.chain(*first).update(grads, state[:split], params)
  measured = updates, params
  if on_chip:
    # What the norms are taken of stays there: nothing is read again. They are
    # taken while it is computed, which waits for memory.
    updates, begun, params = jax.lax.optimization_barrier(
      (updates, begun, params)
    )
  updates, ended = optax.chain(*second).update(
    updates, state[split:], params, measured=measured
  )
  return optax.apply_updates(params, updates), (*begun, *ended), square


def _loop(transform, owners, grads, state, params):
  """`_step` for every layer of the one parameter there is."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path((state, params))
  own = [_owner(path, owners) is not None for path, _ in leaves]
  stacks = [leaf for (_, leaf), mine in zip(leaves, own) if mine]
  common = [leaf for (_, leaf), mine in zip(leaves, own) if not mine]

  def body(i, carry):
    stacks, square = carry

    def layer(stack):
      return jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)

    slices, shared = map(layer, stacks), iter(common)
    state, params = treedef.unflatten(
      [next(slices) if mine else next(shared) for mine in own]
    )
    params, state, added = _step(
      transform, None, True, jax.tree.map(layer, grads), state, params
    )
    new = treedef.flatten_up_to((state, params))
    new = [leaf for leaf, mine in zip(new, own) if mine]
    stacks = [
      jax.lax.dynamic_update_index_in_dim(stack, leaf, i, 0)
      for stack, leaf in zip(stacks, new)
    ]
    return stacks, square + added

  length = jax.tree.leaves(params)[0].shape[0]
  start = stacks, jnp.zeros((), jnp.float32)
  stacks, square = jax.lax.fori_loop(0, length, body, start)
  stacks, shared = iter(stacks), iter(common)
  state, params = treedef.unflatten(
    [next(stacks) if mine else next(shared) for mine in own]
  )
  return params, state, square


def _owner(path: tuple, owners: Collection[str]) -> str | None:
  """The parameter whose path a leaf's path ends with."""
  parts = rules.path_name(path).split("/")
  # The longest first: a parameter's path can end with another's.
  ends = ("/".join(parts[i:]) for i in range(len(parts)))
  return next((end for end in ends if end in owners), None)


def _only(tree: Any, owners: Collection[str], kept: Collection[str]) -> Any:
  """The tree without the leaves of the other parameters."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf
      if (owner := _owner(path, owners)) is None or owner in kept
      else optax.MaskedNode()
    ),
    tree,
  )


def _by_path(tree: Any) -> dict[tuple, Array]:
  return dict(jax.tree_util.tree_leaves_with_path(tree))


def _like(tree: Any, found: dict[tuple, Array]) -> Any:
  """A tree like `tree` of leaves found by path."""
  paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
  return treedef.unflatten([found[path] for path, _ in paths])
