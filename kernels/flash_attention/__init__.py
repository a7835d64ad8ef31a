"""FlashAttention (Dao et al. 2022, arXiv:2205.14135): exact, in linear memory.

`flash_attention` is the one function. The backends behind it mean the same by
every option (`options.py`) and are tested against `reference.py`.
"""

import numbers

import jax
import jax.numpy as jnp
import numpy as np

from kernels.flash_attention import dispatch, relative, sharded
from kernels.flash_attention.dispatch import BACKENDS
from kernels.flash_attention.dropout import make_seed
from kernels.flash_attention.options import (
  Extras,
  Options,
  Unsupported,
  check,
  check_arrays,
)
from kernels.flash_attention.sharded import Sharding

__all__ = ["BACKENDS", "Sharding", "Unsupported", "flash_attention"]


def _segments(segment_ids, kv_lengths, n):
  """(q_segments, kv_segments) of whichever way padding was told."""
  if segment_ids is not None and kv_lengths is not None:
    raise ValueError(
      "segment_ids and kv_lengths both say which keys are padding; give one."
    )
  if kv_lengths is not None:
    kv_lengths = jnp.asarray(kv_lengths)
    if kv_lengths.shape != (n.b,):
      raise ValueError(
        f"kv_lengths has shape {kv_lengths.shape}; it must be [{n.b}]."
      )
    real = jnp.arange(n.s)[None] < kv_lengths[:, None]
    ones = jnp.ones((n.b, n.t), jnp.int32)
    return ones, real.astype(jnp.int32)
  if segment_ids is None:
    return None, None
  if isinstance(segment_ids, tuple | list):
    q_ids, kv_ids = segment_ids
  else:
    q_ids = kv_ids = segment_ids
  return q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)


def _block_mask(mask):
  """A mask for all heads gets its axis of heads; numpy stays numpy."""
  if mask is None:
    return None
  if not isinstance(mask, np.ndarray):
    mask = jnp.asarray(mask)
  return mask[None] if mask.ndim == 2 else mask


def _seed(rate: float, seed: jax.Array | int | None) -> jax.Array | None:
  """Without dropout a seed changes nothing, so no kernel gets to see it."""
  return make_seed(seed) if rate and seed is not None else None


