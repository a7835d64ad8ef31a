"""Tile by tile in plain XLA: every option, any platform, linear memory.

The list of active tiles is walked by one loop per pass. A step holds the tile
(b0, h0, i, j) of one or all heads and examples, whichever fills the cache best.
The backward pass recomputes the tile's probabilities from lse and does all five
products at once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.flash_attention import blockwise_relative, dropout
from kernels.flash_attention.backend import Gradients, delta
from kernels.flash_attention.block_mask import active_list, tile_map
from kernels.flash_attention.capabilities import Capabilities
from kernels.flash_attention.grouped import join, product, split
from kernels.flash_attention.layouts import Sizes, relayout, sizes
from kernels.flash_attention.options import (
  Extras,
  Options,
  block_size,
  cap,
  same_segment,
  visible_by_position,
)
from kernels.flash_attention.relative import Relative, lay, unlay

# Measured on two AVX-512 cores: 512 x 512 is the fastest tile from length 512
# on, and a step of up to 4 MB of scores beats a larger or a very small one.
# Without a loop XLA fuses more, which wins up to 16 MB of scores; where they
# are of at most SHORT positions, still at 128 MB (forward and backward take 0.7
# to 0.9 of the loop's time).
TILE = 512
SHORT = 256
STEP_ELEMENTS = 2**20
UNLOOPED_ELEMENTS = 2**22
UNLOOPED_SHORT_ELEMENTS = 2**25

# Where a maximum begins: exp(-inf - _LOWEST) = 0, exp(-inf + inf) is NaN.
_LOWEST = np.finfo(np.float32).min

CAPABILITIES = Capabilities("blockwise")


class _Plan(NamedTuple):
  """How the pairs of positions are cut."""

  n: Sizes
  rows: int  # positions of a tile
  columns: int
  examples: int  # of a step
  heads: int  # of a step: all or one
  padded_t: int
  padded_s: int

  @property
  def at_once(self) -> bool:
    """Whether one step holds everything, and no head is shared."""
    n, step = self.n, (self.examples, self.heads, self.rows, self.columns)
    return step == (n.b, n.h, n.t, n.s) and n.kv_heads == n.h

  @property
  def diagonals(self) -> tuple:
    """Arguments of `relative.lay`."""
    padded = self.padded_t, self.padded_s
    return (self.n.t, self.n.s), padded, blockwise_relative.BY_KEY


def _even(length: int, block: int | None) -> int:
  """A tile of at most TILE positions that wastes little on the last one."""
  if block is not None:
    return max(x for x in range(1, min(block, TILE) + 1) if block % x == 0)
  parts = math.ceil(length / TILE)
  tile = math.ceil(length / parts)
  return tile if parts == 1 else math.ceil(tile / 8) * 8


def _plan(q, k, v, extras, options) -> _Plan:
  n = sizes(q, k, v, options.layout)
  blocks = (None, None)
  if extras.block_mask is not None:
    blocks = tuple(
      None if count == 1 else size
      for count, size in zip(
        extras.block_mask.shape[1:], block_size(extras, options, n.t, n.s)
      )
    )
  rows, columns = options.tiles or map(_even, (n.t, n.s), blocks)
  heads_differ = (
    extras.block_mask is not None and extras.block_mask.shape[0] > 1
  )
  one_tile = rows >= n.t and columns >= n.s
  short = max(n.t, n.s) <= SHORT
  unlooped_most = UNLOOPED_SHORT_ELEMENTS if short else UNLOOPED_ELEMENTS
  for examples, heads in ((n.b, n.h), (1, n.h), (1, 1)):
    unlooped = one_tile and examples == n.b
    most = unlooped_most if unlooped else STEP_ELEMENTS
    fits = examples * heads * rows * columns <= most
    if fits and not (heads_differ and heads > 1):
      break
  padded = (
    math.ceil(n.t / rows) * rows,
    math.ceil(n.s / columns) * columns,
  )
  return _Plan(n, rows, columns, examples, heads, *padded)


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
  if x.shape[axis] == length:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths)


class _Operands(NamedTuple):
  """Everything a step reads, heads before positions, padded to tiles."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  extras: Extras


