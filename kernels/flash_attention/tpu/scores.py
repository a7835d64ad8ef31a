"""From products to scores: bias, ALiBi, cap, masks, dropout, of one item.

Scores are transposed, [keys, queries]: keys on sublanes, queries on lanes. What
belongs to a query is a row vector; what belongs to a key is kept as a [keys,
128] tile of equal lanes, made once per step and shared by all its heads.
Everything here is chosen while tracing: what a call does not use costs nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention import dropout
from kernels.flash_attention.options import visible_by_position
from kernels.flash_attention.tpu.items import Item
from kernels.flash_attention.tpu.launch import Step
from kernels.flash_attention.tpu.problem import LANES, LOG2E, Problem
from kernels.flash_attention.tpu.relative import Terms
from kernels.flash_attention.tpu.tiles import Tiles

# Stands for -inf: far below any score, yet its differences are finite.
HIDDEN = -1e30


class Scores:
  """Scores of one grid step.

  Attributes:
    masked: whether position, key padding or blocks of the mask may hide part
      of this tile.
  """

  def __init__(
    self, problem: Problem, tiles: Tiles, step: Step, refs: Any, masked: bool
  ):
    self.problem, self.tiles = problem, tiles
    self.step, self.refs = step, refs
    self.masked = masked
    self.terms = Terms(problem, tiles, step, refs)
    self._by_key = {}
    self._t0 = step.visit.i * tiles.t
    self._s0 = step.visit.j * tiles.s

  def head(self, item: Item) -> Any:
    """Index of the item's query head."""
    return self.step.group * self.tiles.heads + item.head

  def _once(self, name: str, item: Item, make) -> jax.Array:
    """What depends on the keys alone is made once per step."""
    key = (name, item.s)
    if key not in self._by_key:
      self._by_key[key] = make()
    return self._by_key[key]

  def _spread(self, column: jax.Array) -> jax.Array:
    """A [keys, 128] tile of equal lanes on all the item's queries."""
    t = self.tiles.t_item
    if t <= LANES:
      return column[:, :t]
    return jnp.concatenate([column] * (t // LANES), axis=1)

  def _turn(self, row: jax.Array) -> jax.Array:
    """A row vector of keys as a [keys, 128] tile of equal lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T

  def _rows(self, item: Item) -> jax.Array:
    """Indices of queries, [1, t_item]."""
    shape = (1, self.tiles.t_item)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) + (self._t0 + item.t)

  def _columns(self, item: Item) -> jax.Array:
    """Indices of keys, [s_item, 128]."""
    shape = (self.tiles.s_item, LANES)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (self._s0 + item.s)

  def _positions(self, item: Item) -> tuple[jax.Array, jax.Array]:
    """Positions of queries [1, t_item] and of keys [s_item, t_item]."""
    offset = self.problem.offset
    if offset is None:
      offset = self.refs.offset[0]
    columns = self._once("columns", item, lambda: self._columns(item))
    return self._rows(item) + offset, self._spread(columns)

  def _slice(self, item: Item) -> tuple[slice, slice]:
    return (
      pl.ds(item.s, self.tiles.s_item),
      pl.ds(item.t, self.tiles.t_item),
    )

  def _biased(self, item: Item) -> jax.Array:
    """The bias of an item, float32 [s_item, t_item]."""
    _, per_head, per_query = (n > 1 for n in self.problem.bias[:3])
    head = item.head if per_head else 0
    s, t = self._slice(item)
    if per_query:
      return self.refs.bias[0, head, s, t].astype(jnp.float32)
    return self._spread(
      self._once(
        f"bias{head}",
        item,
        lambda: self._turn(self.refs.bias[0, head, :, s].astype(jnp.float32)),
      )
    )

  def distance(self, item: Item) -> jax.Array:
    """|query position - key position|, float32 [s_item, t_item]."""
    rows, columns = self._positions(item)
    return jnp.abs(rows - columns).astype(jnp.float32)

  def logits(
    self, product: jax.Array, item: Item
  ) -> tuple[jax.Array, jax.Array | None]:
    """Scores divided by `problem.unit`, and the cap's slope if there is a cap.

    Args:
      product: k q^T and relative products, float32 [s_item, t_item].
      item: which.
    """
    problem, cap = self.problem, self.problem.options.softcap
    if problem.unit != 1.0:
      return product, None
    # In base 2 at once, unless a cap still has to see the scores.
    unit = LOG2E if cap is None else 1.0 / cap
    x = product * (problem.options.scale * unit)
    if problem.bias is not None:
      # The clip keeps a bias of -inf from making inf - inf.
      x = jnp.maximum(x + self._biased(item) * unit, HIDDEN)
    if "bias" in problem.relative:
      x = jnp.maximum(x + self.terms.bias(item) * unit, HIDDEN)
    if problem.slopes:
      b = self.step.b if self.refs.slopes.shape[0] > 1 else 0
      slope = self.refs.slopes[b, self.head(item)] * unit
      x = x - slope * self.distance(item)
    if cap is None:
      return x, None
    x = jnp.tanh(x)
    return x * (cap * LOG2E), 1.0 - x * x

  def visible(self, item: Item) -> jax.Array | None:
    """Which keys the queries see, bool [s_item, t_item]; None: all."""
    problem, masks = self.problem, []
    s, t = self._slice(item)
    if problem.segments:
      row = jax.lax.rem(self.step.b, self.refs.q_ids.shape[0])
      # Padding differs from everything: 0 among keys, -1 among queries.
      q_ids = self.refs.q_ids[pl.ds(row, 1), t]
      kv_ids = self._once(
        "ids", item, lambda: self._turn(self.refs.kv_ids[pl.ds(row, 1), s])
      )
      masks.append(self._spread(kv_ids) == jnp.where(q_ids > 0, q_ids, -1))
    if self.masked and problem.s < self.tiles.s_pad:
      columns = self._once("columns", item, lambda: self._columns(item))
      masks.append(self._spread(columns) < problem.s)
    if self.masked and problem.positional:
      rows, columns = self._positions(item)
      masks.append(visible_by_position(rows, columns, problem.options))
    if self.masked and problem.finer:
      masks.append(self._in_block(item))
    return functools.reduce(jnp.logical_and, masks) if masks else None

  def _in_block(self, item: Item) -> jax.Array:
    """The block mask within a tile, bool [s_item, t_item]."""
    size = min(self.problem.block[1], self.tiles.s_item)
    _, t = self._slice(item)
    parts = []
    for s in range(item.s, item.s + self.tiles.s_item, size):
      block = jax.lax.div(jnp.int32(self._s0 + s), self.problem.block[1])
      row = self.refs.blocks[0, pl.ds(block, 1), t]
      parts.append(jnp.broadcast_to(row, (size, row.shape[1])))
    return jnp.concatenate(parts, axis=0) != 0

  def kept(self, item: Item) -> jax.Array:
    """Which weights dropout keeps, bool [s_item, t_item]."""
    options = self.problem.options
    seed = [self.refs.seed[n].astype(jnp.uint32) for n in range(6)]
    if options.dropout_generator == "hardware":
      return self._drawn(item, seed)
    columns = self._once(
      "dropout",
      item,
      lambda: dropout.column_word(seed, self._columns(item)),
    )
    rows = dropout.row_words(
      seed, jnp.asarray(self.step.b), self.head(item), self._rows(item)
    )
    return dropout.keep(rows, self._spread(columns), options.dropout_rate)

  def _drawn(self, item: Item, seed: list[jax.Array]) -> jax.Array:
    """Bits of the TPU's generator, seeded anew for each item.

    Both passes cut the scores into the same items, in whatever order and
    number per step, so they draw the same bits.
    """
    tiles = self.tiles
    words = item_seed(
      seed,
      self.step.b,
      self.head(item),
      self._t0 + item.t,
      self._s0 + item.s,
    )
    pltpu.prng_seed(*words)
    bits = pltpu.prng_random_bits((tiles.s_item, tiles.t_item))
    rate = self.problem.options.dropout_rate
    return bits >= jnp.int32(min(round(rate * 2**32), 2**32 - 1) - 2**31)


def item_seed(
  seed: list[jax.Array], b: Any, head: Any, row: Any, column: Any
) -> tuple[jax.Array, jax.Array]:
  """Two int32 words that seed the generator for an item of a head.

  Args:
    seed: uint32 scalars, see `dropout.make_seed`.
    b: example.
    head: query head.
    row: its first query.
    column: its first key.
  """
  index = [jnp.asarray(x) for x in (b, head, row, column)]
  first, second = dropout.row_words(seed, *index[:3])
  keys = dropout.column_word(seed, index[3])
  return tuple(
    jax.lax.bitcast_convert_type(word, jnp.int32)
    for word in (first ^ keys, second + keys)
  )