def _run(
  backend: str | None,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
  sharding: Sharding | None,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse), split over a mesh if need be."""
  n = check(q, k, v, extras, options)
  if 0 in (n.b, n.t, n.s):  # backends have no tile of nothing
    shape = tuple(dict(zip(options.layout, q.shape), d=n.dv).values())
    return jnp.zeros(shape, v.dtype), jnp.full(
      (n.b, n.h, n.t), -jnp.inf, jnp.float32
    )
  if sharding is None or backend in dispatch.PLAIN or not sharding.needed:
    return dispatch.attend(backend, q, k, v, extras, options)
  chosen, options = dispatch.choose(backend, options)
  return sharded.attend(chosen, q, k, v, extras, options, sharding)


def flash_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  bias: jax.Array | None = None,
  alibi_slopes: jax.Array | None = None,
  relative_bias: jax.Array | None = None,
  relative_keys: jax.Array | None = None,
  relative_queries: jax.Array | None = None,
  segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
  kv_lengths: jax.Array | None = None,
  causal: bool = False,
  window: int | tuple[int, int] | None = None,
  block_mask: jax.Array | np.ndarray | None = None,
  block_size: tuple[int, int] | None = None,
  dropout_rate: float = 0.0,
  dropout_seed: jax.Array | int | None = None,
  dropout_generator: str = "counter",
  sm_scale: float | None = None,
  logit_softcap: float | None = None,
  return_lse: bool = False,
  layout: str = "bthd",
  backend: str | None = None,
  tiles: tuple[int, ...] | None = None,
  interpret: bool = False,
  sharding: Sharding | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """softmax(sm_scale * q k^T + bias) v in memory linear in the lengths.

  Differentiable in q, k, v, bias, alibi_slopes and the relative terms, also
  through lse. A query that sees no key returns 0, has lse -inf and zero
  gradients.

  The relative terms have an entry for each of the n = t + s - 1 differences of
  positions: entry m is for keys that stand m - (s - 1) places after the query,
  where the last query is aligned with the last key. Clipped or bucketed
  differences are a gather of a table's rows beforehand, as
  `table[bucket(jnp.arange(n) - (s - 1))]`.

  Args:
    q: queries [b, t, h, d], or with these letters in the order of `layout`.
    k: keys [b, s, h', d], where h' divides h: grouped-query attention.
    v: values [b, s, h', dv].
    bias: [1|b, 1|h, 1|t, s], added to the scaled scores; -inf hides a key.
      Where it is large in all of a row, as -1e9 of padding, gradients of that
      row lose their digits.
    alibi_slopes: [h] or [b, h]; slope times the distance of query and key is
      subtracted from the score (Press et al. 2021; symmetric, for encoders).
    relative_bias: [1|b, 1|h, n], added to the scaled scores: T5's bias.
    relative_keys: [1|h', n, d], times the query and `sm_scale`, added: Shaw's
      keys, DeBERTa's content to position.
    relative_queries: [1|h, n, d], times the key and `sm_scale`, added:
      DeBERTa's position to content.
    segment_ids: int [b, t], or a pair ([b, t], [b, s]). Equal positive ids see
      each other; 0 is padding.
    kv_lengths: int [b], number of keys that are not padding; instead of
      `segment_ids`.
    causal: hide later keys; the last query is aligned with the last key.
    window: (left, right) distances, inclusive, or one for both sides; aligned
      like `causal`.
    block_mask: bool [blocks, blocks] or [1|h, blocks, blocks]; True = visible.
      Hidden blocks cost nothing. A numpy array is known at compile time.
    block_size: (rows, columns) of a block; absent, the blocks divide the
      lengths evenly.
    dropout_rate: probability of dropping an attention weight; the others are
      scaled up.
    dropout_seed: PRNG key, uint32 [2] or integer, or where in a larger array
      this is, of `make_seed`; needed if the rate is positive.
    dropout_generator: "counter", a function of seed, batch, head, row and
      column alone; "hardware", the TPU's own; "auto", the platform's fastest.
    sm_scale: factor of the products, 1 / sqrt(d) by default.
    logit_softcap: bounds the scores, bias included: cap * tanh(score / cap).
      Hide keys by ids or masks then, not by a large negative bias.
    return_lse: also return the scores' logsumexp, float32 [b, h, t], natural
      logarithm.
    layout: order of q's axes, "bthd", "bhtd" or "bhdt"; k, v, output alike.
    backend: one of `BACKENDS`; None: that of the platform compiled for.
    tiles: the backend's tile sizes, for tuning; None: its table.
    interpret: run Pallas kernels in the interpreter, for tests on a CPU.
    sharding: mesh axes to split over; needed wherever the arrays are sharded
      over a mesh, as the partitioner cannot see into a kernel.

  Returns:
    The output [b, t, h, dv] in `layout` and the dtype of v; with `return_lse`
    the pair (output, lse).

  Raises:
    ValueError: an argument that does not fit, or (`Unsupported`) that the
      named backend does not do.
  """
  n = check_arrays(q, k, v, layout)
  q_segments, kv_segments = _segments(segment_ids, kv_lengths, n)
  extras = Extras(
    bias=bias,
    alibi_slopes=alibi_slopes,
    relative=relative.terms(relative_bias, relative_keys, relative_queries, n),
    q_segments=q_segments,
    kv_segments=kv_segments,
    block_mask=_block_mask(block_mask),
    seed=_seed(dropout_rate, dropout_seed),
  )
  options = Options(
    scale=n.d**-0.5 if sm_scale is None else sm_scale,
    causal=causal,
    window=(window, window) if isinstance(window, numbers.Integral) else window,
    softcap=logit_softcap,
    dropout_rate=dropout_rate,
    dropout_generator=dropout_generator,
    layout=layout,
    block_size=block_size,
    tiles=tiles,
    interpret=interpret,
  )
  out, lse = _run(backend, q, k, v, extras, options, sharding)
  return (out, lse) if return_lse else out