def _operands(q, k, v, extras: Extras, options: Options, plan: _Plan):
  def prepare(x, length):
    return _pad(relayout(x, options.layout, "bhtd"), 2, length)

  bias, slopes = extras.bias, extras.alibi_slopes
  if bias is not None:
    bias = _pad(bias, 3, plan.padded_s)
    bias = bias if bias.shape[2] == 1 else _pad(bias, 2, plan.padded_t)
  if slopes is not None:
    slopes = slopes.astype(jnp.float32).reshape(-1, plan.n.h)
  q_ids, kv_ids = extras.q_segments, extras.kv_segments
  if q_ids is not None:
    q_ids = _pad(q_ids, 1, plan.padded_t)
    kv_ids = _pad(kv_ids, 1, plan.padded_s)
  relative = extras.relative
  if relative is not None:
    relative = lay(relative, *plan.diagonals)
  return _Operands(
    prepare(q, plan.padded_t),
    prepare(k, plan.padded_s),
    prepare(v, plan.padded_s),
    extras._replace(
      bias=bias,
      alibi_slopes=slopes,
      relative=relative,
      q_segments=q_ids,
      kv_segments=kv_ids,
    ),
  )


class _Step(NamedTuple):
  """First example, head, row tile and column tile of a step."""

  b: jax.Array
  h: jax.Array
  i: jax.Array
  j: jax.Array

  def window(self, x: jax.Array, plan: _Plan, tiles: str):
    """Start and shape of a tile of x [1|b, 1|heads, ...].

    `tiles` tells the other axes: i rows, j columns, "-" whole; r the entries of
    the tile's diagonals, by key minus query, R by query minus key. An axis of
    size 1 is broadcast; heads of keys are shared by `h / kv_heads` queries'
    heads.
    """
    n, starts, shape = plan.n, [], []
    row, column = self.i * plan.rows, self.j * plan.columns
    diagonals = plan.rows + plan.columns
    places = {
      "b": (self.b, plan.examples),
      "i": (row, plan.rows),
      "j": (column, plan.columns),
      "r": (plan.padded_t - plan.rows + column - row, diagonals),
      "R": (plan.padded_s - plan.columns + row - column, diagonals),
    }
    for axis, size in enumerate(x.shape):
      letter = ("b", "h", *tiles)[axis]
      if size == 1 or letter == "-":
        start, extent = 0, size
      elif letter == "h":
        share = n.h // size
        start, extent = self.h // share, max(1, plan.heads // share)
      else:
        start, extent = places[letter]
      starts.append(jnp.asarray(start, jnp.int32))
      shape.append(extent)
    return starts, shape

  def read(self, x: jax.Array, plan: _Plan, tiles: str) -> jax.Array:
    return jax.lax.dynamic_slice(x, *self.window(x, plan, tiles))

  def add(self, x: jax.Array, y: jax.Array, plan: _Plan, tiles: str):
    """x with y added to the tile; y is summed over what x broadcasts."""
    starts, shape = self.window(x, plan, tiles)
    summed = [a for a, (m, k) in enumerate(zip(y.shape, shape)) if k < m]
    y = y.sum(summed, keepdims=True)
    old = jax.lax.dynamic_slice(x, starts, shape)
    return jax.lax.dynamic_update_slice(x, old + y.astype(x.dtype), starts)

  def read_entries(self, x: Relative, plan: _Plan) -> Relative:
    """The entries of the tile's diagonals."""
    axes = blockwise_relative.AXES
    return x.map(lambda y, tiles: self.read(y, plan, tiles), axes)

  def add_entries(self, x: Relative, y: Relative, plan: _Plan) -> Relative:
    """x with y added to the entries of the tile's diagonals."""
    axes = blockwise_relative.AXES
    return x.map(lambda y, z, tiles: self.add(y, z, plan, tiles), y, axes)

  def write(self, x: jax.Array, y: jax.Array, plan: _Plan, tiles: str):
    return jax.lax.dynamic_update_slice(x, y, self.window(x, plan, tiles)[0])


