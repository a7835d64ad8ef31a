"""The bodies of the Triton kernels: one tile against a loop over others.

All of them see whole arrays, of which Triton makes bare pointers, and load
tiles of (rows of queries) x (columns of keys), masked where an array ends.
Scores are in base 2: exp2 is the hardware's exponential.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.flash_attention import dropout
from kernels.flash_attention.layouts import Sizes
from kernels.flash_attention.options import (
  Options,
  cap,
  same_segment,
  visible_by_position,
)

LOG2E = math.log2(math.e)
Refs = Mapping[str, Any]


class Problem(NamedTuple):
  """What is static in a kernel.

  Attributes:
    n: sizes.
    options: layout is "bthd" or "bhtd".
    rows: queries of a tile, a power of two.
    columns: keys of a tile, a power of two.
    d: width of q and k, padded to a power of two.
    dv: likewise of v.
  """

  n: Sizes
  options: Options
  rows: int
  columns: int
  d: int
  dv: int

  @property
  def row_tiles(self) -> int:
    return math.ceil(self.n.t / self.rows)

  @property
  def column_tiles(self) -> int:
    return math.ceil(self.n.s / self.columns)

  @property
  def share(self) -> int:
    """Heads of queries per head of keys."""
    return self.n.h // self.n.kv_heads


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """a @ b in float32; TF32 would keep 10 bits of float32 inputs."""
  return jnp.dot(
    a,
    b,
    precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def _inside(index, size: int, length: int, shape) -> jax.Array | None:
  """Mask of the indices that exist, or None if all do."""
  if length % size == 0:
    return None
  return jnp.broadcast_to(index < length, shape)


def _both(a, b):
  if a is None or b is None:
    return b if a is None else a
  return a & b


def _first() -> jax.Array:
  """Index 0; the interpreter's loads take no Python integer."""
  return jnp.zeros((), jnp.int32)


def _load(at, mask, other) -> jax.Array:
  return plgpu.load(at, mask=mask, other=None if mask is None else other)


class _Block(NamedTuple):
  """A tile [size, padded width] of q, k, v or alike at a head and a start."""

  at: Any
  mask: jax.Array | None

  def load(self) -> jax.Array:
    return plgpu.load(
      self.at, mask=self.mask, other=None if self.mask is None else 0.0
    )

  def store(self, x: jax.Array) -> None:
    plgpu.store(self.at, x.astype(self.at.dtype), mask=self.mask)


def _block(ref, p: Problem, side: str, b, head, tile, width: int) -> _Block:
  """`side` is "t" for arrays like q, "s" for those like k."""
  size, length = (p.rows, p.n.t) if side == "t" else (p.columns, p.n.s)
  span = pl.ds(tile * size, size)
  if p.options.layout == "bthd":
    at = ref.at[b, span, head, :]
  else:
    at = ref.at[b, head, span, :]
  padded = at.shape[-1]
  index = (tile * size + jnp.arange(size))[:, None]
  mask = _inside(index, size, length, (size, padded))
  columns = jnp.arange(padded)[None]
  mask = _both(mask, _inside(columns, padded, width, (size, padded)))
  return _Block(at, mask)


def _vector(ref, p: Problem, side: str, lead, tile, other) -> jax.Array:
  """A tile of a vector over queries or keys."""
  size, length = (p.rows, p.n.t) if side == "t" else (p.columns, p.n.s)
  index = tile * size + jnp.arange(size)
  mask = _inside(index, size, length, (size,))
  at = ref.at[(*lead, pl.ds(tile * size, size))]
  return _load(at, mask, other)


class _Scores(NamedTuple):
  """Base-2 scores of a tile and what its derivative needs.

  Attributes:
    value: [rows, columns], -inf where hidden.
    distance: |row - column| or None.
    slope: derivative of the cap, or None.
  """

  value: jax.Array
  distance: jax.Array | None
  slope: jax.Array | None


