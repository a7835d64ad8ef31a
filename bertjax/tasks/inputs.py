"""Rows of token ids from one text or two: [CLS] a [SEP] (b [SEP])."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from bertjax.data.tokenizers import ROBERTA_SPECIALS, Tokenizer
from bertjax.registry import lookup

Ids = Int[np.ndarray, "_"]


@dataclasses.dataclass(frozen=True)
class PairStyle:
  """How a second text follows the first.

  Attributes:
    separators: [SEP] tokens between the two.
    second_type: type id of the second text and its [SEP].
  """

  separators: int
  second_type: int


PAIR_STYLES = {"bert": PairStyle(1, 1), "roberta": PairStyle(2, 0)}


def pair_style_of(tokenizer: Tokenizer, name: str | None = None) -> PairStyle:
  """A row of `PAIR_STYLES`; by default the one that goes with a tokenizer.

  Models whose separator is RoBERTa's "</s>" put two of them between texts.
  """
  if name is None:
    roberta = tokenizer.specials.sep == ROBERTA_SPECIALS.sep
    name = "roberta" if roberta else "bert"
  return lookup(PAIR_STYLES, name, "data.pair_style")


def row_length(texts: tuple[Ids, ...], style: PairStyle) -> int:
  """Tokens of a row that is not cut, special ones included."""
  specials = 2 if len(texts) == 1 else 2 + style.separators
  return specials + sum(map(len, texts))


def kept_lengths(first: int, second: int, limit: int) -> tuple[int, int]:
  """Lengths after cutting tokens, one by one, off the end of the longer text.

  Of two equally long texts the second loses, as in the reference.
  """
  excess = first + second - limit
  if excess <= 0:
    return first, second
  short = min(first, second)
  if max(first, second) - excess >= short:  # only the longer one is cut
    return (limit - short, short) if first > second else (short, limit - short)
  return limit - limit // 2, limit // 2


def encode_rows(
  texts: Sequence[tuple[Ids, ...]],
  tokenizer: Tokenizer,
  seq_len: int,
  style: PairStyle = PAIR_STYLES["bert"],
) -> dict[str, np.ndarray]:
  """Arrays of rows from ids without special tokens.

  Args:
    texts: one or two texts a row; longest-first truncation makes them fit.
    tokenizer: for the special tokens.
    seq_len: length t of a row.
    style: how a second text follows.

  Returns:
    tokens, segment_ids, positions and type_ids, int32 [n, t].
  """
  shape = len(texts), seq_len
  tokens = np.full(shape, tokenizer.pad_id, np.int32)
  type_ids = np.zeros(shape, np.int32)
  lengths = np.zeros(len(texts), np.int32)
  sep = np.array([tokenizer.sep_id], np.int32)
  for i, parts in enumerate(texts):
    row = [np.array([tokenizer.cls_id], np.int32)]
    if len(parts) == 1:
      row += [parts[0][: seq_len - 2], sep]
      split = seq_len
    else:
      specials = 2 + style.separators
      a, b = kept_lengths(*map(len, parts), seq_len - specials)
      row += [parts[0][:a], *[sep] * style.separators, parts[1][:b], sep]
      split = 1 + a + style.separators
    ids = np.concatenate(row)
    lengths[i] = len(ids)
    tokens[i, : len(ids)] = ids
    type_ids[i, split : len(ids)] = style.second_type
  real = np.arange(seq_len, dtype=np.int32)[None] < lengths[:, None]
  return {
    "tokens": tokens,
    "segment_ids": real.astype(np.int32),
    "positions": np.where(real, np.arange(seq_len, dtype=np.int32)[None], 0),
    "type_ids": type_ids,
  }


def encode_words(
  words: Sequence[str], tokenizer: Tokenizer
) -> tuple[Ids, Int[np.ndarray, "words"]]:
  """Ids of a list of words, each tokenised alone.

  A word of which nothing is left (control characters) becomes [UNK], so that
  it keeps its label.

  Returns:
    Ids, and the index of every word's first piece.
  """
  # The space makes a whole word of it for byte-level vocabularies too.
  pieces = [
    ids if len(ids) else np.array([tokenizer.unk_id], np.int32)
    for ids in tokenizer.encode_batch([f" {word}" for word in words])
  ]
  counts = np.array([len(p) for p in pieces], np.int64)
  ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
  return ids, np.cumsum(counts) - counts
