"""Attention over sequences laid end to end, without padding.

As in MosaicBERT and MLPerf BERT: arrays are [total, h, d] and cumulative
lengths tell where sequences begin. Blocks in which no sequence of the queries
meets one of the keys are skipped, so that the cost is that of the sequences.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention import flash_attention

BLOCK = 128
RELATIVE = {"relative_bias", "relative_keys", "relative_queries"}


def segment_ids(cumulative: jax.Array, total: int) -> jax.Array:
  """1, 2, ... per sequence and 0 beyond the last one, int32 [total].

  Args:
    cumulative: int [n + 1], 0 and the ends of the n sequences.
    total: length of the arrays.
  """
  index = jnp.arange(total)
  ids = jnp.searchsorted(cumulative, index, side="right")
  return jnp.where(index < cumulative[-1], ids, 0).astype(jnp.int32)


def _ranges(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Least and greatest id of every block; (1, 0) where all is padding."""
  blocks = jnp.pad(ids, (0, -len(ids) % BLOCK)).reshape(-1, BLOCK)
  least = jnp.where(blocks > 0, blocks, jnp.iinfo(jnp.int32).max).min(1)
  return least, blocks.max(1)


def meeting_blocks(q_ids: jax.Array, kv_ids: jax.Array) -> jax.Array:
  """bool [row blocks, column blocks]: some query may see some key."""
  (q_low, q_high), (kv_low, kv_high) = _ranges(q_ids), _ranges(kv_ids)
  return (q_low[:, None] <= kv_high[None]) & (kv_low[None] <= q_high[:, None])


class _Slots(NamedTuple):
  """One slot per sequence, the same for queries and keys.

  A slot is as long as the longer of the two, and both end where it ends: so
  places in the arrays of slots differ as positions in a sequence do, when the
  last query is aligned with the last key.

  Attributes:
    q: place of each query among the slots; `size` beyond the last sequence.
    kv: likewise of each key.
    size: of all slots, at most.
  """

  q: jax.Array
  kv: jax.Array
  size: int


def _slots(cumulative_q, cumulative_kv, q_ids, kv_ids) -> _Slots:
  longest = jnp.maximum(jnp.diff(cumulative_q), jnp.diff(cumulative_kv))
  ends = jnp.cumsum(longest)
  size = len(q_ids) + len(kv_ids)

  def places(ids, cumulative):
    last = jnp.maximum(ids - 1, 0)
    place = jnp.arange(len(ids)) + (ends - cumulative[1:])[last]
    return jnp.where(ids > 0, place, size)

  return _Slots(
    places(q_ids, cumulative_q), places(kv_ids, cumulative_kv), size
  )


def _spread(x: jax.Array, places: jax.Array, size: int, axis: int = 0):
  """x at its places in an array of `size`, zeros elsewhere."""
  x = jnp.moveaxis(x, axis, 0)
  spread = jnp.zeros((size, *x.shape[1:]), x.dtype)
  return jnp.moveaxis(spread.at[places].set(x, mode="drop"), 0, axis)


def _in_slots(q, k, v, q_ids, kv_ids, slots: _Slots, options):
  """Attention whose positions are those within each sequence."""
  bias = options.get("bias")
  if bias is not None:
    if bias.shape[2] > 1:
      bias = _spread(bias, slots.q, slots.size, axis=2)
    bias = _spread(bias, slots.kv, slots.size, axis=3)
    options = options | {"bias": bias}
  around = slots.size - len(kv_ids), slots.size - len(q_ids)
  for name in RELATIVE & set(options):
    x = options[name]
    widths = [(0, 0)] * 3
    widths[2 if name == "relative_bias" else 1] = around
    options = options | {name: x if x is None else jnp.pad(x, widths)}
  found = _by_segment(
    _spread(q, slots.q, slots.size),
    _spread(k, slots.kv, slots.size),
    _spread(v, slots.kv, slots.size),
    _spread(q_ids, slots.q, slots.size),
    _spread(kv_ids, slots.kv, slots.size),
    options,
  )

  def back(x, axis, fill):
    return jnp.take(x, slots.q, axis=axis, mode="fill", fill_value=fill)

  if not options.get("return_lse"):
    return back(found, 0, 0.0)
  return back(found[0], 0, 0.0), back(found[1], 1, -jnp.inf)


def _by_segment(q, k, v, q_ids, kv_ids, options):
  found = flash_attention(
    q[None],
    k[None],
    v[None],
    segment_ids=(q_ids[None], kv_ids[None]),
    block_mask=meeting_blocks(q_ids, kv_ids),
    block_size=(BLOCK, BLOCK),
    **options,
  )
  return jax.tree.map(lambda x: x[0], found)


def flash_attention_varlen(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  cumulative_q: jax.Array,
  cumulative_kv: jax.Array | None = None,
  **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Attention of each sequence's queries over its own keys.

  Args:
    q: [total, h, d]; what lies beyond the last sequence returns 0.
    k: [total of keys, heads of k, d].
    v: [total of keys, heads of k, dv].
    cumulative_q: int [n + 1], 0 and the ends of the sequences in q.
    cumulative_kv: likewise in k and v; the same by default.
    **options: of `flash_attention`, but for layout, ids, lengths and masks of
      blocks. Positions are those within a sequence, whose last query and last
      key are aligned. bias is [1, 1|h, 1|total, total of keys]; relative terms
      have n = total + total of keys - 1 entries, of which entry m is for keys
      m - (total of keys - 1) places after the query; dropout is
      keyed by the place in the array, or where queries and keys are cut
      differently and positions count, by that in an array of aligned sequences.

  Returns:
    [total, h, dv], or with `return_lse` also lse [h, total].

  Raises:
    ValueError: an option that does not fit.
  """
  taken = {"layout", "segment_ids", "kv_lengths", "block_mask", "block_size"}
  for name in sorted(taken & set(options)):
    raise ValueError(f"{name} is not an option of flash_attention_varlen.")
  q_ids = segment_ids(cumulative_q, len(q))
  alike = cumulative_kv is None
  if alike:
    cumulative_kv = cumulative_q
  kv_ids = segment_ids(cumulative_kv, len(k))
  positional = ("causal", "window", "alibi_slopes", *RELATIVE)
  given = [options[name] for name in positional if name in options]
  if alike or all(x is None or x is False for x in given):
    return _by_segment(q, k, v, q_ids, kv_ids, options)
  slots = _slots(cumulative_q, cumulative_kv, q_ids, kv_ids)
  return _in_slots(q, k, v, q_ids, kv_ids, slots, options)