def _scores(refs: Refs, p: Problem, b, h, i, j, q, k) -> _Scores:
  options, n = p.options, p.n
  # A cap works on natural scores, all else may be scaled beforehand.
  unit = LOG2E if options.softcap is None else 1.0
  value = _dot(q, k.T) * (options.scale * unit)
  offset = refs["offset"][0] if "offset" in refs else n.s - n.t
  row = (i * p.rows + jnp.arange(p.rows))[:, None]
  column = (j * p.columns + jnp.arange(p.columns))[None]
  if "bias" in refs:
    value += _bias(refs["bias"], p, b, h, i, j) * unit
  distance = slope = None
  if "slopes" in refs:
    distance = jnp.abs(row + offset - column).astype(jnp.float32)
    example = b if refs["slopes"].shape[0] > 1 else 0
    value -= refs["slopes"][example, h] * unit * distance
  if options.softcap is not None:
    value = cap(value, options.softcap)
    slope = 1.0 - (value * (1 / options.softcap)) ** 2
    value *= LOG2E
  shown = _inside(column, p.columns, n.s, (p.rows, p.columns))
  shown = _both(shown, visible_by_position(row + offset, column, options))
  if "q_ids" in refs:
    q_ids = _vector(refs["q_ids"], p, "t", (b,), i, 0)
    kv_ids = _vector(refs["kv_ids"], p, "s", (b,), j, 0)
    shown = _both(shown, same_segment(q_ids[:, None], kv_ids[None]))
  if shown is not None:
    value = jnp.where(shown, value, -jnp.inf)
  return _Scores(value, distance, slope)


def _bias(ref, p: Problem, b, h, i, j) -> jax.Array:
  """The bias of a tile, float32 [1|rows, columns]."""
  b = b if ref.shape[0] > 1 else _first()
  h = h if ref.shape[1] > 1 else _first()
  column = j * p.columns + jnp.arange(p.columns)
  columns = pl.ds(j * p.columns, p.columns)
  if (p.n.t > 1 and ref.shape[2] == 1) or p.n.t == 1:
    at, shape = ref.at[b, h, _first(), columns], (p.columns,)
    mask = _inside(column, p.columns, p.n.s, shape)
  else:
    at, shape = ref.at[b, h, pl.ds(i * p.rows, p.rows), columns], None
    shape = (p.rows, p.columns)
    row = (i * p.rows + jnp.arange(p.rows))[:, None]
    mask = _inside(row, p.rows, p.n.t, shape)
    mask = _both(mask, _inside(column[None], p.columns, p.n.s, shape))
  x = _load(at, mask, 0.0).astype(jnp.float32)
  return x[None] if x.ndim == 1 else x


def _keep(refs: Refs, p: Problem, b, h, i, j) -> jax.Array | None:
  """Which weights of the tile dropout keeps."""
  if not p.options.dropout_rate:
    return None
  seed = [refs["seed"][word] for word in range(6)]
  row = i * p.rows + jnp.arange(p.rows)
  column = j * p.columns + jnp.arange(p.columns)
  words = dropout.row_words(seed, b, h, row)
  words = tuple(word[:, None] for word in words)
  columns = dropout.column_word(seed, column)[None]
  return dropout.keep(words, columns, p.options.dropout_rate)


def _visit(refs: Refs, table: str, h, line, tiles: int, body, init):
  """Runs body(tile, carry) over the active tiles of a row or column."""
  if f"{table}_index" not in refs:
    return lax.fori_loop(0, tiles, body, init)
  count, index = refs[f"{table}_count"], refs[f"{table}_index"]
  h = h if count.shape[0] > 1 else 0
  return lax.fori_loop(
    0,
    count[h, line],
    lambda turn, carry: body(index[h, line, turn], carry),
    init,
  )


