"""Left-to-right language modelling, scored where a masked LM is.

The ablation "LTR & No NSP" of BERT (Devlin et al. 2018, section 5.1): an
encoder with causal attention learns to predict each next token. It reads the
same batches as the masked LM: the original tokens are put back, and besides the
loss over all tokens it reports loss and accuracy at the masked positions, so
that the two are compared on the same guesses.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from bertjax.models.encoder import Encoder
from bertjax.objectives.base import BatchSpec, Metrics, Terms
from bertjax.objectives.masked_lm import (
  MaskedLMHead,
  cross_entropy,
  gather_positions,
)

Batch = Mapping[str, ArrayLike]


def unmasked(batch: Batch) -> Int[Array, "b t"]:
  """The tokens of a masked batch with the labels back at their positions."""
  rows = jnp.arange(batch["tokens"].shape[0])[:, None]
  length = batch["tokens"].shape[1]
  # Slots without label point past the end, where writing is dropped.
  places = jnp.where(batch["labels"] >= 0, batch["masked_positions"], length)
  return batch["tokens"].at[rows, places].set(batch["labels"], mode="drop")


def has_next(batch: Batch) -> Bool[Array, "b t_minus_1"]:
  """Whether the token after a position belongs to the same segment."""
  ids = batch["segment_ids"]
  return (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)


class LeftToRightLM(nn.Module):
  """Predicts each token of a row from those before it in its segment.

  Attributes:
    encoder: with causal attention, such as the model "left_to_right_bert";
      with any other it would see what it has to predict.
    fresh: see `Objective`.
    reads: see `Objective`.
    independent_rows: see `Objective`.
  """

  encoder: Encoder
  fresh: ClassVar[tuple[str, ...]] = ()
  reads: ClassVar[tuple[str, ...]] = (
    "tokens",
    "segment_ids",
    "masked_positions",
    "labels",
  )
  independent_rows: ClassVar[bool] = True

  @property
  def coefficients(self) -> dict[str, float]:
    return {"lm": 1.0}

  def weights(self, batch: Batch) -> Terms:
    return {"lm": has_next(batch).sum().astype(jnp.float32)}

  def setup(self):
    self.lm_head = MaskedLMHead(self.encoder.style)

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    tokens = unmasked(batch)
    hidden = self.encoder({**batch, "tokens": tokens}, train=train).hidden
    logits = self.lm_head(hidden[:, :-1], self.encoder.token_logits)
    targets = jnp.where(has_next(batch), tokens[:, 1:], -1)
    loss, correct, count = cross_entropy(logits, targets)
    metrics = {"lm_loss": (loss, count), "lm_accuracy": (correct, count)}
    # The guess about position p stands at p - 1; [CLS] is never masked.
    before = jnp.maximum(batch["masked_positions"] - 1, 0)
    at_masked = cross_entropy(gather_positions(logits, before), batch["labels"])
    metrics["mlm_loss"] = at_masked[0], at_masked[2]
    metrics["mlm_accuracy"] = at_masked[1], at_masked[2]
    return {"lm": loss}, metrics

  def encode(self, batch: Batch) -> Float[Array, "b t e"]:
    """Final hidden states of the batch's own tokens, without dropout."""
    return self.encoder(batch, train=False).hidden

  def row_flops(self, params: Any, batch: BatchSpec) -> float:
    """Of encoder and head, which guesses what follows each token but one."""
    seq_len = batch["tokens"].shape[-1]
    return self.encoder.row_flops(params["encoder"], seq_len, seq_len - 1)

  def outputs(self, batch: Batch) -> Terms:
    """Hidden states and, for each token, scores of what follows."""
    hidden = self.encode(batch)
    logits = self.lm_head(hidden, self.encoder.token_logits)
    return {"hidden": hidden, "lm_logits": logits}


def left_to_right_lm(*, encoder: Encoder) -> LeftToRightLM:
  """Builds the objective; see `LeftToRightLM`.

  Raises:
    ValueError: the encoder is not causal.
  """
  if not encoder.causal:
    raise ValueError(
      "objective.name='left_to_right_lm' needs an encoder that sees no later"
      " token; set model.name='left_to_right_bert'."
    )
  return LeftToRightLM(encoder)