_FIRST = _Step(*np.zeros(4, np.int32))


class _Tile(NamedTuple):
  """What both passes compute of a step.

  Attributes:
    q, k, v: the operands' tiles.
    scores: capped scores [examples, heads, rows, columns], -inf where hidden.
    entries: of the tile's diagonals, or None.
    distance: |row - column|, or None without ALiBi.
    keep: which weights dropout keeps, or None.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  scores: jax.Array
  entries: Relative | None
  distance: jax.Array | None
  keep: jax.Array | None


def _tile(x: _Operands, step: _Step, options: Options, plan: _Plan) -> _Tile:
  q = step.read(x.q, plan, "i-")
  k, v = (step.read(y, plan, "j-") for y in (x.k, x.v))
  products = join(product("bkrtd,bksd->bkrts", split(q, k.shape[1]), k))
  scores = products * options.scale
  return _scored(scores, _Operands(q, k, v, x.extras), step, options, plan)


def _scored(
  scores: jax.Array,
  x: _Operands,
  step: _Step,
  options: Options,
  plan: _Plan,
) -> _Tile:
  """The tile of a step from its scaled products of queries with keys.

  Args:
    scores: [examples, heads, rows, columns].
    x: the step's own q, k, v, and the extras of all.
    step: which.
    options: static choices.
    plan: how the pairs are cut.
  """
  n, extras = plan.n, x.extras
  row = (step.i * plan.rows + jnp.arange(plan.rows))[:, None]
  column = (step.j * plan.columns + jnp.arange(plan.columns))[None]
  offset = n.s - n.t if extras.offset is None else extras.offset
  if extras.bias is not None:
    scores += step.read(extras.bias, plan, "ij")
  distance = None
  if extras.alibi_slopes is not None:
    distance = jnp.abs(row + offset - column).astype(jnp.float32)[None, None]
    slopes = step.read(extras.alibi_slopes, plan, "")
    scores -= slopes[..., None, None] * distance
  entries = None
  if extras.relative is not None:
    entries = step.read_entries(extras.relative, plan)
    scores += blockwise_relative.scores(x.q, x.k, entries, options.scale)
  scores = cap(scores, options.softcap)
  hidden = _hidden(x, step, options, plan, row, column, offset)
  if hidden is not None:
    # A sum, and made once: a choice is worked out again for every head.
    scores += jax.lax.optimization_barrier(jnp.where(hidden, -jnp.inf, 0.0))
  keep = None
  if options.dropout_rate:
    words = dropout.row_words(
      extras.seed,
      (step.b + jnp.arange(plan.examples)).reshape(-1, 1, 1, 1),
      (step.h + jnp.arange(plan.heads)).reshape(1, -1, 1, 1),
      row[None, None],
    )
    columns = dropout.column_word(extras.seed, column[None, None])
    keep = dropout.keep(words, columns, options.dropout_rate)
  return _Tile(x.q, x.k, x.v, scores, entries, distance, keep)


def _hidden(x, step, options, plan, row, column, offset):
  """Which scores of the tile no query sees, broadcastable, or None."""
  shown = []
  by_position = visible_by_position(row + offset, column, options)
  if by_position is not None:
    shown.append(by_position[None, None])
  if x.extras.q_segments is not None:
    q_ids = step.read(x.extras.q_segments[:, None], plan, "i")
    kv_ids = step.read(x.extras.kv_segments[:, None], plan, "j")
    shown.append(same_segment(q_ids[..., None], kv_ids[:, :, None]))
  elif plan.padded_s > plan.n.s:
    shown.append((column < plan.n.s)[None, None])
  if not shown:
    return None
  return ~functools.reduce(jnp.logical_and, shown)


def _loop(body, init, extras: Extras, options: Options, plan: _Plan):
  """Runs `body(step, carry)` over all active tiles of all heads, examples."""
  n = plan.n
  active = tile_map(n, extras, options, plan.rows, plan.columns).active
  if plan.heads == 1:
    xp = np if isinstance(active, np.ndarray) else jnp
    active = xp.broadcast_to(active, (n.h, *active.shape[1:]))
  tiles, count = active_list(active)
  tiles = jnp.asarray(tiles)

  def at(turn, carry):
    h, i, j = tiles[turn % count]
    return body(_Step(turn // count * plan.examples, h, i, j), carry)

  turns = n.b // plan.examples * count
  if isinstance(turns, int) and turns <= 1:
    return at(0, init) if turns else init
  return jax.lax.fori_loop(0, turns, at, init)


def forward(
  q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Output and lse, by running maxima and sums per row."""
  plan = _plan(q, k, v, extras, options)
  n = plan.n
  if plan.at_once and extras.block_mask is None:  # `_loop` is what reads one
    return _forward_at_once(q, k, v, extras, options, plan)
  x = _operands(q, k, v, extras, options, plan)

  def body(step, carry):
    out, top, total = carry
    tile = _tile(x, step, options, plan)
    old_out = step.read(out, plan, "i-")
    old_top, old_total = (step.read(y, plan, "i") for y in (top, total))
    new_top = jnp.maximum(old_top, tile.scores.max(-1))
    weights = jnp.exp(tile.scores - new_top[..., None])
    shrink = jnp.exp(old_top - new_top)
    new_total = old_total * shrink + weights.sum(-1)
    if tile.keep is not None:
      weights = jnp.where(tile.keep, weights, 0.0)
    weights = split(weights.astype(v.dtype), tile.v.shape[1])
    fresh = join(product("bkrts,bksd->bkrtd", weights, tile.v))
    return (
      step.write(out, old_out * shrink[..., None] + fresh, plan, "i-"),
      step.write(top, new_top, plan, "i"),
      step.write(total, new_total, plan, "i"),
    )

  shape = (n.b, n.h, plan.padded_t)
  init = (
    jnp.zeros((*shape, n.dv), jnp.float32),
    jnp.full(shape, _LOWEST, jnp.float32),
    jnp.zeros(shape, jnp.float32),
  )
  out, top, total = (
    y[:, :, : n.t] for y in _loop(body, init, extras, options, plan)
  )
  return _normalized(out, top, total, v.dtype, options)


