"""Attention on a mesh: a kernel is opaque to the partitioner, so split by hand.

`attend` runs a backend under `jax.shard_map`, with examples and heads split
over mesh axes and, if asked, positions too (`ring.py`). Every shard draws the
dropout mask that the whole arrays would have with the "counter" generator.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kernels.flash_attention import backend as backends
from kernels.flash_attention import placement, ring, zigzag
from kernels.flash_attention.backend import Backend
from kernels.flash_attention.layouts import Sizes
from kernels.flash_attention.options import Extras, Options, check
from kernels.flash_attention.relative import Relative

PLACEMENTS = {"contiguous": placement.Contiguous, "zigzag": zigzag.Zigzag}


class Sharding(NamedTuple):
  """Mesh axes over which attention is split.

  Attributes:
    batch: of examples.
    heads: of heads.
    sequence: of positions, or None.
    gather: collect the keys of all positions before the call, instead of
      passing them around in a ring.
    placement: which positions a device of the sequence axis holds: "contiguous"
      or, to balance causal attention, "zigzag": the arrays are then in the
      order of `zigzag.zigzag_order`.
  """

  batch: tuple[str, ...] = ()
  heads: tuple[str, ...] = ()
  sequence: str | None = None
  gather: bool = False
  placement: str = "contiguous"

  @property
  def axes(self) -> tuple[str, ...]:
    """All of them."""
    last = () if self.sequence is None else (self.sequence,)
    return (*self.batch, *self.heads, *last)

  @property
  def needed(self) -> bool:
    """Whether a kernel has to be kept from the partitioner.

    It has to where nothing is split as well, if an enclosing `shard_map` left
    it axes of the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    return bool(self.axes) or bool(mesh.manual_axes and left)


def _specs(extras: Extras, layout: str, sharding: Sharding):
  """PartitionSpecs of an array laid out like q, of lse, and of the extras."""
  letters = {
    "b": sharding.batch or None,
    "h": sharding.heads or None,
    "t": sharding.sequence,
  }

  def spec(names: str, shape=None):
    axes = [letters.get(c) for c in names]
    if shape is not None:  # a dimension of 1 is broadcast
      axes = [a if size > 1 else None for a, size in zip(axes, shape)]
    return PartitionSpec(*axes)

  def of(x, names):
    return None if x is None else spec(names, x.shape)

  slopes, relative = extras.alibi_slopes, extras.relative
  mask = extras.block_mask
  return (
    spec(layout),
    spec("bht"),
    Extras(
      bias=of(extras.bias, "bht-"),
      alibi_slopes=of(slopes, "bh"[-getattr(slopes, "ndim", 0) :]),
      relative=relative and relative.map(of, Relative("bh-", "bh--", "bh--")),
      q_segments=None if extras.q_segments is None else spec("bt"),
      kv_segments=None if extras.kv_segments is None else spec("bt"),
      block_mask=None if isinstance(mask, np.ndarray) else of(mask, "h--"),
      seed=None if extras.seed is None else PartitionSpec(),
      offset=None if extras.offset is None else PartitionSpec(),
    ),
  )


def _divides(n: Sizes, sharding: Sharding, mesh) -> None:
  missing = sorted(set(sharding.axes) - set(mesh.axis_names))
  if missing:
    raise ValueError(
      f"sharding names the mesh axes {sharding.axes}; of these the mesh of the"
      f" context has no {', '.join(missing)}, but {mesh.axis_names}. Set it"
      " with jax.set_mesh."
    )
  for name, size, axes in (
    ("examples", n.b, sharding.batch),
    ("heads of k and v", n.kv_heads, sharding.heads),
    ("queries", n.t, (sharding.sequence,) if sharding.sequence else ()),
    ("keys", n.s, (sharding.sequence,) if sharding.sequence else ()),
  ):
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if size % shards:
      raise ValueError(
        f"attention has {size} {name}, which do not divide over {shards}"
        f" devices of mesh axes {axes}."
      )


def _check_placement(n: Sizes, extras, options, sharding: Sharding, mesh):
  if sharding.placement not in PLACEMENTS:
    raise ValueError(
      f"sharding.placement={sharding.placement!r} is unknown; choose from"
      f" {', '.join(PLACEMENTS)}."
    )
  if sharding.placement == "contiguous":
    return
  if sharding.sequence is None or sharding.gather:
    raise ValueError(
      f"sharding.placement={sharding.placement!r} is of a ring: it needs"
      " sharding.sequence, without gather."
    )
  zigzag.check(n.t, n.s, mesh.shape[sharding.sequence], extras, options)


def _local_seed(seed, q, options: Options, sharding: Sharding) -> jax.Array:
  """The seed with this shard's first example and head."""
  shape = dict(zip(options.layout, q.shape))
  first = [
    jax.lax.axis_index(axes) * shape[c] if axes else 0
    for c, axes in (("b", sharding.batch), ("h", sharding.heads))
  ]
  return seed.at[2:4].add(jnp.stack([jnp.uint32(x) for x in first]))


def attend(
  backend: Backend,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
  sharding: Sharding,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of whole arrays, computed where their shards are.

  The mesh is that of the context (`jax.set_mesh`).

  Raises:
    ValueError: shapes that do not fit or do not divide, or `Unsupported`.
  """
  n = check(q, k, v, extras, options)
  mesh = jax.sharding.get_abstract_mesh()
  _divides(n, sharding, mesh)
  _check_placement(n, extras, options, sharding, mesh)
  mask = extras.block_mask
  static = isinstance(mask, np.ndarray)
  if static and mask.shape[0] > 1 and sharding.heads:
    extras, static = extras._replace(block_mask=jnp.asarray(mask)), False
  operands = extras._replace(block_mask=None) if static else extras
  like_q, like_lse, like_extras = _specs(operands, options.layout, sharding)

  def local(q, k, v, extras):
    if static:
      extras = extras._replace(block_mask=mask)
    if extras.seed is not None:
      extras = extras._replace(
        seed=_local_seed(extras.seed, q, options, sharding)
      )
    if sharding.sequence is None:
      return backends.attend(backend, q, k, v, extras, options)
    call = backend, sharding.sequence, q, k, v, extras, options
    if sharding.gather:
      return ring.gathered_attention(*call)
    return ring.ring_attention(*call, PLACEMENTS[sharding.placement])

  return jax.shard_map(
    local,
    in_specs=(like_q, like_q, like_q, like_extras),
    out_specs=(like_q, like_lse),
    # All axes, those that split nothing too: the partitioner must not get to
    # see a kernel.
    axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
    check_vma=False,  # kernels do not tell over which axes results vary
  )(q, k, v, operands)
