"""Masked language modelling, with a sentence-pair task if wanted.

BERT (Devlin et al. 2018, section 3.1): predict masked tokens (MLM) and whether
sentence B follows A (NSP). RoBERTa drops the second task; ALBERT replaces it by
sentence order (SOP), which is the same head on other labels.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from bertjax.layers.linear import Linear
from bertjax.layers.norm import LayerNorm
from bertjax.models.encoder import Encoder, HeadStyle
from bertjax.objectives.base import BatchSpec, Metrics, Terms
from bertjax.parallel.sharding import avoid_gathers
from bertjax.registry import lookup


def cross_entropy(
  logits: Float[Array, "*b c"], labels: Int[Array, "*b"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
  """Sums over the positions whose label is not negative.

  Returns:
    Cross-entropy in nats, number of correct guesses, number of positions.
  """
  valid = labels >= 0
  scores, targets = logits.astype(jnp.float32), jnp.maximum(labels, 0)
  if avoid_gathers():
    targets = jax.nn.one_hot(targets, logits.shape[-1])
    losses = optax.softmax_cross_entropy(scores, targets)
  else:
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
  correct = (logits.argmax(-1) == labels) & valid
  return (
    jnp.where(valid, losses, 0.0).sum(),
    correct.sum().astype(jnp.float32),
    valid.sum().astype(jnp.float32),
  )


def gather_positions(
  hidden: Float[Array, "b t e"], positions: Int[Array, "b m"]
) -> Float[Array, "b m e"]:
  """Rows of `hidden` at `positions`."""
  if avoid_gathers():
    chosen = jax.nn.one_hot(positions, hidden.shape[1], dtype=hidden.dtype)
    return jnp.einsum("bmt,bte->bme", chosen, hidden, precision="highest")
  return jnp.take_along_axis(hidden, positions[..., None], axis=1)


class MaskedLMHead(nn.Module):
  """Dense, activation, norm; then scores against the token embedding + bias."""

  style: HeadStyle

  @nn.compact
  def __call__(
    self,
    hidden: Float[Array, "b m e"],
    token_logits: Callable[[jax.Array], jax.Array],
  ) -> Float[Array, "b m v"]:
    z = Linear(
      "bme,ef->bmf",
      (self.style.emb_dim,),
      ("embed", None),
      dtype=self.style.dtype,
      name="transform",
    )(hidden)
    z = self.style.activation(z.astype(jnp.float32)).astype(self.style.dtype)
    z = LayerNorm(self.style.epsilon, self.style.dtype, name="norm")(z)
    bias = self.param(
      "bias",
      nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",)),
      (self.style.vocab_size,),
      jnp.float32,
    )
    return token_logits(z) + bias[None, None]


class Pooler(nn.Module):
  """`tanh(W h + b)` of the first token's hidden state."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, hidden: Float[Array, "b t e"]) -> Float[Array, "b e"]:
    dense = Linear(
      "be,ef->bf",
      (hidden.shape[-1],),
      ("embed", None),
      dtype=self.dtype,
      name="dense",
    )
    return jnp.tanh(dense(hidden[:, 0]).astype(jnp.float32))


class MaskedLM(nn.Module):
  """MLM over the batch's masked positions, plus an optional pair task.

  Attributes:
    encoder: what is trained.
    pair_task: "nsp" or "sop" to learn `pair_labels`, None to leave it out.
    fresh: see `Objective`.
    reads: see `Objective`.
    independent_rows: see `Objective`.
  """

  encoder: Encoder
  pair_task: str | None = None
  fresh: ClassVar[tuple[str, ...]] = ()
  independent_rows: ClassVar[bool] = True

  @property
  def reads(self) -> tuple[str, ...]:
    names = ("tokens", "masked_positions", "labels")
    return (*names, "pair_labels") if self.pair_task else names

  @property
  def coefficients(self) -> dict[str, float]:
    names = ["mlm"] + ([self.pair_task] if self.pair_task else [])
    return dict.fromkeys(names, 1.0)

  def weights(self, batch: Mapping[str, ArrayLike]) -> Terms:
    weights = {"mlm": (batch["labels"] >= 0).sum().astype(jnp.float32)}
    if self.pair_task:
      valid = batch["pair_labels"] >= 0
      weights[self.pair_task] = valid.sum().astype(jnp.float32)
    return weights

  def setup(self):
    style = self.encoder.style
    self.mlm_head = MaskedLMHead(style)
    if self.pair_task:
      self.pooler = Pooler(style.dtype)
      self.pair_head = Linear(
        "be,ec->bc", (2,), ("embed", "classes"), dtype=style.dtype
      )

  def __call__(
    self, batch: Mapping[str, ArrayLike], *, train: bool
  ) -> tuple[Terms, Metrics]:
    hidden = self.encoder(batch, train=train).hidden
    masked = gather_positions(hidden, batch["masked_positions"])
    loss, correct, count = cross_entropy(
      self.mlm_logits(masked), batch["labels"]
    )
    sums = {"mlm": loss}
    metrics = {"mlm_loss": (loss, count), "mlm_accuracy": (correct, count)}
    if self.pair_task:
      loss, correct, count = cross_entropy(
        self.pair_logits(hidden), batch["pair_labels"]
      )
      sums[self.pair_task] = loss
      metrics[f"{self.pair_task}_loss"] = (loss, count)
      metrics[f"{self.pair_task}_accuracy"] = (correct, count)
    return sums, metrics

  def encode(self, batch: Mapping[str, ArrayLike]) -> Float[Array, "b t e"]:
    """Final hidden states, without dropout."""
    return self.encoder(batch, train=False).hidden

  def outputs(self, batch: Mapping[str, ArrayLike]) -> dict[str, jax.Array]:
    """All that the model says of rows; heads without parameters say nothing."""
    hidden = self.encode(batch)
    found, heads = {"hidden": hidden}, self.variables["params"]
    everything = self.is_initializing()
    if everything or "mlm_head" in heads:
      found["mlm_logits"] = self.mlm_logits(hidden)
    if (everything and self.pair_task) or "pair_head" in heads:
      found["pair_logits"] = self.pair_logits(hidden)
    return found

  def row_flops(self, params: Any, batch: BatchSpec) -> float:
    """Of encoder and masked-token head."""
    seq_len, slots = (
      batch[name].shape[-1] for name in ("tokens", "masked_positions")
    )
    return self.encoder.row_flops(params["encoder"], seq_len, slots)

  def mlm_logits(self, hidden: Float[Array, "b m e"]) -> Float[Array, "b m v"]:
    """Vocabulary scores of hidden states, float32."""
    return self.mlm_head(hidden, self.encoder.token_logits)

  def pair_logits(self, hidden: Float[Array, "b t e"]) -> Float[Array, "b c"]:
    """Scores of (in order, not in order) from the first token."""
    return self.pair_head(self.pooler(hidden)).astype(jnp.float32)


PAIR_TASKS = ("nsp", "sop")


def masked_lm(*, encoder: Encoder, pair_task: str | None = None) -> MaskedLM:
  """Builds the objective; see `MaskedLM`.

  Raises:
    ValueError: unknown pair task.
  """
  if pair_task is not None:
    lookup(dict.fromkeys(PAIR_TASKS), pair_task, "objective.pair_task")
  return MaskedLM(encoder=encoder, pair_task=pair_task)
