"""Attention over sequences laid end to end, without padding.

As in MosaicBERT and MLPerf BERT: arrays are [total, h, d] and cumulative
lengths tell where sequences begin. Blocks in which no sequence of the queries
meets one of the keys are skipped, so that the cost is that of the sequences.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.flash_attention import flash_attention
from kernels.flash_attention.options import Unsupported

BLOCK = 128


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
      blocks. bias is [1, 1|h, 1|total, total of keys]; dropout is keyed by the
      place in the array.

  Returns:
    [total, h, dv], or with `return_lse` also lse [h, total].

  Raises:
    ValueError: an option that does not fit; `Unsupported` for causal, window
      and ALiBi where queries and keys are cut differently.
  """
  taken = {"layout", "segment_ids", "kv_lengths", "block_mask", "block_size"}
  for name in sorted(taken & set(options)):
    raise ValueError(f"{name} is not an option of flash_attention_varlen.")
  if cumulative_kv is not None:
    for name in ("causal", "window", "alibi_slopes"):
      if options.get(name) not in (None, False):
        raise Unsupported(
          f"{name} with cumulative_kv: positions are those of self-attention"
          " and need queries and keys cut alike."
        )
  q_ids = segment_ids(cumulative_q, len(q))
  if cumulative_kv is None:
    cumulative_kv = cumulative_q
  kv_ids = segment_ids(cumulative_kv, len(k))
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
