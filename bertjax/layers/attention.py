"""Bidirectional attention of BERT (Devlin et al. 2018, arXiv:1810.04805)."""

import functools
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from bertjax.layers.dropout import dropout
from bertjax.layers.flash import FlashAttend
from bertjax.layers.linear import Linear, bert_init
from bertjax.layers.matmul import einsum, shared

# What remat policies call queries, keys and values.
PROJECTIONS = "attention_projections"


@runtime_checkable
class Attend(Protocol):
  """Scores to outputs: what an attention implementation must accept.

  Shapes: q [b, t, h, d]; k, v [b, s, h, d]; the result is [b, t, h, d] in the
  dtype of v. A query with no visible key returns 0. Where lengths differ the
  last query stands at the position of the last key. An implementation refuses
  with a ValueError what it cannot do; it never ignores an argument.

  One that reads its operands and writes its output in another order of axes
  says so in an attribute `layout`, such as "bhdt" (`t` stands for `s`, too).
  """

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    bias: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    relative_bias: jax.Array | None = None,
    relative_keys: jax.Array | None = None,
    relative_queries: jax.Array | None = None,
    window: int | None = None,
    block_mask: jax.Array | None = None,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
  ) -> jax.Array: ...


def _positions(t: int, s: int) -> tuple[jax.Array, jax.Array]:
  """Those of queries [t, 1] and keys [1, s], the last ones aligned."""
  return jnp.arange(t)[:, None] + s - t, jnp.arange(s)[None, :]