def forward(refs: Refs, out_ref, lse_ref, *, p: Problem) -> None:
  """One tile of rows: output and base-2 lse."""
  i, h, b = (pl.program_id(axis) for axis in range(3))
  kv = lax.div(h, p.share)
  q = _block(refs["q"], p, "t", b, h, i, p.n.d).load()

  def body(j, carry):
    out, top, total = carry
    k = _block(refs["k"], p, "s", b, kv, j, p.n.d).load()
    score = _scores(refs, p, b, h, i, j, q, k).value
    new_top = jnp.maximum(top, score.max(1))
    # exp2(-inf - 0) = 0 where exp2(-inf + inf) would be NaN.
    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp2(score - base[:, None])
    shrink = jnp.exp2(top - base)
    total = total * shrink + weights.sum(1)
    keep = _keep(refs, p, b, h, i, j)
    if keep is not None:
      weights = jnp.where(keep, weights, 0.0)
    v = _block(refs["v"], p, "s", b, kv, j, p.n.dv).load()
    out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
    return out, new_top, total

  init = (
    jnp.zeros((p.rows, p.dv), jnp.float32),
    jnp.full((p.rows,), -jnp.inf, jnp.float32),
    jnp.zeros((p.rows,), jnp.float32),
  )
  out, top, total = _visit(refs, "rows", h, i, p.column_tiles, body, init)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  out = out / (total * (1.0 - p.options.dropout_rate))[:, None]
  _block(out_ref, p, "t", b, h, i, p.n.dv).store(out)
  lse = jnp.where(seen, top + jnp.log2(total), -jnp.inf) * (1 / LOG2E)
  _store_rows(lse_ref, p, b, h, i, lse)


def _store_rows(ref, p: Problem, b, h, i, x) -> None:
  index = i * p.rows + jnp.arange(p.rows)
  mask = _inside(index, p.rows, p.n.t, (p.rows,))
  plgpu.store(ref.at[b, h, pl.ds(i * p.rows, p.rows)], x, mask=mask)


class _Backward(NamedTuple):
  """Of a tile: weights as they met v, and the gradient of the scores."""

  q: jax.Array
  k: jax.Array
  do: jax.Array
  used: jax.Array
  ds: jax.Array
  distance: jax.Array | None


def _backward(refs: Refs, p: Problem, b, h, i, j, q, k, v, do) -> _Backward:
  scores = _scores(refs, p, b, h, i, j, q, k)
  # lse is +inf in rows that saw nothing and in rows that don't exist.
  lse = _vector(refs["lse"], p, "t", (b, h), i, jnp.inf)
  rest = _vector(refs["rest"], p, "t", (b, h), i, 0.0)
  weights = used = jnp.exp2(scores.value - lse[:, None])
  dweights = _dot(do, v.T)
  keep = _keep(refs, p, b, h, i, j)
  if keep is not None:
    share = 1.0 / (1.0 - p.options.dropout_rate)
    used = jnp.where(keep, weights * share, 0.0)
    dweights = jnp.where(keep, dweights * share, 0.0)
  ds = weights * (dweights - rest[:, None])
  if scores.slope is not None:
    ds *= scores.slope
  return _Backward(q, k, do, used, ds, scores.distance)


def dkv(refs: Refs, dk_ref, dv_ref, *, p: Problem) -> None:
  """One tile of columns: dk and dv, summed over the heads that share them."""
  j, kv, b = (pl.program_id(axis) for axis in range(3))
  k = _block(refs["k"], p, "s", b, kv, j, p.n.d).load()
  v = _block(refs["v"], p, "s", b, kv, j, p.n.dv).load()

  def body(h, i, carry):
    dk, dv = carry
    q = _block(refs["q"], p, "t", b, h, i, p.n.d).load()
    do = _block(refs["do"], p, "t", b, h, i, p.n.dv).load()
    tile = _backward(refs, p, b, h, i, j, q, k, v, do)
    dv += _dot(tile.used.astype(do.dtype).T, do)
    dk += _dot(tile.ds.astype(q.dtype).T, q)
    return dk, dv

  def head(share, carry):
    h = kv * p.share + share
    return _visit(
      refs, "columns", h, j, p.row_tiles, functools.partial(body, h), carry
    )

  init = (
    jnp.zeros((p.columns, p.d), jnp.float32),
    jnp.zeros((p.columns, p.dv), jnp.float32),
  )
  if p.share == 1:
    dk, dv = head(0, init)
  else:
    dk, dv = lax.fori_loop(0, p.share, head, init)
  dk *= p.options.scale
  _block(dk_ref, p, "s", b, kv, j, p.n.d).store(dk)
  _block(dv_ref, p, "s", b, kv, j, p.n.dv).store(dv)


