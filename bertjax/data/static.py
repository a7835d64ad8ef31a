"""`config.data` for ready-made rows: TFRecords of masked BERT instances.

The files of the original `create_pretraining_data`, or of `python -m
bertjax.data.bert_instances`, train as they are: masked once, not per epoch.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.data.audit import original_tokens
from bertjax.data.bert_instances import StaticDataset, read_tfrecord
from bertjax.data.masked import MaskedData
from bertjax.data.tokenizers import Tokenizer
from bertjax.registry import lookup


class StaticData(MaskedData):
  """Rows as the files have them, which also say how long they are."""

  masking = None

  def __init__(
    self,
    *,
    files: Mapping[str, str | Sequence[str]],
    tokenizer: Mapping[str, Any] | Tokenizer,
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
      ValueError: no file, or none of BERT instances, an unknown split, or ids
        beyond the vocabulary.
    """
    self._files, self._seed = dict(files), seed
    self._datasets: dict[str, StaticDataset] = {}
    super().__init__(
      tokenizer,
      batch_size=batch_size,
      train_split=train_split,
      cache_dir=cache_dir,
      fingerprint="static",
    )
    self.seq_len = self.dataset().seq_len

  def texts(self) -> Iterator[str]:
    return iter(())  # there are only ids

  def dataset(self, split: str | None = None) -> StaticDataset:
    split = split or self.train_split
    if split not in self._datasets:
      rows = read_tfrecord(
        lookup(self._files, split, "data.files"), f"data.files.{split}"
      )
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
    """How often each id occurs in a split; of special ones, [UNK] alone.

    `create_pretraining_data` masks [UNK] as if it were a word.
    """
    dataset = self.dataset(split)
    rows = dataset.rows(0, dataset.rows_per_epoch(0))
    tokens = original_tokens(rows)[rows["segment_ids"] > 0]
    counts = np.bincount(tokens, minlength=self.tokenizer.vocab_size)
    special = self.tokenizer.special_ids
    counts[special[special != self.tokenizer.unk_id]] = 0
    return counts

  def facts(self) -> dict[str, Any]:
    return {"rows": self.dataset().rows_per_epoch(0)}
