"""BERT (Devlin et al. 2018) and RoBERTa (Liu et al. 2019) encoders.

A post-norm Transformer encoder with learned absolute positions. The values
that libraries default differently are written out: norm epsilon 1e-12 (RoBERTa
1e-5), matrices from a normal of 0.02 truncated at two deviations, GELU in its
tanh form as trained (published PyTorch exports use the erf form, "gelu").
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax.typing import Dtype

from bertjax.layers.attention import ATTENTION, Attend, SelfAttention
from bertjax.layers.block import RESIDUALS, Block
from bertjax.layers.embeddings import Embeddings
from bertjax.layers.feed_forward import ACTIVATIONS, FeedForward
from bertjax.layers.norm import LayerNorm
from bertjax.layers.relative import RelativeBias
from bertjax.models.checks import check_at_least, check_heads, check_rates
from bertjax.models.encoder import Encoder, HeadStyle, remat_policy
from bertjax.registry import lookup
from bertjax.reuse import Partial

# Layers, width and heads of the published sizes; f = 4 e and d = 64.
SIZES: dict[str, dict[str, int]] = {
  "tiny": dict(num_layers=2, emb_dim=128, num_heads=2),
  "mini": dict(num_layers=4, emb_dim=256, num_heads=4),
  "small": dict(num_layers=4, emb_dim=512, num_heads=8),
  "medium": dict(num_layers=8, emb_dim=512, num_heads=8),
  "base": dict(num_layers=12, emb_dim=768, num_heads=12),
  "large": dict(num_layers=24, emb_dim=1024, num_heads=16),
}


class Positions(NamedTuple):
  """How an encoder learns where a token is.

  Attributes:
    table: a row by position is added to the token's.
    relative_bias: a number by relative position is added to the scores.
  """

  table: bool
  relative_bias: bool


POSITIONS: dict[str, Positions] = {
  "absolute": Positions(table=True, relative_bias=False),  # BERT
  "relative": Positions(table=False, relative_bias=True),  # T5
  "both": Positions(table=True, relative_bias=True),  # MPNet
}


def bert(
  *,
  vocab_size: int,
  size: str = "base",
  num_layers: int | None = None,
  emb_dim: int | None = None,
  num_heads: int | None = None,
  mlp_dim: int | None = None,
  max_positions: int = 512,
  positions: str = "absolute",
  relative_buckets: int = 32,
  relative_distance: int = 128,
  num_types: int = 2,
  position_offset: int = 0,
  activation: str = "gelu_tanh",
  norm: str = "post",
  epsilon: float = 1e-12,
  dropout_rate: float = 0.1,
  attention_dropout_rate: float | None = None,
  drop_path_rate: float = 0.0,
  scan: bool = True,
  unroll: int = 1,
  remat: str = "auto",
  keep_layers: bool = False,
  dtype: Dtype = jnp.float32,
  attend: str | Attend = "flash",
  causal: bool = False,
) -> Encoder:
  """A BERT encoder of a published size, any dimension of which may be replaced.

  Args:
    vocab_size: rows of the token embedding.
    size: key of `SIZES`, the source of the dimensions left at None.
    num_layers: depth l.
    emb_dim: model width e.
    num_heads: heads h, which must divide e.
    mlp_dim: feed-forward width f, 4 e by default.
    max_positions: longest sequence.
    positions: key of `POSITIONS`.
    relative_buckets: of the bias by relative position, if there is one.
    relative_distance: from which on they are all in the last bucket.
    num_types: sentence types; 0 leaves out the table.
    position_offset: see `Embeddings`.
    activation: key of `ACTIVATIONS`.
    norm: key of `RESIDUALS`: "post" (original), "pre", "none".
    epsilon: of every norm.
    dropout_rate: of embeddings and sublayer outputs.
    attention_dropout_rate: of attention weights; None: `dropout_rate`.
    drop_path_rate: see `Encoder`.
    scan: see `Encoder`.
    unroll: see `Encoder`.
    remat: see `Encoder`.
    keep_layers: see `Encoder`.
    dtype: compute dtype; parameters are float32.
    attend: key of `ATTENTION`, or an implementation.
    causal: no token sees a later one.

  Raises:
    ValueError: an unknown name, a number or rate out of range, or heads that do
      not divide the width.
  """
  dims = _dimensions(
    size, num_layers=num_layers, emb_dim=emb_dim, num_heads=num_heads
  )
  if mlp_dim is None:
    mlp_dim = 4 * dims["emb_dim"]
  if attention_dropout_rate is None:
    attention_dropout_rate = dropout_rate
  check_at_least(
    1,
    vocab_size=vocab_size,
    mlp_dim=mlp_dim,
    max_positions=max_positions,
    unroll=unroll,
  )
  check_at_least(0, num_types=num_types, position_offset=position_offset)
  check_rates(
    dropout_rate=dropout_rate,
    attention_dropout_rate=attention_dropout_rate,
    drop_path_rate=drop_path_rate,
  )
  remat_policy(remat)
  if isinstance(attend, str):
    attend = lookup(ATTENTION, attend, "model.attend")
  if causal:
    attend = Partial(attend, causal=True)
  kind = lookup(POSITIONS, positions, "model.positions")
  act = lookup(ACTIVATIONS, activation, "model.activation")
  make_norm = Partial(LayerNorm, epsilon=epsilon, dtype=dtype)
  looped = scan and unroll < dims["num_layers"]
  embeddings = Partial(
    Embeddings,
    vocab_size=vocab_size,
    emb_dim=dims["emb_dim"],
    max_positions=max_positions,
    position_table=kind.table,
    num_types=num_types,
    position_offset=position_offset,
    dropout_rate=dropout_rate,
    epsilon=epsilon,
    dtype=dtype,
  )
  mixer = Partial(
    SelfAttention,
    num_heads=dims["num_heads"],
    head_dim=dims["emb_dim"] // dims["num_heads"],
    attend=attend,
    dropout_rate=attention_dropout_rate,
    dtype=dtype,
    name="attention",
  )
  feed_forward = Partial(
    FeedForward,
    mlp_dim=mlp_dim,
    activation=act,
    dtype=dtype,
    name="mlp",
  )
  block = Partial(
    Block,
    mixer=mixer,
    feed_forward=feed_forward,
    norm=Partial(make_norm, in_loop=looped),
    residual=lookup(RESIDUALS, norm, "model.norm"),
    dropout_rate=dropout_rate,
  )
  relative_bias = Partial(
    RelativeBias,
    num_heads=dims["num_heads"],
    num_buckets=relative_buckets,
    max_distance=relative_distance,
    bidirectional=not causal,
  )
  return Encoder(
    make_embeddings=embeddings,
    make_block=block,
    num_layers=dims["num_layers"],
    style=HeadStyle(vocab_size, dims["emb_dim"], act, epsilon, dtype),
    make_final_norm=make_norm if norm == "pre" else None,
    make_relative_bias=relative_bias if kind.relative_bias else None,
    drop_path_rate=drop_path_rate,
    scan=scan,
    unroll=unroll,
    remat=remat,
    keep_layers=keep_layers,
    causal=causal,
  )


def _dimensions(size: str, **given: int | None) -> dict[str, int]:
  """Those of a published size, but for what is given."""
  dims = lookup(SIZES, size, "model.size")
  dims = dims | {k: v for k, v in given.items() if v is not None}
  check_at_least(1, **dims)
  check_heads(dims["num_heads"], dims["emb_dim"])
  return dims


# RoBERTa differs from BERT in data and objective; in the network only by these.
roberta = functools.partial(
  bert, num_types=1, position_offset=2, activation="gelu", epsilon=1e-5
)

# The ablation of BERT in which no token sees a later one (section 5.1).
left_to_right_bert = functools.partial(bert, causal=True)