def _normalized(
  out: jax.Array, top: jax.Array, total: jax.Array, dtype, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Output, in the layout of the options, and lse.

  Args:
    out: sums of weighted values [b, h, t, dv], float32.
    top: largest score of each row [b, h, t].
    total: sum of the row's weights, those that dropout took included: at least
      1, or 0 where nothing is seen.
    dtype: of the output.
    options: static choices.
  """
  lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
  out /= (jnp.maximum(total, 1.0) * (1.0 - options.dropout_rate))[..., None]
  return relayout(out.astype(dtype), "bhtd", options.layout), lse


def _forward_at_once(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
  plan: _Plan,
) -> tuple[jax.Array, jax.Array]:
  """`forward` of a plan of one step, whose operands stay where they are.

  Laid out anew before the products they take XLA's CPU backend up to twice as
  long altogether.
  """
  x = _operands(q, k, v, extras, options, plan)
  queries = options.layout
  keys = queries.replace("t", "s")
  # A power of two changes no digit of q, and scores are many more numbers.
  exact = math.frexp(options.scale)[0] == 0.5
  scores = product(
    f"{queries},{keys}->bhts", q * options.scale if exact else q, k
  )
  if not exact:
    scores *= options.scale
  tile = _scored(scores, x, _FIRST, options, plan)
  top = tile.scores.max(-1, initial=_LOWEST)
  weights = jnp.exp(tile.scores - top[..., None])
  total = weights.sum(-1)
  if tile.keep is not None:
    weights = jnp.where(tile.keep, weights, 0.0)
  out = product(f"bhts,{keys}->bhtd", weights.astype(v.dtype), v)
  return _normalized(out, top, total, v.dtype, options)


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> Gradients:
  """All gradients in one walk over the tiles, accumulated in float32."""
  plan = _plan(q, k, v, extras, options)
  x = _operands(q, k, v, extras, options, plan)
  # exp(score - lse) = 0 where nothing is seen, and for queries that pad.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  padding = ((0, 0), (0, 0), (0, plan.padded_t - plan.n.t))
  lse = jnp.pad(lse, padding, constant_values=jnp.inf)
  rest = _pad(delta(out, dout, dlse, options.layout), 2, plan.padded_t)
  dout = _pad(relayout(dout, options.layout, "bhtd"), 2, plan.padded_t)
  dout = dout.astype(v.dtype)
  share = 1.0 / (1.0 - options.dropout_rate)

  def body(step, grads):
    tile = _tile(x, step, options, plan)
    heads = tile.k.shape[1]
    do = split(step.read(dout, plan, "i-"), heads)
    weights = jnp.exp(tile.scores - step.read(lse, plan, "i")[..., None])
    dweights = join(product("bkrtd,bksd->bkrts", do, tile.v))
    used = weights
    if tile.keep is not None:
      used = jnp.where(tile.keep, weights * share, 0.0)
      dweights = jnp.where(tile.keep, dweights * share, 0.0)
    ds = weights * (dweights - step.read(rest, plan, "i")[..., None])
    if options.softcap is not None:
      finite = jnp.where(weights > 0, tile.scores, 0.0)
      ds *= 1.0 - (finite / options.softcap) ** 2
    dbias, dslopes = grads.bias, grads.alibi_slopes
    if dbias is not None:
      dbias = step.add(dbias, ds, plan, "ij")
    if dslopes is not None:
      fall = -(ds * tile.distance).sum((2, 3))
      dslopes = step.add(dslopes, fall, plan, "")
    drelative, more_dq, more_dk = grads.relative, 0.0, 0.0
    if drelative is not None:
      more_dq, more_dk, entries = blockwise_relative.gradients(
        tile.q, tile.k, tile.entries, ds
      )
      drelative = step.add_entries(drelative, entries, plan)
    ds = split(ds.astype(q.dtype), heads)
    used = split(used.astype(v.dtype), heads)
    dq = join(product("bkrts,bksd->bkrtd", ds, tile.k))
    dk = product("bkrts,bkrtd->bksd", ds, split(tile.q, heads))
    dv = product("bkrts,bkrtd->bksd", used, do)
    return Gradients(
      step.add(grads.q, dq + more_dq, plan, "i-"),
      step.add(grads.k, dk + more_dk, plan, "j-"),
      step.add(grads.v, dv, plan, "j-"),
      dbias,
      dslopes,
      drelative,
    )

  inputs = x.extras.bias, x.extras.alibi_slopes, x.extras.relative
  init = jax.tree.map(
    lambda y: jnp.zeros(y.shape, jnp.float32),
    Gradients(x.q, x.k, x.v, *inputs),
  )
  grads = _loop(body, init, extras, options, plan)
  return _trim(grads, q, k, v, extras, options, plan)


def _trim(grads: Gradients, q, k, v, extras, options, plan) -> Gradients:
  """Gradients in the shapes, layouts and dtypes of the inputs."""

  def like(x, y, factor=1.0):
    length = y.shape[options.layout.index("t")]
    x = relayout((x * factor)[:, :, :length], "bhtd", options.layout)
    return x.astype(y.dtype)

  bias, slopes = extras.bias, extras.alibi_slopes
  if bias is not None:
    _, _, t, s = bias.shape
    bias = grads.bias[:, :, :t, :s].astype(bias.dtype)
  if slopes is not None:
    slopes = grads.alibi_slopes.reshape(slopes.shape).astype(slopes.dtype)
  relative = extras.relative
  if relative is not None:
    relative = relative.map(
      lambda y, x, scale: (x * scale).astype(y.dtype),
      unlay(grads.relative, *plan.diagonals),
      Relative(1.0, options.scale, options.scale),
    )
  return Gradients(
    like(grads.q, q, options.scale),
    like(grads.k, k, options.scale),
    like(grads.v, v),
    bias,
    slopes,
    relative,
  )