def visible(
  t: int,
  s: int,
  *,
  segment_ids: Int[Array, "b t"] | None = None,
  window: int | None = None,
  block_mask: Bool[Array, "tb sb"] | None = None,
  causal: bool = False,
) -> Bool[Array, "b_or_1 1 t s"] | None:
  """Which key each query sees; None when all see all.

  Args:
    t: number of queries.
    s: number of keys.
    segment_ids: 0 is padding, which nobody sees; equal ids see each other.
    window: a query sees keys at a distance of at most this many positions.
    block_mask: visible tiles; it must divide t and s evenly.
    causal: a query sees no later key; the last query is aligned with the last
      key, here and in `window`.
  """
  masks = []
  rows, columns = _positions(t, s)
  if segment_ids is not None:
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    masks.append((same & (segment_ids[:, None, :] > 0))[:, None])
  if window is not None:
    masks.append((jnp.abs(rows - columns) <= window)[None, None])
  if causal:
    masks.append((columns <= rows)[None, None])
  if block_mask is not None:
    tiles_t, tiles_s = block_mask.shape
    if t % tiles_t or s % tiles_s:
      raise ValueError(
        f"block_mask of shape {block_mask.shape} does not tile attention of"
        f" shape {(t, s)}; both lengths must be multiples."
      )
    tiles = jnp.repeat(block_mask, t // tiles_t, axis=0)
    masks.append(jnp.repeat(tiles, s // tiles_s, axis=1)[None, None])
  mask = None
  for m in masks:
    mask = m if mask is None else mask & m
  return mask


def reference_attend(
  q: Float[Array, "b t h d"],
  k: Float[Array, "b s h d"],
  v: Float[Array, "b s h dv"],
  *,
  segment_ids: Int[Array, "b t"] | None = None,
  bias: Float[Array, "#b #h #t #s"] | None = None,
  alibi_slopes: Float[Array, "h"] | None = None,
  relative_bias: Float[Array, "#b #h n"] | None = None,
  relative_keys: Float[Array, "#h n d"] | None = None,
  relative_queries: Float[Array, "#h n d"] | None = None,
  window: int | None = None,
  block_mask: Bool[Array, "tb sb"] | None = None,
  causal: bool = False,
  dropout_rate: float = 0.0,
  dropout_seed: jax.Array | None = None,
) -> Float[Array, "b t h dv"]:
  """Softmax attention written out: the oracle every kernel is tested against.

  Args:
    q: queries.
    k: keys.
    v: values.
    segment_ids: see `visible`; needs t == s.
    bias: added to the scaled logits, broadcast over batch, heads or positions.
    alibi_slopes: per head, times the negative distance (Press et al. 2021, in
      its symmetric form for encoders).
    relative_bias: per relative position of the n = t + s - 1 from the key's
      being s - 1 before the query's to t - 1 after it, added like `bias`.
    relative_keys: per relative position; their products with the queries are
      scaled and added.
    relative_queries: likewise; their products with the keys are.
    window: see `visible`.
    block_mask: see `visible`.
    causal: see `visible`.
    dropout_rate: probability of dropping an attention weight.
    dropout_seed: PRNG key, required if `dropout_rate` is positive.
  """
  t, s = q.shape[1], k.shape[1]
  rows, columns = _positions(t, s)
  logits = einsum("bthd,bshd->bhts", q, k, q.dtype) * q.shape[-1] ** -0.5
  if bias is not None:
    logits += bias
  if alibi_slopes is not None:
    distance = jnp.abs(rows - columns)[None, None]
    logits -= alibi_slopes[None, :, None, None] * distance
  place = columns - rows + s - 1
  if relative_bias is not None:
    logits += relative_bias[..., place]
  for spec, x, entries in (
    ("bthd,htsd->bhts", q, relative_keys),
    ("bshd,htsd->bhts", k, relative_queries),
  ):
    if entries is not None:
      entries = jnp.broadcast_to(entries, (q.shape[2], *entries.shape[1:]))
      found = einsum(spec, x, entries[:, place], q.dtype)
      logits += found * q.shape[-1] ** -0.5
  mask = visible(
    t,
    s,
    segment_ids=segment_ids,
    window=window,
    block_mask=block_mask,
    causal=causal,
  )
  # `where` gives exact zeros on a fully masked row, not NaN or a uniform row.
  probs = jax.nn.softmax(logits, axis=-1, where=mask).astype(v.dtype)
  if dropout_rate:
    if dropout_seed is None:
      raise ValueError(
        f"dropout_rate={dropout_rate} needs dropout_seed, a PRNG key."
      )
    probs = dropout(probs, dropout_seed, dropout_rate)
  return einsum("bhts,bshd->bthd", probs, v, v.dtype).astype(v.dtype)


# "flash" is the kernel of the platform that is compiled for; on a CPU whichever
# of the blockwise and the dense form measured faster (`flash.DENSE_LENGTH`).
ATTENTION: Mapping[str, Attend] = {
  "flash": FlashAttend(),
  "reference": reference_attend,
  "blockwise": FlashAttend("blockwise", "bthd", "counter"),
}


def layout_of(attend: Attend) -> str:
  """Order of axes that an implementation reads, also inside partials."""
  while isinstance(attend, functools.partial):
    attend = attend.func
  return getattr(attend, "layout", "bthd")


class SelfAttention(nn.Module):
  """Multi-head self-attention over rows that may hold several segments.

  Attributes:
    num_heads: heads h.
    head_dim: width d of a head.
    attend: how scores become outputs; pass a kernel here, not a flag.
    dropout_rate: dropout of the attention weights.
    dtype: compute dtype.
    projection_bias: whether queries, keys and values have a bias.
    kernel_init: initializer of all kernels.
  """

  num_heads: int
  head_dim: int
  attend: Attend = reference_attend
  dropout_rate: float = 0.0
  dtype: Dtype = jnp.float32
  projection_bias: bool = True
  kernel_init: Initializer = bert_init

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t e"],
    segment_ids: Int[Array, "b t"] | None,
    *,
    train: bool,
    **terms: Array,
  ) -> Float[Array, "b t e"]:
    """Mixes positions; `terms` are arguments of `attend`."""
    # The projections write what the kernel reads: nothing is transposed.
    layout = layout_of(self.attend)
    x = shared(x)

    def project(name):
      projected = Linear(
        f"bte,ehd->{layout}",
        (self.num_heads, self.head_dim),
        ("embed", "heads", "head_dim"),
        dtype=self.dtype,
        use_bias=self.projection_bias,
        kernel_init=self.kernel_init,
        name=name,
      )(x)
      # Heads side by side, as the product makes them: it can write into the
      # stack that a loop over layers keeps.
      at, shape = layout.index("h"), projected.shape
      if layout[at : at + 2] == "hd":
        projected = projected.reshape(*shape[:at], -1, *shape[at + 2 :])
      return checkpoint_name(projected, PROJECTIONS).reshape(shape)

    rate = self.dropout_rate if train else 0.0
    mixed = self.attend(
      project("query"),
      project("key"),
      project("value"),
      segment_ids=segment_ids,
      dropout_rate=rate,
      dropout_seed=self.make_rng("dropout") if rate else None,
      **terms,
    )
    return Linear(
      f"{layout},hde->bte",
      (x.shape[-1],),
      ("heads", "head_dim", "embed"),
      dtype=self.dtype,
      kernel_init=self.kernel_init,
      name="output",
    )(mixed)
