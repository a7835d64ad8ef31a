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
into n pieces of m / n, rounded up to whole lines of 128; chunk k is the k-th
piece of all of them, packed 32 signs to a word. Padding has no sign that
counts, no scale and no error. Numbers stay in lines from tensor to message:
pieces of odd lengths, one after the other, would be shifted across a TPU's
lanes, which takes its compiler minutes and the chip longer than the sending.

Reference: Tang et al. 2021, arXiv:2102.02888, algorithm 1 and figure 3.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped, UInt32

BITS = 32  # signs in a word
LANES = 128  # numbers in a line
# A TPU keeps eight lines in a register. Pieces of so many lines are rounded up
# to whole registers: an eighth longer at most.
REGISTER = 8
LONG = REGISTER * REGISTER
GRANULARITIES = ("buffer", "chunk", "tensor", "layer", "shard")
SCALES = ("l1", "rms")


@dataclasses.dataclass(frozen=True)
class Compression:
  """How numbers become signs and scales.

  Attributes:
    scale: "l1", the mean magnitude, which makes the error least; or "rms", as
      DeepSpeed has it.
    granularity: what shares a scale. "buffer": all numbers of a worker, and
      all of a server's chunk; "chunk": those of a chunk, on both sides;
      "tensor"; "layer": a layer of a scanned stack; "shard": what one device
      holds of a tensor, so that nothing is summed within a worker, but scales
      depend on how it is sharded; or an int: blocks of at most so many numbers.
    error_feedback: keep what was not sent; False is for ablations.
  """

  scale: str = "l1"
  granularity: str | int = "buffer"
  error_feedback: bool = True

  def __post_init__(self):
    if self.scale not in SCALES:
      raise ValueError(
        f"scale={self.scale!r} is unknown; choose from {', '.join(SCALES)}."
      )
    blocks = isinstance(self.granularity, int) and self.granularity is not True
    if blocks and self.granularity < 1:
      raise ValueError(
        f"granularity={self.granularity}: blocks have at least one number."
      )
    if not blocks and self.granularity not in GRANULARITIES:
      raise ValueError(
        f"granularity={self.granularity!r} is unknown; choose from"
        f" {', '.join(GRANULARITIES)}, or an int for blocks."
      )

  @property
  def by_block(self) -> bool:
    """Whether granularity is a size of blocks."""
    return isinstance(self.granularity, int)


