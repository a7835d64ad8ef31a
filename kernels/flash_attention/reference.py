"""Dense softmax attention with every option: the oracle of all backends.

Plain JAX, differentiated by JAX, memory O(t s). Computes in float32, or in
float64 if that is what it is given.
"""

import jax
import jax.numpy as jnp

from kernels.flash_attention import dropout
from kernels.flash_attention.capabilities import (
  Capabilities,
  refuse,
)
from kernels.flash_attention.layouts import Sizes, relayout
from kernels.flash_attention.options import (
  Extras,
  Options,
  block_size,
  cap,
  check,
  same_segment,
  visible_by_position,
)
from kernels.flash_attention.relative import Relative

CAPABILITIES = Capabilities("reference", tiles=None)


def visible(n: Sizes, extras: Extras, options: Options) -> jax.Array | None:
  """Which key each query sees, bool [1|b, 1|h, t, s]; None: all see all."""
  offset = n.s - n.t if extras.offset is None else extras.offset
  rows, columns = jnp.arange(n.t)[:, None] + offset, jnp.arange(n.s)[None]
  masks = []
  by_position = visible_by_position(rows, columns, options)
  if by_position is not None:
    masks.append(by_position[None, None])
  if extras.q_segments is not None:
    same = same_segment(
      extras.q_segments[:, :, None], extras.kv_segments[:, None, :]
    )
    masks.append(same[:, None])
  if extras.block_mask is not None:
    r, c = block_size(extras, options, n.t, n.s)
    blocks = jnp.repeat(jnp.asarray(extras.block_mask), r, axis=1)
    masks.append(jnp.repeat(blocks, c, axis=2)[None, :, : n.t, : n.s])
  if not masks:
    return None
  mask = masks[0]
  for m in masks[1:]:
    mask = mask & m
  return mask


def scores(
  q: jax.Array, k: jax.Array, extras: Extras, options: Options, n: Sizes
) -> jax.Array:
  """Scores before masking, [b, h, t, s]; q and k in layout "bhtd"."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  k = jnp.repeat(k, n.h // n.kv_heads, axis=1)
  found = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=dtype)
  found *= options.scale
  if extras.bias is not None:
    found += extras.bias.astype(dtype)
  if extras.alibi_slopes is not None:
    offset = n.s - n.t if extras.offset is None else extras.offset
    rows, columns = jnp.arange(n.t)[:, None] + offset, jnp.arange(n.s)[None]
    slopes = extras.alibi_slopes.astype(dtype).reshape(-1, n.h, 1, 1)
    found -= slopes * jnp.abs(rows - columns)[None, None]
  if extras.relative is not None:
    found += relative_scores(q, k, extras.relative, options, n)
  return cap(found, options.softcap)


def relative_scores(
  q: jax.Array, k: jax.Array, relative: Relative, options: Options, n: Sizes
) -> jax.Array:
  """Terms of relative positions, which broadcast to [b, h, t, s].

  q and k are in layout "bhtd", k with the heads of q.
  """
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  diagonal = jnp.arange(n.s)[None] - jnp.arange(n.t)[:, None] + n.t - 1

  found = jnp.zeros((1, 1, 1, 1), dtype)
  if relative.bias is not None:
    found += relative.bias.astype(dtype)[..., diagonal]
  for x, entry, spec in (
    (q, relative.keys, "bhid,hdij->bhij"),
    (k, relative.queries, "bhjd,hdij->bhij"),
  ):
    if entry is not None:
      entry = jnp.repeat(entry[0], n.h // entry.shape[1], axis=0)
      entry = entry[..., diagonal]
      product = jnp.einsum(spec, x, entry, preferred_element_type=dtype)
      found += product * options.scale
  return found


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Attention by its definition.

  Args:
    q: queries [b, t, h, d] (letters of `options.layout`).
    k: keys [b, s, h or a divisor of it, d].
    v: values [b, s, heads of k, dv].
    extras: optional arrays.
    options: static choices.

  Returns:
    Output [b, t, h, dv] in the dtype of v; lse [b, h, t], natural logarithm,
    float32 (float64 for float64).

  Raises:
    ValueError: shapes that do not fit, or `Unsupported`: tiles, which it has
      none of, and the hardware generator.
  """
  n = check(q, k, v, extras, options)
  refuse(CAPABILITIES, q, k, v, extras, options)
  q, k, v = (relayout(x, options.layout, "bhtd") for x in (q, k, v))
  s = scores(q, k, extras, options, n)
  mask = visible(n, extras, options)
  # A finite stand-in keeps -inf out of the arithmetic and of its gradient.
  top = jnp.max(s, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
  top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
  weights = jnp.exp((s if mask is None else jnp.where(mask, s, top)) - top)
  if mask is not None:
    weights = jnp.where(mask, weights, 0.0)
  total = weights.sum(-1, keepdims=True)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  lse = jnp.where(seen, jnp.log(total) + top, -jnp.inf)[..., 0]
  probs = weights / total
  if options.dropout_rate:
    kept = dropout.keep_mask(
      extras.seed, n.b, n.h, n.t, n.s, options.dropout_rate
    )
    probs = jnp.where(kept, probs / (1.0 - options.dropout_rate), 0.0)
  v = jnp.repeat(v, n.h // n.kv_heads, axis=1)
  out = jnp.einsum(
    "bhts,bhsd->bhtd",
    probs.astype(v.dtype),
    v,
    preferred_element_type=s.dtype,
  )
  return relayout(out.astype(v.dtype), "bhtd", options.layout), lse
