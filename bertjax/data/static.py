"""`config.data` for ready-made rows: TFRecords of masked BERT instances.

The files of the original `create_pretraining_data`, or of `python -m
bertjax.data.bert_instances`, train as they are: masked once, not per epoch.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.data.audit import original_tokens
from bertjax.data.bert_instances import StaticDataset, read_tfrecord
from bertjax.data.tokenizers import Tokenizer, build_tokenizer
from bertjax.registry import lookup


class StaticData:
  """Everything that a run reads, by split; the twin of `TextData`.

  Attributes:
    tokenizer: the one that made the files.
    batch_size: rows of the global batch.
    seq_len: length of a row, as the files have it.
    train_split: the split that is trained on.
    masking: None: nothing is masked here.
  """

  masking = None

  def __init__(
    self,
    *,
    files: Mapping[str, str | Sequence[str]],
    tokenizer: Mapping[str, Any],
    batch_size: int,
    train_split: str = "train",
    seed: int,
    cache_dir: pathlib.Path,
  ):
    """Reads the training split into memory.

    Args:
      files: by split: paths or patterns of TFRecords.
      tokenizer: a name of `TOKENIZERS` and its options; "train" has no text
        here.
      batch_size: rows of the global batch.
      train_split: the split that is trained on.
      seed: of the order of rows.
      cache_dir: of the tokenizer.

    Raises:
      ValueError: no file, an unknown split, or ids beyond the vocabulary.
    """
    self.batch_size, self.train_split = batch_size, train_split
    self._files, self._seed = dict(files), seed
    self._datasets: dict[str, StaticDataset] = {}
    self.tokenizer: Tokenizer = build_tokenizer(
      tokenizer, tuple, cache_dir, "static"
    )
    self.seq_len = self.dataset().seq_len

  def dataset(self, split: str | None = None) -> StaticDataset:
    """The rows of a split, the training one by default."""
    split = split or self.train_split
    if split not in self._datasets:
      rows = read_tfrecord(lookup(self._files, split, "data.files"))
      largest = max(int(rows["tokens"].max()), int(rows["labels"].max()))
      if largest >= self.tokenizer.vocab_size:
        raise ValueError(
          f"data.files.{split} holds id {largest}, beyond the"
          f" {self.tokenizer.vocab_size} of data.tokenizer; name the tokenizer"
          " that made the files."
        )
      self._datasets[split] = StaticDataset(
        rows, pad_id=self.tokenizer.pad_id, seed=self._seed
      )
    return self._datasets[split]

  def token_counts(self, split: str | None = None) -> np.ndarray:
    """How often each id occurs in a split, special ones aside."""
    dataset = self.dataset(split)
    rows = dataset.rows(0, dataset.rows_per_epoch(0))
    tokens = original_tokens(rows)[rows["segment_ids"] > 0]
    counts = np.bincount(tokens, minlength=self.tokenizer.vocab_size)
    counts[self.tokenizer.special_ids] = 0
    return counts

  def facts(self) -> dict[str, float]:
    """What the health report says of the corpus."""
    return {"rows": self.dataset().rows_per_epoch(0)}
