"""What data of text add to `Data`: a tokenizer, and rows of its ids."""

import abc
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn

from bertjax.data.base import Data
from bertjax.data.tokenizers import Tokenizer, build_tokenizer


class TextualData(Data):
  """Rows of token ids.

  Attributes:
    tokenizer: trained, loaded or given.
    seq_len: length of a row.
  """

  tokenizer: Tokenizer
  seq_len: int

  def __init__(
    self,
    tokenizer: Mapping[str, Any] | Tokenizer,
    *,
    batch_size: int,
    train_split: str,
    cache_dir: pathlib.Path,
    fingerprint: str,
  ):
    """Builds the tokenizer, if need be from the texts of the training split.

    Args:
      tokenizer: a name of `TOKENIZERS` and its options, or a tokenizer.
      batch_size: rows of the global batch.
      train_split: the split that is trained on.
      cache_dir: where a trained vocabulary lives.
      fingerprint: of the source, under which it is found again.
    """
    self.batch_size, self.train_split = batch_size, train_split
    if not isinstance(tokenizer, Tokenizer):
      tokenizer = build_tokenizer(tokenizer, self.texts, cache_dir, fingerprint)
    self.tokenizer = tokenizer

  @abc.abstractmethod
  def texts(self) -> Iterator[str]:
    """Texts of the training split, from which a vocabulary can be trained."""

  def model(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` with the size of the vocabulary."""
    return with_vocabulary(given, self.tokenizer.vocab_size)

  def check(self, objective: nn.Module) -> None:
    check_length(objective.encoder, self.seq_len)

  def identity(self) -> dict[str, str]:
    # Trained on each host alone, pieces of one count may be ordered anyhow.
    return {
      "tokenizer": self.tokenizer.fingerprint(),
      **super().identity(),
    }

  def save(self, workdir: pathlib.Path) -> None:
    if not (workdir / "tokenizer").exists():
      self.tokenizer.save(workdir / "tokenizer")


def with_vocabulary(
  given: Mapping[str, Any], vocab_size: int
) -> dict[str, Any]:
  """`config.model` with a row for every id; it may ask for more of them.

  Raises:
    ValueError: it asks for fewer.
  """
  spec = {"vocab_size": vocab_size, **given}
  if spec["vocab_size"] < vocab_size:
    raise ValueError(
      f"model.vocab_size={spec['vocab_size']} is smaller than the tokenizer's"
      f" {vocab_size}; use at least that, or leave it out."
    )
  return spec


def check_length(encoder: nn.Module, seq_len: int) -> None:
  """Refuses rows that are longer than an encoder's table of positions.

  Raises:
    ValueError: they are, or the encoder reads no tokens.
  """
  embeddings = getattr(encoder, "make_embeddings", lambda: None)()
  longest = getattr(embeddings, "max_positions", None)
  if longest is None:
    raise ValueError(
      f"model: {type(encoder).__name__} reads no tokens, which is what data"
      " has; choose an encoder of text."
    )
  if seq_len > longest:
    raise ValueError(
      f"data.seq_len={seq_len} exceeds model.max_positions={longest}; shorten"
      " the one or raise the other."
    )