class Grid(NamedTuple):
  """How a tensor divides: `[chunks, rows, blocks, lines, lanes]`, padded.

  Attributes:
    rows: layers with scales of their own, else 1.
    length: numbers in a row.
    blocks: of a row's piece in one chunk.
    lines: of a block.
    lanes: numbers in a line.
  """

  rows: int
  length: int
  blocks: int
  lines: int
  lanes: int

  @property
  def piece(self) -> int:
    """Numbers of a row in one chunk, padding included."""
    return self.blocks * self.lines * self.lanes

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """Of one chunk."""
    return self.rows, self.blocks, self.lines, self.lanes

  def split(self, x: Array, chunks: int) -> Array:
    """`[...]` -> `[chunks, rows, blocks, lines, lanes]`, padded with zeros."""
    lines = -(-self.length // self.lanes)
    x = _pad(x.reshape(self.rows, self.length), lines * self.lanes)
    x = x.reshape(self.rows, lines, self.lanes)
    x = _pad(x, chunks * self.blocks * self.lines)
    x = x.reshape(self.rows, chunks, *self.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  def join(self, x: Array, shape: Sequence[int]) -> Array:
    """The inverse of `split`."""
    x = jnp.swapaxes(x, 0, 1).reshape(self.rows, -1, self.lanes)
    x = x[:, : -(-self.length // self.lanes)].reshape(self.rows, -1)
    return x[:, : self.length].reshape(shape)


def _pad(x: Array, length: int) -> Array:
  """Zeros at the end of axis 1, up to a length."""
  if x.shape[1] == length:
    return x
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, length - x.shape[1])
  return jnp.pad(x, widths)


def _up(n: int, unit: int) -> int:
  return -(-n // unit) * unit


def grid_of(
  shape: Sequence[int], chunks: int, compression: Compression, stacked: int = 0
) -> Grid:
  """How a tensor of this shape divides into chunks.

  Args:
    shape: of the tensor, on one device.
    chunks: number of workers.
    compression: its granularity counts.
    stacked: leading axes that only replicate layers.
  """
  size = math.prod(shape)
  rows = 1
  if compression.granularity == "layer" and size:
    rows = math.prod(shape[:stacked])
  length = size // rows
  piece = max(1, -(-length // chunks))
  if not compression.by_block:
    lines = -(-piece // LANES)
    if lines >= LONG:
      lines = _up(lines, REGISTER)
    return Grid(rows, length, 1, lines, LANES)
  blocks = -(-piece // compression.granularity)
  return Grid(rows, length, blocks, 1, -(-piece // blocks))


def pack_signs(
  positive: Bool[Array, "n lines lanes"],
) -> UInt32[Array, "n words lanes"]:
  """32 signs to a word, of 32 lines; the i-th of them is bit i.

  The lines of a word stand as far apart as there are words: no step works
  across lanes or neighbouring lines.
  """
  lines = _up(positive.shape[1], BITS)
  bits = _pad(positive, lines).astype(jnp.uint32)
  bits = bits.reshape(bits.shape[0], BITS, -1, bits.shape[2])
  return jnp.sum(bits << _shifts(), axis=1, dtype=jnp.uint32)


def unpack_signs(
  words: UInt32[Array, "n words lanes"],
) -> Bool[Array, "n lines lanes"]:
  """The signs that `pack_signs` packed, padding included: is it positive?"""
  bits = (words[:, None] >> _shifts()) & jnp.uint32(1)
  bits = bits.reshape(words.shape[0], -1, words.shape[2])
  return bits.astype(bool)


def _shifts() -> UInt32[Array, "1 b 1 1"]:
  return jnp.arange(BITS, dtype=jnp.uint32)[None, :, None, None]


def in_lines(x: Shaped[Array, "n ..."]) -> Shaped[Array, "n lines lanes"]:
  """Lines of LANES, the last one padded."""
  if x.shape[-1] != LANES:
    x = x.reshape(x.shape[0], -1)
    x = _pad(x, _up(x.shape[1], LANES))
  return x.reshape(x.shape[0], -1, LANES)


def sign_lines(grids: Iterable[Grid]) -> list[int]:
  """By tensor, lines of LANES that its signs take in a chunk."""
  return [-(-grid.rows * grid.piece // LANES) for grid in grids]


class Group(NamedTuple):
  """Tensors whose signs are packed together.

  Attributes:
    members: which.
    lines: of their signs in a chunk, padding included.
  """

  members: list[int]
  lines: int

  @property
  def words(self) -> int:
    """Lines of words."""
    return self.lines // BITS


def groups_of(grids: Sequence[Grid]) -> list[Group]:
  """Tensors in whole registers, and the rest, which would misalign them."""
  lines = sign_lines(grids)
  whole = [i for i, n in enumerate(lines) if n % REGISTER == 0]
  rest = [i for i, n in enumerate(lines) if n % REGISTER]
  found = []
  for members in (whole, rest):
    total = sum(lines[i] for i in members)
    # Words in whole registers, too, where that adds less than 1 / LONG.
    unit = BITS * REGISTER
    unit = unit if total >= unit * LONG else BITS
    if total:
      found.append(Group(members, _up(total, unit)))
  return found


class _Layout(NamedTuple):
  """Everything about a set of tensors that is known before they are."""

  compression: Compression
  grids: tuple[Grid, ...]
  # By tensor: mesh axes over which its sums are completed.
  sum_axes: tuple[tuple[str, ...], ...]

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
  values: Sequence[Float[Array, "n r b l e"]],
  valid: Sequence[Bool[Array, "n r b l e"]],
) -> list[Float[Array, "..."]]:
  """Scales, broadcastable against the tensors' `[n, rows, blocks]`."""
  rms = layout.compression.scale == "rms"
  size = jnp.square if rms else jnp.abs
  sums = _pooled(layout, [jnp.sum(size(x), axis=(3, 4)) for x in values])
  counts = _pooled(
    layout, [jnp.sum(v, axis=(3, 4), dtype=jnp.float32) for v in valid]
  )
  means = [s / jnp.maximum(c, 1.0) for s, c in zip(sums, counts)]
  return [jnp.sqrt(m) for m in means] if rms else means


def _message(
  layout: _Layout,
  values: Sequence[Float[Array, "n r b l e"]],
  scales: Sequence[Float[Array, "..."]],
) -> UInt32[Array, "n words lanes"]:
  """Signs, then the bits of the scales: lines for each chunk."""
  chunks = values[0].shape[0]
  packed = []
  for members, lines in layout.groups:
    signs = [in_lines(values[i] >= 0) for i in members]
    packed.append(pack_signs(_pad(jnp.concatenate(signs, axis=1), lines)))
  flat = [
    jnp.broadcast_to(s, (chunks, *s.shape[1:])).reshape(chunks, -1)
    for s in scales
  ]
  bits = jax.lax.bitcast_convert_type(jnp.concatenate(flat, axis=1), jnp.uint32)
  bits = _pad(bits, _up(bits.shape[1], LANES)).reshape(chunks, -1, LANES)
  return jnp.concatenate([*packed, bits], axis=1)


def _decoded(
  layout: _Layout,
  message: UInt32[Array, "n words lanes"],
  scales: Sequence[Array],
) -> list[Float[Array, "n r b l e"]]:
  """The numbers that a message stands for.

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
  if len(found) == 1:
    found *= len(layout.grids)
  positive = _positive(layout, message)
  return [_signed(positive[i], scale) for i, scale in enumerate(found)]


def _positive(
  layout: _Layout, message: UInt32[Array, "n words lanes"]
) -> dict[int, Bool[Array, "n r b l e"]]:
  """By tensor, which of its signs are positive."""
  senders, lengths = message.shape[0], sign_lines(layout.grids)
  found, first = {}, 0
  for group in layout.groups:
    words = message[:, first : first + group.words]
    positive, start = unpack_signs(words), 0
    first += group.words
    for i in group.members:
      grid = layout.grids[i]
      part = positive[:, start : start + lengths[i]]
      if grid.lanes != LANES:
        part = part.reshape(senders, -1)[:, : grid.rows * grid.piece]
      found[i] = part.reshape(senders, *grid.shape)
      start += lengths[i]
  return found


def _signed(positive: Array, scale: Array) -> Array:
  """The scale of each block, `[n, r, b]`, with the sign of each number."""
  scale = jnp.broadcast_to(scale[..., None, None], positive.shape)
  return jnp.where(positive, scale, -scale)


def _residuals(values, scales, valid):
  """What is lost of the values when they are sent."""
  if len(scales) == 1:
    scales = list(scales) * len(values)
  return [
    jnp.where(v, x - _signed(x >= 0, s), 0.0)
    for x, s, v in zip(values, scales, valid)
  ]


def _valid(layout: _Layout, chunks: int, masks: Sequence[Array | None]):
  """By tensor, which entries of its grid are numbers that are sent."""

  def one(grid, mask):
    if mask is not None:
      return grid.split(mask, chunks)
    shape = (chunks, *grid.shape)
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * grid.piece
    steps = {2: grid.lines * grid.lanes, 3: grid.lanes, 4: 1}
    for axis, step in steps.items():
      index += jax.lax.broadcasted_iota(jnp.int32, shape, axis) * step
    return index < grid.length

  return [one(grid, mask) for grid, mask in zip(layout.grids, masks)]


def compressed_all_reduce(
  tensors: Sequence[Float[Array, "..."]],
  worker_errors: Sequence[Float[Array, "..."]] | None,
  server_errors: Sequence[Float[Array, "rows piece"]] | None,
  *,
  axis: str | None,
  compression: Compression = Compression(),
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
  none = [None] * len(tensors)
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
  valid = _valid(layout, workers, masks or none)

  own = tensors
  if worker_errors is not None:
    own = [x + e for x, e in zip(tensors, worker_errors)]
  own = [
    jnp.where(v, grid.split(x, workers), 0.0)
    for grid, x, v in zip(layout.grids, own, valid)
  ]
  scales = _scales(layout, own, valid)
  message = _message(layout, own, scales)
  if axis is not None:
    message = jax.lax.all_to_all(message, axis, 0, 0, tiled=True)
  received = _decoded(layout, message, scales)

  here = 0 if axis is None else jax.lax.axis_index(axis)
  mine = [jax.lax.dynamic_slice_in_dim(v, here, 1) for v in valid]
  chunk = [jnp.sum(x, axis=0, keepdims=True) / workers for x in received]
  if server_errors is not None:
    chunk = [x + d.reshape(x.shape) for x, d in zip(chunk, server_errors)]
  chunk = [jnp.where(v, x, 0.0) for x, v in zip(chunk, mine)]
  averaged = _scales(layout, chunk, mine)
  message = _message(layout, chunk, averaged)
  if axis is not None:
    message = jax.lax.all_gather(message, axis, tiled=True)
  average = [
    grid.join(jnp.where(v, x, 0.0), tensor.shape)
    for grid, x, v, tensor in zip(
      layout.grids, _decoded(layout, message, averaged), valid, tensors
    )
  ]
  if worker_errors is None:
    return average, None, None
  worker_errors = [
    grid.join(e, tensor.shape)
    for grid, e, tensor in zip(
      layout.grids, _residuals(own, scales, valid), tensors
    )
  ]
  server_errors = [
    e.reshape(old.shape)
    for e, old in zip(_residuals(chunk, averaged, mine), server_errors)
  ]
  return average, worker_errors, server_errors
