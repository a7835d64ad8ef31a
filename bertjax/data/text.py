"""`config.data` for text: a source, a tokenizer, a cache, rows."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bertjax import registry
from bertjax.data.cache import CHECKS, TokenCache
from bertjax.data.cache_build import (
  MakeShards,
  build_cache,
  shards_in_order,
)
from bertjax.data.masked import MaskedData
from bertjax.data.masking import Masking
from bertjax.data.sources import SOURCES, Preprocessed, Source
from bertjax.data.sources.base import Measure, measured
from bertjax.data.text_dataset import TextDataset
from bertjax.data.tokenizers import Tokenizer


class TextData(MaskedData):
  """Documents, tokenised once and masked anew in every epoch.

  Attributes:
    source: where documents come from.
    splitter: key of `SPLITTERS`: how documents become sentences.
  """

  def __init__(
    self,
    *,
    source: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | Tokenizer,
    seq_len: int,
    batch_size: int,
    instances: Mapping[str, Any],
    masking: Mapping[str, Any] | None = None,
    splitter: str = "sentences",
    train_split: str = "train",
    max_tokens_per_document: int | None = None,
    preprocess: Sequence[str | Mapping[str, Any]] = (),
    seed: int,
    cache_dir: pathlib.Path,
    mask_seed: int | None = None,
    verify: str = "checksums",
  ):
    """Builds the tokenizer; token caches are built when a split is asked for.

    Args:
      source: a name of `SOURCES` and its options.
      tokenizer: a name of `TOKENIZERS` and its options, or a tokenizer.
      seq_len: length of a row.
      batch_size: rows of the global batch.
      instances: a name of `INSTANCES` and its options.
      masking: arguments of `Masking`.
      splitter: key of `SPLITTERS`: how documents become sentences.
      train_split: the split that is trained on and makes the vocabulary.
      max_tokens_per_document: longer documents are cut; None: never.
      preprocess: names of `PREPROCESSORS`, or `name` and options, that every
        text goes through; the model's own, which `bertjax.predict` applies too.
      seed: of shuffling, instance making and masking.
      cache_dir: where vocabularies and token caches live.
      mask_seed: of masking, if it is another one.
      verify: how token caches that are there are checked: "checksums" reads
        them whole, a second or less per GB; "sizes" does not.
    """
    self.seq_len = seq_len
    self.source = registry.build(SOURCES, source, "data.source")
    if preprocess:
      self.source = Preprocessed(self.source, preprocess, "data.preprocess")
    super().__init__(
      tokenizer,
      batch_size=batch_size,
      train_split=train_split,
      cache_dir=cache_dir,
      fingerprint=self.source.fingerprint(),
    )
    self._rows = dict(
      instances=instances,
      masking=masking,
      seq_len=seq_len,
      seed=seed,
      mask_seed=mask_seed,
    )
    self.splitter = splitter
    self._cut = max_tokens_per_document
    registry.lookup(dict.fromkeys(CHECKS), verify, "data.verify")
    self._cache_dir, self._verify = cache_dir, verify
    self._caches: dict[str, TokenCache] = {}
    facts = [self.tokenizer.fingerprint(), splitter, self._cut, seq_len]
    self.source = measured(
      self.source,
      Measure(self._size, [*facts, dict(instances), dict(masking or {})]),
    )

  def texts(self) -> Iterator[str]:
    return (e["text"] for e in self.source.examples(self.train_split))

  def cache(
    self, split: str, make_shards: MakeShards = shards_in_order
  ) -> TokenCache:
    """The tokenised documents of a split; see `build_cache`."""
    if split not in self._caches:
      self._caches[split] = self._cache_of(self.source, split, make_shards)
    return self._caches[split]

  def _cache_of(
    self,
    source: Source,
    split: str,
    make_shards: MakeShards = shards_in_order,
  ) -> TokenCache:
    return build_cache(
      source,
      split,
      self.tokenizer,
      self.splitter,
      self._cache_dir,
      max_tokens_per_document=self._cut,
      verify=self._verify,
      make_shards=make_shards,
    )

  def _size(self, source: Source, unit: str) -> int:
    """Tokens, or rows of an epoch ("instances"), of a part of a mixture."""
    cache = self._cache_of(source, "train")
    if unit == "tokens":
      return cache.num_tokens
    # One seed for all runs: sizes must not depend on theirs.
    rows = self._rows | dict(seed=0, mask_seed=None)
    return TextDataset(cache, self.tokenizer, **rows).rows_per_epoch(0)

  def dataset(self, split: str | None = None) -> TextDataset:
    cache = self.cache(split or self.train_split)
    return TextDataset(cache, self.tokenizer, **self._rows)

  @property
  def masking(self) -> Masking | None:
    """How training rows are masked."""
    return self.dataset().masking

  def token_counts(self, split: str | None = None) -> np.ndarray:
    """How often each id occurs (in a sample of a large split), none special."""
    cache = self.cache(split or self.train_split)
    counts = token_counts(cache, self.tokenizer.vocab_size)
    counts[self.tokenizer.special_ids] = 0
    return counts

  def facts(self) -> dict[str, Any]:
    cache = self.cache(self.train_split)
    documents = cache.num_documents
    return {
      "documents": documents,
      "tokens": cache.num_tokens,
      "duplicate_share": cache.duplicates / (documents + cache.duplicates),
    }


def token_counts(
  cache: Any, vocab_size: int, max_documents: int = 20_000
) -> np.ndarray:
  """How often each id occurs in (evenly spaced) documents of a token cache.

  Args:
    cache: a `TokenCache`.
    vocab_size: length of the result.
    max_documents: bounds the reading on large corpora.

  Returns:
    int64 [vocab_size].
  """
  count = len(cache.document_lengths)
  chosen = np.unique(
    np.linspace(0, count - 1, min(count, max_documents)).astype(np.int64)
  )
  totals = np.zeros(vocab_size, np.int64)
  for start in range(0, len(chosen), 256):
    documents = cache.documents(chosen[start : start + 256])
    tokens = np.concatenate([d.tokens for d in documents])
    totals += np.bincount(tokens, minlength=vocab_size)[:vocab_size]
  return totals
