"""Terms of relative positions in an item's scores, and their gradients.

The entries of the diagonals that cross 128 rows of scores are consecutive lanes
of `Relative`'s arrays. A product with all of them is a strip [128, 128 +
columns], of which row n has its scores from lane 127 - n on: `skew.py` moves
them there. A strip's rows are what the term's other factor belongs to: queries
for the relative keys, whose scores are then transposed like K; keys for the
relative queries and the bias. All windows start at multiples of 128 lanes.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.options import Extras
from kernels.flash_attention.relative import Relative, lay, unlay
from kernels.flash_attention.tpu import operands
from kernels.flash_attention.tpu.items import Item, multiple
from kernels.flash_attention.tpu.launch import GROUP, VISIT, B, Operand, Step
from kernels.flash_attention.tpu.pipeline import dot
from kernels.flash_attention.tpu.problem import LANES, Problem
from kernels.flash_attention.tpu.skew import skew, toeplitz, unskew
from kernels.flash_attention.tpu.tiles import Tiles

# Rows that are moved at once: those of a register, but when interpreted, where
# many small gathers would take long to compile.
ROWS, ROWS_INTERPRETED = 8, LANES
Strips = dict[str, list[jax.Array]]  # by term
BY_KEY = ("bias", "queries")  # the terms whose strips have keys as rows


def _entries(
  like: Relative, problem: Problem, tiles: Tiles, programs: bool
) -> dict[str, Operand]:
  """Blocks of all entries of a program's heads.

  Args:
    like: arrays [1|b, heads, 1 or d, entries].
    problem: the call.
    tiles: its tiles.
    programs: whether programs that share a head of keys have one each.
  """
  heads, key_heads = tiles.heads, operands.key_heads(problem, tiles)

  def index_of(name, examples):
    def index(b, group, visit):
      del visit
      if name == "keys" and not programs:
        group = operands.key_block(problem, tiles, group)
      return b if examples > 1 else 0, group, 0, 0

    return index

  def operand(x, name):
    block = 1, key_heads if name == "keys" else heads, *x.shape[2:]
    return Operand(x, block, index_of(name, x.shape[0]), buffers=1)

  found = like.map(operand, Relative._fields)._asdict().items()
  return {f"relative_{name}": x for name, x in found if x is not None}


def inputs(
  extras: Extras, problem: Problem, tiles: Tiles
) -> dict[str, Operand]:
  """The entries as operands."""
  if extras.relative is None:
    return {}
  sizes, padded = (problem.t, problem.s), (tiles.t_pad, tiles.s_pad)
  bias, *products = lay(extras.relative, sizes, padded, BY_KEY)
  if bias is not None:
    bias = bias.astype(jnp.float32)[:, :, None]
  products = [
    None if x is None else operands.pad(x.astype(problem.dtype), 2, problem.d)
    for x in products
  ]
  return _entries(Relative(bias, *products), problem, tiles, programs=False)


def outputs(problem: Problem, tiles: Tiles) -> dict[str, Operand]:
  """Their gradients in float32, by name with a "d" before it."""
  size = tiles.t_pad + tiles.s_pad
  key_heads = problem.h // tiles.heads * operands.key_heads(problem, tiles)
  examples = problem.b if problem.relative_by_example else 1
  shapes = Relative(
    (examples, problem.h, 1, size),
    (1, key_heads, problem.d, size),
    (1, problem.h, problem.d, size),
  )
  like = Relative(
    *(
      jax.ShapeDtypeStruct(shape, jnp.float32)
      if name in problem.relative
      else None
      for name, shape in shapes._asdict().items()
    )
  )
  found = _entries(like, problem, tiles, programs=True)
  return {"d" + name: operand for name, operand in found.items()}


def order(problem: Problem) -> tuple[int, int, int]:
  """The grid's loops: examples inside groups of heads if there are terms.

  The entries of a group are then fetched once, and their gradients stay in VMEM
  until all examples have added to them.
  """
  return (GROUP, B, VISIT) if problem.relative else (B, GROUP, VISIT)


class Terms:
  """The terms of one grid step's items."""

  def __init__(self, problem: Problem, tiles: Tiles, step: Step, refs: Any):
    self._problem, self._tiles, self._refs = problem, tiles, refs
    self._step = step
    interpret = problem.options.interpret
    self._rows = ROWS_INTERPRETED if interpret else ROWS

  def _window(self, item: Item, row: int, by_key: bool) -> Any:
    """Lanes of the entries that cross 128 rows, from the item's `row` on."""
    tiles, visit = self._tiles, self._step.visit
    ahead = visit.i * tiles.t + item.t - visit.j * tiles.s - item.s
    if by_key:
      start, size = ahead - row + tiles.s_pad - LANES, LANES + tiles.t_item
    else:
      start, size = -ahead - row + tiles.t_pad - LANES, LANES + tiles.s_item
    return pl.ds(multiple(start, LANES), size)

  def _diagonals(self, item: Item) -> Any:
    """Lanes of the bias of all the item's scores."""
    tiles = self._tiles
    last = self._window(item, tiles.s_item - LANES, by_key=True)
    return pl.ds(last.start, tiles.t_item + tiles.s_item)

  def _key_head(self, item: Item) -> int:
    return operands.local_key_head(self._problem, self._tiles, item.head)

  def bias(self, item: Item) -> jax.Array:
    """The bias of an item, float32 [s_item, t_item]."""
    tiles = self._tiles
    entries = self._refs.relative_bias[0, item.head, :, self._diagonals(item)]
    strip = toeplitz(entries, self._rows)
    starts = range(tiles.s_item - LANES, -1, -LANES)
    parts = [strip[:, n : n + tiles.t_item] for n in starts]
    return jnp.concatenate(parts, axis=0)

  def products(self, item: Item, q: jax.Array, k: jax.Array) -> Strips:
    """Unscaled products with entries, by term: strips of 128 rows each.

    Args:
      item: which.
      q: its queries [d, t_item].
      k: its keys, transposed [s_item, d].
    """
    refs, found = self._refs, {}
    if "keys" in self._problem.relative:
      entries = refs.relative_keys.at[0, self._key_head(item)]
      found["keys"] = self._strips(item, q.T, entries, by_key=False)
    if "queries" in self._problem.relative:
      entries = refs.relative_queries.at[0, item.head]
      found["queries"] = self._strips(item, k, entries, by_key=True)
    return found

  def _strips(
    self, item: Item, factor: jax.Array, entries: Any, by_key: bool
  ) -> list[jax.Array]:
    """Products of the rows of a factor [rows, d] with their entries."""
    strips = []
    for row in range(0, len(factor), LANES):
      window = entries[:, self._window(item, row, by_key)]
      part = factor[row : row + LANES]
      strips.append(dot(self._problem, part, window, (1, 0)))
    return strips

  def add_products(self, product: jax.Array, strips: Strips) -> jax.Array:
    """k q^T with the products where they belong, [s_item, t_item]."""
    if "keys" in strips:
      moved = [x.T for x in skew(strips["keys"], self._rows)]
      product = product + jnp.concatenate(moved, axis=1)
    if "queries" in strips:
      moved = skew(strips["queries"], self._rows)
      product = product + jnp.concatenate(moved, axis=0)
    return product

  def clear(self) -> None:
    """Zeros the gradients' sums before their first term."""
    for name in self._problem.relative:
      first = self._step.first
      if not (name == "bias" and self._problem.relative_by_example):
        first = first & (self._step.b == 0)
      ref = getattr(self._refs, f"drelative_{name}")

      @pl.when(first)
      def _(ref=ref):
        ref[...] = jnp.zeros_like(ref)

  def add_gradients(
    self, item: Item, q: jax.Array, k: jax.Array, ds: jax.Array
  ) -> tuple[jax.Array | None, jax.Array | None]:
    """Adds an item's terms to the entries' gradients, without their factors.

    Args:
      item: which.
      q: its queries [d, t_item].
      k: its keys [d, s_item].
      ds: gradient of its scores, float32 [s_item, t_item].

    Returns:
      What the entries add to the gradients [d, t_item] of the queries and
      [d, s_item] of the keys, likewise; None: nothing.
    """
    refs, dq, dk = self._refs, None, None
    if "bias" in self._problem.relative:
      place = 0, item.head, slice(None), self._diagonals(item)
      (spread,) = unskew([self._by_diagonal(ds)], self._rows)
      refs.drelative_bias[place] += spread.sum(0, keepdims=True)
    if "keys" in self._problem.relative:
      both = (
        ref.at[0, self._key_head(item)]
        for ref in (refs.relative_keys, refs.drelative_keys)
      )
      starts = range(0, ds.shape[1], LANES)
      strips = [ds[:, n : n + LANES].T for n in starts]
      dq = self._add(item, q, strips, *both, by_key=False)
    if "queries" in self._problem.relative:
      both = (
        ref.at[0, item.head]
        for ref in (refs.relative_queries, refs.drelative_queries)
      )
      starts = range(0, ds.shape[0], LANES)
      strips = [ds[n : n + LANES] for n in starts]
      dk = self._add(item, k, strips, *both, by_key=True)
    return dq, dk

  def _by_diagonal(self, ds: jax.Array) -> jax.Array:
    """Sums over the blocks of each diagonal: [128, t_item + s_item - 128]."""
    rows, columns = (n // LANES for n in ds.shape)
    sums = []
    for n in range(rows + columns - 1):
      places = [(p, n - (rows - 1 - p)) for p in range(rows)]
      blocks = [
        ds[p * LANES : (p + 1) * LANES, c * LANES : (c + 1) * LANES]
        for p, c in places
        if 0 <= c < columns
      ]
      sums.append(sum(blocks[1:], start=blocks[0]))
    return jnp.concatenate(sums, axis=1)

  def _add(
    self,
    item: Item,
    factor: jax.Array,
    strips: Sequence[jax.Array],
    entries: Any,
    sums: Any,
    by_key: bool,
  ) -> jax.Array:
    """The gradient of a factor [d, rows]; that of its entries is added."""
    found = []
    for n, strip in enumerate(unskew(strips, self._rows)):
      row = n * LANES
      strip = strip.astype(self._problem.dtype)
      window = slice(None), self._window(item, row, by_key)
      part = factor[:, row : row + LANES]
      sums[window] += dot(self._problem, part, strip, (1, 0))
      found.append(dot(self._problem, entries[window], strip, (1, 1)))
    return jnp.concatenate(found, axis=1)


def gradients(
  results: dict[str, jax.Array], extras: Extras, problem: Problem, tiles: Tiles
) -> Relative | None:
  """What the sums in a kernel's `outputs` make, float32.

  Args:
    results: the outputs by name; dropout's factor is missing in them.
    extras: of the call.
    problem: the call.
    tiles: its tiles.
  """
  if extras.relative is None:
    return None
  sizes, padded = (problem.t, problem.s), (tiles.t_pad, tiles.s_pad)
  factor = 1.0 / (1.0 - problem.options.dropout_rate)

  def one(x, name):
    found = results[f"drelative_{name}"]
    if name == "bias":
      return found[:, :, 0] * factor
    heads, d = x.shape[1:3]
    if found.shape[1] != heads:  # programs that share a head of keys
      found = found.reshape(1, heads, -1, *found.shape[2:]).sum(2)
    return found[:, :, :d] * (factor * problem.options.scale)

  return unlay(
    extras.relative.map(one, Relative._fields), sizes, padded, BY_KEY
  )
