"""Guesses for masked tokens."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from bertjax.data.tokenizers import Tokenizer
from bertjax.loading import LoadedModel
from bertjax.objectives.masked_lm import gather_positions
from bertjax.predict import rows as rows_lib


@dataclasses.dataclass(frozen=True)
class Guess:
  """One candidate for a mask.

  Attributes:
    piece: the vocabulary's entry.
    token: its id.
    probability: among all pieces.
    text: the whole text with every mask filled by its guess of this rank, as
      its tokens are decoded: special ones, and so unknown words, are left out.
  """

  piece: str
  token: int
  probability: float
  text: str


@functools.partial(
  jax.jit, static_argnames=("objective", "top_k", "num_pieces")
)
def _fill(
  params: Any,
  batch: dict[str, jax.Array],
  places: jax.Array,
  *,
  objective: nn.Module,
  top_k: int,
  num_pieces: int,
) -> tuple[jax.Array, jax.Array]:
  variables = {"params": params}
  hidden = objective.apply(variables, batch, method="encode")
  masked = gather_positions(hidden, places)
  logits = objective.apply(variables, masked, method="mlm_logits")
  # Rows beyond the tokenizer's pieces pad the table for sharding.
  probabilities = jax.nn.softmax(logits[..., :num_pieces])
  return tuple(jax.lax.top_k(probabilities, top_k))


def masked_rows(
  texts: Sequence[str],
  tokenizer: Tokenizer,
  clean: Callable[[str], str],
  max_length: int,
  *,
  truncate: bool = False,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Rows of texts, and the places of their masks; arguments as of `rows_of`.

  Raises:
    ValueError: a text without mask or too long.
  """
  rows = rows_lib.rows_of(
    texts, tokenizer, clean, max_length, parse_special=True, truncate=truncate
  )
  places = [np.flatnonzero(row == tokenizer.mask_id) for row in rows]
  for i, found in enumerate(places):
    if not len(found):
      mask = tokenizer.specials.mask
      cut = truncate and mask in texts[i]
      raise ValueError(
        f"Text {i} ({texts[i][:60]!r}) has no {mask}"
        + (" left after truncation." if cut else "; mark what to guess.")
      )
  return rows, places


def fill_mask(
  model: LoadedModel,
  texts: Sequence[str],
  top_k: int = 5,
  *,
  batch_size: int = 32,
  truncate: bool = False,
) -> list[list[list[Guess]]]:
  """The most probable pieces for every mask of every text.

  Args:
    model: with an MLM head.
    texts: each with at least one mask, spelled as in its tokenizer.
    top_k: guesses per mask, best first.
    batch_size: texts at a time.
    truncate: cut texts that are too long at their end.

  Returns:
    For each text, for each of its masks, `top_k` guesses.

  Raises:
    ValueError: a text without mask or too long, or a model without MLM head.
  """
  tokenizer = model.need_tokenizer()
  model.need_head("mlm_head", "fill_mask")
  if not 1 <= top_k <= tokenizer.vocab_size:
    raise ValueError(
      f"top_k={top_k} must lie between 1 and the vocabulary's"
      f" {tokenizer.vocab_size}."
    )
  rows, places = masked_rows(
    texts, tokenizer, model.clean, model.max_positions, truncate=truncate
  )
  results: list[Any] = [None] * len(rows)
  for chosen, batch in rows_lib.batches(
    rows, batch_size, model.max_positions, tokenizer.pad_id
  ):
    slots = rows_lib.power_of_two(max(len(places[i]) for i in chosen))
    masked = np.zeros((len(batch["tokens"]), slots), np.int32)
    for row, i in enumerate(chosen):
      masked[row, : len(places[i])] = places[i]
    probabilities, tokens = jax.device_get(
      _fill(
        model.params,
        batch,
        masked,
        objective=model.objective,
        top_k=top_k,
        num_pieces=tokenizer.vocab_size,
      )
    )
    for row, i in enumerate(chosen):
      n = len(places[i])
      results[i] = _guesses(
        tokenizer, rows[i], places[i], tokens[row, :n], probabilities[row, :n]
      )
  return results


def _guesses(
  tokenizer: Any,
  row: np.ndarray,
  places: np.ndarray,
  tokens: np.ndarray,
  probabilities: np.ndarray,
) -> list[list[Guess]]:
  """Guesses of one text; `tokens` and `probabilities` are [masks, k]."""
  texts = []
  for rank in range(tokens.shape[1]):
    filled = row.copy()
    filled[places] = tokens[:, rank]
    texts.append(tokenizer.decode(filled))
  return [
    [
      Guess(piece, int(token), float(p), text)
      for piece, token, p, text in zip(
        tokenizer.pieces(ids), ids, chances, texts
      )
    ]
    for ids, chances in zip(tokens, probabilities)
  ]
