"""An all-reduce that sends one bit per number, with errors fed back.

n workers average vectors that they send as signs and a few scales. Worker k is
also the server of chunk k:

    c_i = x_i + e_i;  e_i <- c_i - s_i sign(c_i)            each worker
    u_k = mean_i s_i sign(c_i)_k + d_k                      server of chunk k
    d_k <- u_k - t_k sign(u_k)
    out = concat_k t_k sign(u_k)                            everybody

with sign(0) = +1 and scales s, t over what `Compression.granularity` says. What
is not sent stays in the errors e and d, so that

    out + d + mean_i e_i  (new)  =  mean_i (x_i + e_i) + d  (old).

Vectors come as lists of arrays, a tensor each. A tensor of m numbers is cut
into n pieces of m / n, rounded up to whole lines; chunk k is the k-th piece of
all of them, packed 32 signs to a word. Padding has no sign that counts, no
scale and no error.

What a step costs is how often memory moves numbers, so only signs leave the
shape that a tensor has: sums, scales and errors are taken where it lies. Of a
matrix whose rows divide well enough a line is a row, and a word holds the signs
of 32 rows: signs are packed, and what was sent is unpacked, in one pass with
what goes before or after, and it is words that are sorted into a message. The
signs of other tensors are packed together, in lines of 128: pieces of odd
lengths, one after the other, would be shifted across a TPU's lanes, which takes
its compiler minutes and the chip longer than the sending.

Reference: Tang et al. 2021, arXiv:2102.02888, algorithm 1 and figure 3.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped, UInt32

from bertjax.parallel.grids import (
  LANES,
  Compression,
  Grid,
  depth_of,
  grid_of,
  pad,
  round_up,
)
from bertjax.parallel.signs import (
  Group,
  groups_of,
  in_lines,
  pack_signs,
  settled,
  sign_lines,
  unpack_signs,
)


class _Layout(NamedTuple):
  """Everything about a set of tensors that is known before they are."""

  compression: Compression
  grids: tuple[Grid, ...]
  # By tensor: mesh axes over which its sums are completed.
  sum_axes: tuple[tuple[str, ...], ...]

  @property
  def by_chunk(self) -> bool:
    """Whether chunks have scales of their own."""
    return self.compression.by_block or self.compression.granularity == "chunk"

  @property
  def groups(self) -> list[Group]:
    """See `groups_of`."""
    return groups_of(self.grids)


def _pooled(
  layout: _Layout, parts: Sequence[Float[Array, "n r b"]]
) -> list[Float[Array, "..."]]:
  """Sums over what shares a scale: an entry per tensor, or a single one."""
  how = layout.compression.granularity
  if layout.compression.by_block:
    return list(parts)
  over = {"buffer": (0, 1, 2), "chunk": (1, 2), "tensor": (0, 1, 2),
          "shard": (0, 1, 2), "layer": (0, 2)}[how]  # fmt: skip
  sums = [jnp.sum(part, axis=over, keepdims=True) for part in parts]
  if how == "shard":
    return sums
  for axes in dict.fromkeys(layout.sum_axes):
    members = [i for i, mine in enumerate(layout.sum_axes) if mine == axes]
    if axes:
      summed = jax.lax.psum([sums[i] for i in members], axes)
      for i, total in zip(members, summed):
        sums[i] = total
  return [sum(sums)] if how in ("buffer", "chunk") else sums


def _scales(
  layout: _Layout,
  sums: Sequence[Float[Array, "n r b"]],
  counts: Sequence[Float[Array, "n r b"]],
) -> list[Float[Array, "n r b"]]:
  """By tensor its scales, of sums of magnitudes; size 1 where they are shared.

  Args:
    layout: of the tensors.
    sums: of magnitudes or, for "rms", of squares.
    counts: of the numbers in them.
  """
  means = [
    s / jnp.maximum(c, 1.0)
    for s, c in zip(_pooled(layout, sums), _pooled(layout, counts))
  ]
  if layout.compression.scale == "rms":
    return [jnp.sqrt(m) for m in means]
  return means


def _each(layout: _Layout, scales: Sequence[Array]) -> list[Array]:
  """An entry per tensor of what may be a single one for all of them."""
  return list(scales) * (len(layout.grids) if len(scales) == 1 else 1)


def _size(layout: _Layout, x: Array) -> Array:
  """What scales average."""
  return jnp.square(x) if layout.compression.scale == "rms" else jnp.abs(x)


def _sums(
  layout: _Layout, tensors: Sequence[Shaped[Array, "..."]], chunks: int
) -> list[Float[Array, "n r b"]]:
  """By tensor, sums over what shares a scale; over chunks if they do, too."""

  def one(grid, x):
    if layout.by_chunk:
      x = grid.split(x, chunks)
      return jnp.sum(x, axis=(3, 4), dtype=jnp.float32)
    axes = tuple(range(depth_of(x.shape, grid.rows), x.ndim))
    return jnp.sum(x, axis=axes, dtype=jnp.float32).reshape(1, grid.rows, 1)

  return [one(grid, x) for grid, x in zip(layout.grids, tensors)]


def _counts(
  layout: _Layout, masks: Sequence[Bool[Array, "..."] | None], chunks: int
) -> list[Float[Array, "n r b"]]:
  """By tensor, how many numbers are in those sums."""

  def one(i, grid, mask):
    if mask is not None:
      only = layout._replace(grids=(grid,), sum_axes=(layout.sum_axes[i],))
      return _sums(only, [mask], chunks)[0]
    if not layout.by_chunk:
      return jnp.full((1, grid.rows, 1), grid.length, jnp.float32)
    valid = _inside(grid, chunks, 0)
    return jnp.sum(valid, axis=(3, 4), dtype=jnp.float32)

  return [one(i, *pair) for i, pair in enumerate(zip(layout.grids, masks))]


def _message(
  layout: _Layout,
  positive: Sequence[Bool[Array, "n r b l e"]],
  scales: Sequence[Float[Array, "..."]],
) -> UInt32[Array, "n words lanes"]:
  """Signs, then the bits of the scales: lines for each chunk."""
  chunks = positive[0].shape[0]
  packed = []
  for members, lines in layout.groups:
    if layout.grids[members[0]].alone:
      (i,) = members
      signs = positive[i].reshape(chunks, -1, layout.grids[i].lanes)
      packed.append(in_lines(pack_signs(signs)))
      continue
    signs = [in_lines(positive[i]) for i in members]
    packed.append(pack_signs(pad(jnp.concatenate(signs, axis=1), lines)))
  flat = [
    jnp.broadcast_to(s, (chunks, *s.shape[1:])).reshape(chunks, -1)
    for s in scales
  ]
  bits = jax.lax.bitcast_convert_type(jnp.concatenate(flat, axis=1), jnp.uint32)
  bits = pad(bits, round_up(bits.shape[1], LANES)).reshape(chunks, -1, LANES)
  return jnp.concatenate([*packed, bits], axis=1)


def _decoded(
  layout: _Layout,
  message: UInt32[Array, "n words lanes"],
  scales: Sequence[Array],
) -> list[tuple[Bool[Array, "n r b l e"], Float[Array, "n r b"]]]:
  """By tensor, the signs that a message holds, and their scales.

  Args:
    layout: of the tensors.
    message: lines from each sender.
    scales: whatever has the senders' shapes of scales.
  """
  senders = message.shape[0]
  words = sum(group.words for group in layout.groups)
  sent = jax.lax.bitcast_convert_type(message[:, words:], jnp.float32)
  sent = sent.reshape(senders, -1)
  found, start = [], 0
  for scale in scales:
    size = math.prod(scale.shape[1:])
    part = sent[:, start : start + size]
    found.append(part.reshape(senders, *scale.shape[1:]))
    start += size
  positive = _positive(layout, message)
  return [(positive[i], scale) for i, scale in enumerate(_each(layout, found))]


def _positive(
  layout: _Layout, message: UInt32[Array, "n words lanes"]
) -> dict[int, Bool[Array, "n r b l e"]]:
  """By tensor, which of its signs are positive."""
  senders, lengths = message.shape[0], sign_lines(layout.grids)
  found, first = {}, 0
  for group in layout.groups:
    words = message[:, first : first + group.words]
    first += group.words
    grid = layout.grids[group.members[0]]
    if grid.alone:
      words = words.reshape(senders, -1, grid.lanes)
      positive = unpack_signs(words).reshape(senders, *grid.shape)
      found[group.members[0]] = positive
      continue
    positive, start = unpack_signs(words), 0
    for i in group.members:
      grid = layout.grids[i]
      part = positive[:, start : start + lengths[i]]
      if grid.lanes != LANES:
        part = part.reshape(senders, -1)[:, : grid.rows * grid.piece]
      found[i] = part.reshape(senders, *grid.shape)
      start += lengths[i]
  return found


def _signed(positive: Array, scale: Array) -> Array:
  """Scales, with the sign of each number."""
  scale = jnp.broadcast_to(scale, positive.shape)
  return jnp.where(positive, scale, -scale)


def _kept(x: Array, mask: Array | None) -> Array:
  """0 where nothing is sent."""
  return x if mask is None else jnp.where(mask, x, 0.0)


def _inside(grid: Grid, chunks: int, first: Any) -> Bool[Array, "n r b l e"]:
  """Which entries of these chunks are no padding.

  Args:
    grid: of the tensor.
    chunks: how many.
    first: index of the first one.
  """
  shape = (chunks, *grid.shape)
  index = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + first
  index *= grid.piece
  steps = {2: grid.lines * grid.lanes, 3: grid.lanes, 4: 1}
  for axis, step in steps.items():
    index += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * step
  return index < grid.length


def compressed_all_reduce(
  tensors: Sequence[Float[Array, "..."]],
  worker_errors: Sequence[Float[Array, "..."]] | None,
  server_errors: Sequence[Float[Array, "rows piece"]] | None,
  *,
  axis: str | None,
  compression: Compression = Compression(),  # noqa: B008 frozen
  stacked: Sequence[int] | None = None,
  masks: Sequence[Bool[Array, "..."] | None] | None = None,
  sum_axes: Sequence[tuple[str, ...]] | None = None,
) -> tuple[list[Array], list[Array] | None, list[Array] | None]:
  """The workers' average in one bit per number and direction, and new errors.

  It sends two integer arrays, one by all-to-all and one by all-gather, each
  with its scales as the last words. Every worker returns the same bits.

  Args:
    tensors: this worker's, float32.
    worker_errors: what this worker has not sent yet, shaped like `tensors`;
      None, together with `server_errors`, without error feedback.
    server_errors: what this worker has not sent yet of its own chunk:
      `[rows, piece]` of each tensor's `grid_of`.
    axis: mesh axis of the workers, inside `jax.shard_map`; None for a single
      worker outside of it.
    compression: scales.
    stacked: by tensor, how many leading axes only replicate layers.
    masks: by tensor, which entries are sent; the rest is 0 in the average and
      has no error. One bit cannot say zero, so mask what is always zero. All
      workers must have the same masks.
    sum_axes: by tensor, other manual mesh axes that shard it; magnitudes are
      summed over them, so that scales do not depend on that sharding (those of
      blocks and of granularity "shard" are of one shard anyway).

  Returns:
    The average, worker errors and server errors.

  Raises:
    ValueError: only one kind of error is given, or none with error feedback.
  """
  given = {worker_errors is not None, server_errors is not None}
  if given != {compression.error_feedback}:
    raise ValueError(
      f"error_feedback={compression.error_feedback}: give both worker_errors"
      " and server_errors with it, neither without."
    )
  workers = 1 if axis is None else jax.lax.axis_size(axis)
  layout = _Layout(
    compression,
    tuple(
      grid_of(x.shape, workers, compression, depth)
      for x, depth in zip(tensors, stacked or [0] * len(tensors))
    ),
    tuple(map(tuple, sum_axes or [()] * len(tensors))),
  )
  if not layout.groups:
    return list(tensors), worker_errors, server_errors
  masks = masks or [None] * len(tensors)
  own = tensors
  if worker_errors is not None:
    own = [x + e for x, e in zip(tensors, worker_errors)]
  own = [_kept(x, mask) for x, mask in zip(own, masks)]
  scales = _scales(
    layout,
    _sums(layout, [_size(layout, x) for x in own], workers),
    _counts(layout, masks, workers),
  )
  positive = [
    grid.split(settled(x >= 0), workers) for grid, x in zip(layout.grids, own)
  ]
  message = _message(layout, positive, scales)
  if axis is not None:
    message = jax.lax.all_to_all(message, axis, 0, 0, tiled=True)
  here = 0 if axis is None else jax.lax.axis_index(axis)
  message, server_errors = _served(
    layout, _decoded(layout, message, scales), server_errors, masks, here
  )
  if axis is not None:
    message = jax.lax.all_gather(message, axis, tiled=True)
  average = [
    _kept(_signed(grid.join(sign, x.shape), grid.spread(scale, x.shape)), mask)
    for grid, (sign, scale), mask, x in zip(
      layout.grids, _decoded(layout, message, scales), masks, tensors
    )
  ]
  if worker_errors is None:
    return average, None, None
  worker_errors = [
    _kept(x - _signed(x >= 0, grid.spread(scale, x.shape)), mask)
    for grid, x, scale, mask in zip(
      layout.grids, own, _each(layout, scales), masks
    )
  ]
  return average, worker_errors, server_errors


def _served(layout, received, server_errors, masks, here):
  """What a server answers, and what it has not sent then.

  Args:
    layout: of the tensors.
    received: by tensor, the workers' signs and scales in its chunk.
    server_errors: of its chunk, or None.
    masks: of the whole tensors.
    here: which chunk it is.
  """
  workers = len(received[0][0])

  def mine(grid, mask):
    if mask is None:
      return _inside(grid, 1, here)
    return jax.lax.dynamic_slice_in_dim(grid.split(mask, workers), here, 1)

  valid = [mine(grid, mask) for grid, mask in zip(layout.grids, masks)]
  chunk = [
    jnp.mean(_signed(sign, scale[..., None, None]), axis=0, keepdims=True)
    for sign, scale in received
  ]
  if server_errors is not None:
    chunk = [x + d.reshape(x.shape) for x, d in zip(chunk, server_errors)]
  chunk = [_kept(x, v) for x, v in zip(chunk, valid)]
  scales = _scales(
    layout,
    [jnp.sum(_size(layout, x), axis=(3, 4)) for x in chunk],
    [jnp.sum(v, axis=(3, 4), dtype=jnp.float32) for v in valid],
  )
  positive = [x >= 0 for x in chunk]
  message = _message(layout, positive, scales)
  if server_errors is None:
    return message, None
  left = [
    _kept(x - _signed(sign, scale[..., None, None]), v).reshape(old.shape)
    for x, sign, scale, v, old in zip(
      chunk, positive, _each(layout, scales), valid, server_errors
    )
  ]
  return message, left
