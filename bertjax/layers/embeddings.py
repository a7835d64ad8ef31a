"""Input embeddings: token + position + type, norm, dropout (BERT's order)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bertjax.layers.dropout import Dropout
from bertjax.layers.linear import bert_init
from bertjax.layers.matmul import einsum
from bertjax.layers.norm import LayerNorm
from bertjax.parallel.sharding import constrain

# A table this short is selected from, not looked up: its gradient is then a few
# sums over all positions, where a lookup's adds position by position.
_SELECTED_ROWS = 4


class Embed(nn.Module):
  """A lookup table [num_embeddings, emb_dim], float32.

  Attributes:
    num_embeddings: rows.
    emb_dim: width.
    axis: logical name of the row axis.
  """

  num_embeddings: int
  emb_dim: int
  axis: str

  def setup(self):
    self.embedding = self.param(
      "embedding",
      nn.with_logical_partitioning(bert_init, (self.axis, "embed")),
      (self.num_embeddings, self.emb_dim),
      jnp.float32,
    )

  def __call__(self, ids: jax.Array) -> jax.Array:
    """Rows of `ids`; an id outside the table gives NaN, never a wrong row."""
    table = self._gathered()
    if self.num_embeddings > _SELECTED_ROWS:
      # Negative ids would count from the table's end; unsigned they are huge.
      return jnp.take(table, ids.astype(jnp.uint32), axis=0, mode="fill")
    rows = jnp.full((*ids.shape, self.emb_dim), jnp.nan, table.dtype)
    wide = (1,) * ids.ndim + (self.emb_dim,)
    for i in range(self.num_embeddings):
      rows = jnp.where(ids[..., None] == i, table[i].reshape(wide), rows)
    return rows

  def logits(self, hidden: jax.Array, dtype: Dtype) -> Float[Array, "b m v"]:
    """Scores of every row against `hidden` [b, m, e], float32."""
    return einsum("bme,ve->bmv", hidden, self._gathered(), dtype)

  def _gathered(self) -> jax.Array:
    """The table with its width whole on every device.

    Left to itself the partitioner looks up slices of rows and then moves the
    activations, which are larger, through a full copy.
    """
    return constrain(self.embedding, (self.axis, None))


class Embeddings(nn.Module):
  """BERT's input layer: `dropout(norm(token + position + type))`.

  Attributes:
    vocab_size: rows of the token table.
    emb_dim: model width e.
    max_positions: longest sequence.
    position_table: whether positions are added, from a table.
    num_types: rows of the type table; 0 leaves it out.
    position_offset: added to every position; RoBERTa's published tables keep
      two unused rows in front.
    dropout_rate: after the norm.
    epsilon: of the norm.
    dtype: compute dtype of the result.
  """

  vocab_size: int
  emb_dim: int
  max_positions: int
  position_table: bool = True
  num_types: int = 2
  position_offset: int = 0
  dropout_rate: float = 0.0
  epsilon: float = 1e-12
  dtype: Dtype = jnp.float32

  def setup(self):
    self.token = Embed(self.vocab_size, self.emb_dim, "vocab")
    if self.position_table:
      self.position = Embed(
        self.max_positions + self.position_offset, self.emb_dim, "positions"
      )
    if self.num_types:
      self.type = Embed(self.num_types, self.emb_dim, "types")
    self.norm = LayerNorm(self.epsilon, self.dtype)
    self.drop = Dropout(self.dropout_rate)

  def __call__(
    self, batch: Mapping[str, ArrayLike], *, train: bool
  ) -> Float[Array, "b t e"]:
    """Embeds `tokens`, `positions` and `type_ids` (where absent: 0, 1, ...).

    Raises:
      ValueError: the rows are longer than `max_positions`.
    """
    tokens = batch["tokens"]
    if tokens.shape[1] > self.max_positions:
      raise ValueError(
        f"sequence length {tokens.shape[1]} exceeds"
        f" model.max_positions={self.max_positions}; shorten data.seq_len or"
        " raise model.max_positions."
      )
    x = self.token(tokens)
    if self.position_table:
      positions = batch.get("positions")
      if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
      x += self.position(positions + self.position_offset)
    if self.num_types:
      type_ids = batch.get("type_ids")
      x += self.type(jnp.zeros_like(tokens) if type_ids is None else type_ids)
    return self.drop(self.norm(x), train=train)
