"""`config.data` for text: a source, a tokenizer, a cache, rows."""

import pathlib
from collections.abc import Mapping
from typing import Any

from bertjax import registry
from bertjax.data.cache import TokenCache, build_cache
from bertjax.data.dataset import TextDataset
from bertjax.data.sources import SOURCES
from bertjax.data.tokenizers import Tokenizer, build_tokenizer


class TextData:
  """Everything that a run reads, by split.

  Attributes:
    tokenizer: trained, loaded or taken from the cache folder.
    batch_size: rows of the global batch.
    seq_len: length of a row.
    train_split: the split that is trained on.
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
    seed: int,
    cache_dir: pathlib.Path,
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
      seed: of shuffling, instance making and masking.
      cache_dir: where vocabularies and token caches live.
    """
    self.batch_size, self.seq_len = batch_size, seq_len
    self.train_split = train_split
    self.source = registry.build(SOURCES, source, "data.source")
    if not isinstance(tokenizer, Tokenizer):
      tokenizer = build_tokenizer(
        tokenizer,
        lambda: (e["text"] for e in self.source.examples(train_split)),
        cache_dir,
        self.source.fingerprint(),
      )
    self.tokenizer: Tokenizer = tokenizer
    self._rows = dict(
      instances=instances, masking=masking, seq_len=seq_len, seed=seed
    )
    self._splitter = splitter
    self._cut = max_tokens_per_document
    self._cache_dir = cache_dir
    self._caches: dict[str, TokenCache] = {}

  def cache(self, split: str) -> TokenCache:
    """The tokenised documents of a split."""
    if split not in self._caches:
      self._caches[split] = build_cache(
        self.source,
        split,
        self.tokenizer,
        self._splitter,
        self._cache_dir,
        max_tokens_per_document=self._cut,
      )
    return self._caches[split]

  def dataset(self, split: str | None = None) -> TextDataset:
    """The rows of a split, the training one by default."""
    cache = self.cache(split or self.train_split)
    return TextDataset(cache, self.tokenizer, **self._rows)
