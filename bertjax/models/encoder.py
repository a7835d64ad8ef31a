"""A Transformer encoder: embeddings, then a stack of blocks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from bertjax.layers.attention import PROJECTIONS
from bertjax.layers.block import SUM
from bertjax.layers.drop_path import linear_rates
from bertjax.layers.feed_forward import INNER
from bertjax.layers.norm import STATISTICS
from bertjax.layers.statistics import ROWS, SUMS
from bertjax.metrics import meters
from bertjax.parallel.sharding import constrain, platform
from bertjax.registry import lookup
from bertjax.rules import path_name
from kernels.flash_attention.backend import RESIDUALS

Batch = Mapping[str, Any]

# What a remat policy keeps of the forward pass; all else is computed again.
REMAT: dict[str, Callable | None] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # Attention is not run again; it reads projections that are.
  "attention": jax.checkpoint_policies.save_only_these_names(*RESIDUALS),
  # No product is computed again, only what lies between them: norms,
  # activations, dropout.
  "products": jax.checkpoint_policies.save_only_these_names(
    PROJECTIONS, *RESIDUALS, SUM, INNER, STATISTICS
  ),
}


def remat_policy(name: str) -> Callable | None:
  """A row of `REMAT`, or for "auto" the fastest on the context's platform.

  Raises:
    ValueError: unknown name.
  """
  if name == "auto":
    name = "products" if platform() == "tpu" else "none"
  return lookup({"auto": None, **REMAT}, name, "model.remat")


@flax.struct.dataclass
class Encoded:
  """What an encoder returns.

  Attributes:
    hidden: final hidden states [b, t, e], compute dtype.
    layers: hidden states before the first and after every block,
      [l + 1, b, t, e], if they were asked for.
  """

  hidden: jax.Array
  layers: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class HeadStyle:
  """What the heads on top of an encoder share with it.

  Attributes:
    vocab_size: rows of the token embedding v; None where there is none.
    emb_dim: model width e.
    activation: of the encoder's feed-forward layers.
    epsilon: of its norms.
    dtype: compute dtype.
  """

  vocab_size: int | None
  emb_dim: int
  activation: Callable[[jax.Array], jax.Array]
  epsilon: float
  dtype: Dtype = jnp.float32


class Encoder(nn.Module):
  """Embeddings and `num_layers` equal blocks.

  Attributes:
    make_embeddings: makes the input layer; that of a language model offers
      `token.logits`.
    make_block: makes a block, called as `block(x, segment_ids, train=...)`,
      and with `relative_bias` and `drop_path_rate` if there are any.
    num_layers: depth l.
    style: what heads need to know.
    make_final_norm: makes a norm of the output (pre-norm stacks), or None.
    make_relative_bias: makes what gives the layers their common bias by
      relative position, called as `relative_bias(t, t)`, or None.
    make_positions: makes what is added to the input of every block, called as
      `positions(batch)` for [b, t, e], or None.
    drop_path_rate: stochastic depth of the last layer; those before have less,
      and the first has none.
    scan: parameters of all layers stacked on a leading axis, so that compile
      time is constant in depth. The unscanned twin keeps `layers_0`, ...; a
      TPU runs it faster, for what one layer needs moves while another computes.
    remat: key of `REMAT`, or "auto": "products" on a TPU, where memory is the
      slower part, else "none".
    unroll: layers per scan iteration.
    keep_layers: also return every block's output.
    causal: whether the blocks let no position see a later one, for objectives
      that depend on it.
  """

  make_embeddings: Callable[[], nn.Module]
  make_block: Callable[[], nn.Module]
  num_layers: int
  style: HeadStyle
  make_final_norm: Callable[[], nn.Module] | None = None
  make_relative_bias: Callable[[], nn.Module] | None = None
  make_positions: Callable[[], nn.Module] | None = None
  drop_path_rate: float = 0.0
  scan: bool = True
  remat: str = "auto"
  unroll: int = 1
  keep_layers: bool = False
  causal: bool = False

  @property
  def vocab_size(self) -> int:
    """Rows of the token embedding."""
    return self.style.vocab_size

  def setup(self):
    self.embeddings = self.make_embeddings()
    if self.scan:
      self.layers = self.make_block()
    else:
      self.layers = [self.make_block() for _ in range(self.num_layers)]
    if self.make_final_norm is not None:
      self.final_norm = self.make_final_norm()
    if self.make_relative_bias is not None:
      self.relative_bias = self.make_relative_bias()
    if self.make_positions is not None:
      self.positions = self.make_positions()

  def __call__(self, batch: Batch, *, train: bool = False) -> Encoded:
    """Encodes what its embeddings read, such as `tokens` [b, t].

    Positions see those with the same of the batch's `segment_ids`; where these
    are absent, a row is one full segment.
    """
    batch = self.prepare(batch)
    x = self.embeddings(batch, train=train)
    x = constrain(x, ("batch", "length", None))
    segment_ids, shared = batch.get("segment_ids"), {}
    if self.make_relative_bias is not None:
      shared["relative_bias"] = self.relative_bias(x.shape[1], x.shape[1])

    positions = None
    if self.make_positions is not None:
      positions = self.positions(batch)
    rates = linear_rates(self.num_layers, self.drop_path_rate)

    def body(block, x, rate):
      own = {} if rate is None else {"drop_path_rate": rate}
      if positions is not None:
        x = x + positions
      return block(x, segment_ids, train=train, **own, **shared)

    policy = remat_policy(self.remat)
    if policy is not None:
      # In a loop the barrier against merging is superfluous, and slow.
      looped = self.scan and self.unroll < self.num_layers
      body = nn.remat(body, policy=policy, prevent_cse=not looped)

    if self.scan:

      def scanned(block, x, rate):
        y = body(block, x, rate)
        return y, y if self.keep_layers else None

      last, outputs = nn.scan(
        scanned,
        variable_axes={"params": 0, SUMS: 0, ROWS: 0},
        split_rngs={"params": True, "dropout": True},
        length=self.num_layers,
        unroll=self.unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
        # Nothing is broadcast out of it, and to see that traces it again.
        # That also draws keys: without, a seed's initial values would change.
        check_constancy_invariants=self.is_initializing(),
      )(self.layers, x, rates)
    else:
      last, outputs = x, []
      for i, layer in enumerate(self.layers):
        last = body(layer, last, None if rates is None else rates[i])
        outputs.append(last)

    layers = None
    if self.keep_layers:
      layers = jnp.concatenate([x[None], jnp.stack(list(outputs))])
    return Encoded(self.normed(last), layers)

  def prepare(self, batch: Batch) -> Batch:
    """What a batch goes through, without parameters, before parts see it.

    Doing it twice is doing it once, so that an objective may do it before.
    """
    return batch

  def normed(self, hidden: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """The final norm, also of a block before the last; without one, nothing."""
    return hidden if self.make_final_norm is None else self.final_norm(hidden)

  def token_logits(
    self, hidden: Float[Array, "b m e"]
  ) -> Float[Array, "b m v"]:
    """Vocabulary scores by the token embedding (tied weights), float32."""
    return self.embeddings.token.logits(hidden, hidden.dtype)

  def row_flops(
    self, params: Mapping[str, Any], seq_len: int, slots: int = 0
  ) -> float:
    """FLOPs of the matrix products of one row's forward pass.

    Args:
      params: the encoder's parameters, or their shapes.
      seq_len: length of the row.
      slots: positions whose scores of the vocabulary a head computes.
    """
    sizes = sizes_of(params)
    return meters.forward_flops(**sizes, seq_len=seq_len, max_masked=slots)


def sizes_of(params: Mapping[str, Any]) -> dict[str, int]:
  """Dimensions of an encoder, read off its (abstract) parameters."""
  leaves = {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  vocab_size, emb_dim = leaves["embeddings/token/embedding"].shape
  inner = [v for k, v in leaves.items() if k.endswith("mlp/up/bias")]
  mlp_dim = inner[0].shape[-1]
  return dict(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    mlp_dim=mlp_dim,
    num_layers=sum(v.size for v in inner) // mlp_dim,
  )


def stack_layers(params: dict, num_layers: int) -> dict:
  """`layers_0`, `layers_1`, ... of an unscanned encoder -> stacked `layers`.

  Args:
    params: an encoder's parameter dict (numpy or jax leaves), or one that
      holds the encoder's under "encoder".
    num_layers: depth l.
  """
  if "encoder" in params:
    return params | {"encoder": stack_layers(params["encoder"], num_layers)}
  names = [f"layers_{i}" for i in range(num_layers)]
  rest = {k: v for k, v in params.items() if k not in names}
  stacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(params[n] for n in names)
  )
  return rest | {"layers": stacked}


def unstack_layers(params: dict, num_layers: int) -> dict:
  """The inverse of `stack_layers`."""
  if "encoder" in params:
    return params | {"encoder": unstack_layers(params["encoder"], num_layers)}
  rest = {k: v for k, v in params.items() if k != "layers"}
  for i in range(num_layers):
    rest[f"layers_{i}"] = jax.tree.map(
      lambda leaf, i=i: leaf[i], params["layers"]
    )
  return rest