def dq(refs: Refs, dq_ref, dslopes_ref=None, *, p: Problem) -> None:
  """One tile of rows: dq, and each row's part of the slopes' gradient."""
  i, h, b = (pl.program_id(axis) for axis in range(3))
  kv = lax.div(h, p.share)
  q = _block(refs["q"], p, "t", b, h, i, p.n.d).load()
  do = _block(refs["do"], p, "t", b, h, i, p.n.dv).load()

  def body(j, carry):
    grad, fall = carry
    k = _block(refs["k"], p, "s", b, kv, j, p.n.d).load()
    v = _block(refs["v"], p, "s", b, kv, j, p.n.dv).load()
    tile = _backward(refs, p, b, h, i, j, q, k, v, do)
    if fall is not None:
      fall -= (tile.ds * tile.distance).sum(1)
    return grad + _dot(tile.ds.astype(k.dtype), k), fall

  init = (
    jnp.zeros((p.rows, p.d), jnp.float32),
    None if dslopes_ref is None else jnp.zeros((p.rows,), jnp.float32),
  )
  grad, fall = _visit(refs, "rows", h, i, p.column_tiles, body, init)
  grad *= p.options.scale
  _block(dq_ref, p, "t", b, h, i, p.n.d).store(grad)
  if dslopes_ref is not None:
    _store_rows(dslopes_ref, p, b, h, i, fall)


def dbias(refs: Refs, dbias_ref, *, p: Problem) -> None:
  """One tile of the bias: its gradient, summed over what it broadcasts to."""
  line, j, place = (pl.program_id(axis) for axis in range(3))
  examples, heads, rows, _ = refs["bias"].shape
  by_row = rows > 1
  turns_b = 1 if examples > 1 else p.n.b
  turns_h = 1 if heads > 1 else p.n.h
  turns_i = 1 if by_row else p.row_tiles
  first_b, first_h = lax.div(place, heads), lax.rem(place, heads)

  def body(turn, total):
    i = line if by_row else lax.rem(turn, turns_i)
    h = first_h if heads > 1 else lax.rem(lax.div(turn, turns_i), turns_h)
    b = first_b if examples > 1 else lax.div(turn, turns_i * turns_h)
    kv = lax.div(h, p.share)
    q = _block(refs["q"], p, "t", b, h, i, p.n.d).load()
    do = _block(refs["do"], p, "t", b, h, i, p.n.dv).load()
    k = _block(refs["k"], p, "s", b, kv, j, p.n.d).load()
    v = _block(refs["v"], p, "s", b, kv, j, p.n.dv).load()
    ds = _backward(refs, p, b, h, i, j, q, k, v, do).ds
    if "active" in refs:
      active = refs["active"]
      ds = jnp.where(active[h if active.shape[0] > 1 else 0, i, j] > 0, ds, 0.0)
    return total + (ds if by_row else ds.sum(0))

  shape = (p.rows, p.columns) if by_row else (p.columns,)
  total = lax.fori_loop(
    0, turns_b * turns_h * turns_i, body, jnp.zeros(shape, jnp.float32)
  )
  column = j * p.columns + jnp.arange(p.columns)
  span = pl.ds(j * p.columns, p.columns)
  if by_row:
    at = dbias_ref.at[first_b, first_h, pl.ds(line * p.rows, p.rows), span]
    row = (line * p.rows + jnp.arange(p.rows))[:, None]
    mask = _inside(row, p.rows, p.n.t, shape)
    mask = _both(mask, _inside(column[None], p.columns, p.n.s, shape))
  else:
    at = dbias_ref.at[first_b, first_h, _first(), span]
    mask = _inside(column, p.columns, p.n.s, shape)
  plgpu.store(at, total.astype(dbias_ref.dtype), mask=mask)
