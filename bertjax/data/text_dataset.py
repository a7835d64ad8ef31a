"""Rows of text: shuffle documents, plan blocks, assemble, mask.

Within an epoch, documents are shuffled and cut into *blocks* of consecutive
documents; an instance mode plans the rows of a block from its lengths, and the
rows of a block are shuffled again. Blocks keep planning bounded in memory and
let each document be read about once per epoch although rows come in random
order. Reading is lazy: only documents that a wanted row touches are read.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import operator
import threading
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Int, Integer

from bertjax import registry
from bertjax.data import instances as instances_lib
from bertjax.data import masking as masking_lib
from bertjax.data.dataset import RowDataset, concatenate
from bertjax.data.instances import plan as plan_lib

_DOCUMENT_ORDER, _ROWS = 0, 1  # what a random generator is for
_BLOCKS_KEPT = 4


@runtime_checkable
class Cache(Protocol):
  """What is needed of a token cache (`bertjax.data.cache.TokenCache`)."""

  manifest: Mapping[str, Any]

  @property
  def document_lengths(self) -> Int[np.ndarray, "documents"]: ...

  @property
  def sentence_lengths(self) -> Int[np.ndarray, "sentences"]: ...

  @property
  def sentence_offsets(self) -> Int[np.ndarray, "documents_plus_1"]: ...

  @property
  def document_sources(self) -> Integer[np.ndarray, "documents"] | None: ...

  def documents(self, indices) -> list[Any]: ...


class TextDataset(RowDataset):
  """Rows of tokenised documents, made and masked on the fly.

  Row i of epoch k is a pure function of (seed, k, i). Epochs may differ in
  their number of rows; blocks are planned as the stream reaches them, so
  starting or resuming costs the plan of one block (about 0.1 s), not of an
  epoch. Jumping ahead without a saved state plans the blocks in between.
  """

  def __init__(
    self,
    cache: Cache,
    tokenizer: Any,
    *,
    instances: Mapping[str, Any],
    masking: Mapping[str, Any] | None = None,
    seq_len: int,
    seed: int = 0,
    mask_seed: int | None = None,
    block_tokens: int = 2**22,
    block_documents: int = 64,
  ):
    """Checks the parts against each other; reads lengths only.

    Args:
      cache: the tokenised documents.
      tokenizer: the tokenizer that made them.
      instances: `config.data.instances`: a name of `INSTANCES` and options.
      masking: `config.data.masking`, arguments of `Masking`; None leaves rows
        whole, without `labels`.
      seq_len: length t of a row.
      seed: of shuffling, instance making and masking.
      mask_seed: of masking, if it is another one.
      block_tokens: tokens per block, on average; memory is 4 bytes each.
      block_documents: the least documents per block, if there are as many.

    Raises:
      ValueError: options out of range, an empty cache, or a cache of another
        tokenizer.
    """
    self.cache, self.tokenizer = cache, tokenizer
    self.seq_len, self.seed = seq_len, operator.index(seed)
    self._mask_seed = self.seed if mask_seed is None else mask_seed
    self.pad_id = tokenizer.pad_id
    self.mode = registry.build(
      instances_lib.INSTANCES, instances, "data.instances"
    )
    self.masking = None if masking is None else build_masking(masking)
    self._vocabulary = masking_lib.Vocabulary.of(tokenizer)
    self._instances = dict(instances)
    self._block_tokens, self._block_documents = block_tokens, block_documents
    self._check(instances)
    self._lengths = np.asarray(cache.document_lengths)
    count = len(self._lengths)
    self._num_blocks = max(
      1,
      min(
        round(int(self._lengths.sum()) / block_tokens),
        count // block_documents,
      ),
    )
    self._lock = threading.Lock()
    self._blocks = collections.OrderedDict()
    self._orders = collections.OrderedDict()
    self._block_rows = {}
    # Known first rows of blocks: (row, epoch, block, row within the epoch).
    self._anchors = [(0, 0, 0, 0)]

  def _check(self, instances) -> None:
    name = instances["name"]
    check_seq_len(self.seq_len, self.mode, name)
    if self.masking is not None:
      self.masking.slots(self.seq_len)  # refuses what does not fit
    count = len(self.cache.document_lengths)
    if count < self.mode.min_documents:
      raise ValueError(
        f"data.source gave {count} documents, but"
        f" data.instances.name={name!r} needs {self.mode.min_documents} or"
        " more; check the source and the split."
      )
    if self.mode.needs_sources and self.cache.document_sources is None:
      raise ValueError(
        f"data.instances.negatives={instances['negatives']!r} needs the source"
        f" of each document, which {self.cache!r} does not hold: it was built"
        " before sources were recorded. Delete that folder and start again to"
        " have it rebuilt, or use negatives='any_document'."
      )
    made_by = _tokenizer_of(self.cache)
    if made_by is not None and made_by != self.tokenizer.fingerprint():
      raise ValueError(
        f"data.tokenizer has fingerprint {self.tokenizer.fingerprint()}, but"
        f" the token cache was made with {made_by}; build the cache anew"
        " with this tokenizer."
      )

  @functools.cached_property
  def row_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    return text_row_spec(self.mode, self.masking, self.seq_len)

  def fingerprint(self) -> str:
    facts = {
      "cache": self.cache.manifest,
      "tokenizer": self.tokenizer.fingerprint(),
      "documents": [len(self._lengths), int(self._lengths.sum())],
      "instances": [self._instances["name"], dataclasses.asdict(self.mode)],
      "masking": self.masking and dataclasses.asdict(self.masking),
      "seq_len": self.seq_len,
      "seed": self.seed,
      "blocks": self._num_blocks,
    }
    if self._mask_seed != self.seed:
      facts["mask_seed"] = self._mask_seed
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def reseeded(self, seed: int) -> "TextDataset":
    return TextDataset(
      self.cache,
      self.tokenizer,
      instances=self._instances,
      masking=self.masking and dataclasses.asdict(self.masking),
      seq_len=self.seq_len,
      seed=seed,
      block_tokens=self._block_tokens,
      block_documents=self._block_documents,
    )

  def rows_per_epoch(self, epoch: int) -> int:
    """Plans every block of the epoch the first time: see the mode's cost."""
    return sum(self._rows_of(epoch, i) for i in range(self._num_blocks))

  def epoch_of(self, row: int) -> tuple[int, int]:
    with self._lock:
      first, epoch, _, within = self._locate(row)
    return epoch, within + row - first

  def anchor(self, row: int) -> list[int]:
    with self._lock:
      return list(self._locate(row))

  def restore_anchor(self, anchor: list[int]) -> None:
    with self._lock:
      if tuple(anchor) not in self._anchors:
        self._anchors = sorted([*self._anchors, tuple(anchor)])

  def rows(self, first: int, stop: int) -> dict[str, np.ndarray]:
    """Rows `first:stop` with masks, as `row_spec` says."""
    return self._read(first, stop, masked=True)

  def originals(self, first: int, stop: int) -> dict[str, np.ndarray]:
    """Rows `first:stop` before masking."""
    return self._read(first, stop, masked=False)

  def _read(self, first, stop, *, masked):
    parts, epochs, indices = [], [], []
    while first < stop:
      with self._lock:
        start, epoch, number, within = self._locate(first)
        block = self._block(self._content_epoch(epoch), number)
      end = min(stop, start + block.plan.num_rows)
      parts.append(block.rows(np.arange(first - start, end - start)))
      epochs.append(np.full(end - first, self._content_epoch(epoch)))
      indices.append(within + np.arange(first - start, end - start))
      first = end
    batch = concatenate(parts) if parts else self.empty_rows(0)
    if masked and self.masking is not None and parts:
      batch |= masking_lib.mask_rows(
        batch["tokens"],
        batch["segment_ids"],
        masking=self.masking,
        vocabulary=self._vocabulary,
        seed=self._mask_seed,
        epochs=np.concatenate(epochs),
        indices=np.concatenate(indices),
      )
    return batch

  def _content_epoch(self, epoch: int) -> int:
    if self.masking is None or self.masking.dupe_factor is None:
      return epoch
    return epoch % self.masking.dupe_factor

  def _locate(self, row: int) -> tuple[int, int, int, int]:
    """(first row, epoch, block, row within the epoch) of a row's block."""
    at = max(i for i, a in enumerate(self._anchors) if a[0] <= row)
    while True:
      first, epoch, number, within = self._anchors[at]
      count = self._rows_of(epoch, number)
      if row < first + count:
        return self._anchors[at]
      last = number + 1 == self._num_blocks
      following = (
        first + count,
        epoch + last,
        0 if last else number + 1,
        0 if last else within + count,
      )
      at += 1
      if at == len(self._anchors) or self._anchors[at] != following:
        self._anchors.insert(at, following)

  def _rows_of(self, epoch: int, number: int) -> int:
    key = self._content_epoch(epoch), number
    if key not in self._block_rows:
      self._block_rows[key] = self._block(*key).plan.num_rows
      if not self._block_rows[key]:
        raise ValueError(
          f"data.instances.name={self._instances['name']!r} makes no rows of"
          f" {len(self._lengths)} documents; data.source seems empty."
        )
    return self._block_rows[key]

  def _block(self, epoch: int, number: int) -> "_Block":
    key = epoch, number
    if key in self._blocks:
      self._blocks.move_to_end(key)
      return self._blocks[key]
    order = self._order(epoch)
    count = len(order)
    documents = order[
      number * count // self._num_blocks : (number + 1)
      * count
      // self._num_blocks
    ]
    rng = np.random.default_rng([self.seed, epoch, number, _ROWS])
    index = _block_index(self.cache, self._lengths, documents)
    if self.mode.needs_sources:
      sources = self.cache.document_sources[documents]
      index = dataclasses.replace(index, sources=sources)
    plan = self.mode.plan(index, self.seq_len, rng)
    plan = plan.rows(rng.permutation(plan.num_rows))
    block = _Block(self, documents, index, plan)
    self._blocks[key] = block
    if len(self._blocks) > _BLOCKS_KEPT:
      self._blocks.popitem(last=False)
    return block

  def _order(self, epoch: int) -> np.ndarray:
    if epoch not in self._orders:
      rng = np.random.default_rng([self.seed, epoch, 0, _DOCUMENT_ORDER])
      order = rng.permutation(len(self._lengths))
      self._orders[epoch] = order[self._lengths[order] > 0]
      if len(self._orders) > 2:
        self._orders.popitem(last=False)
    return self._orders[epoch]


class _Block:
  """A planned block, whose documents are read when a row wants them."""

  def __init__(self, dataset, documents, index, plan):
    self.plan = plan
    self._dataset = dataset
    self._documents = documents
    self._offsets = index.document_offsets
    self._tokens = np.empty(int(self._offsets[-1]), np.int32)
    self._read = np.zeros(len(documents), bool)
    self._lock = threading.Lock()

  def rows(self, numbers) -> dict[str, np.ndarray]:
    """Assembled rows of the block, unmasked."""
    plan = self.plan.rows(numbers)
    # A span never crosses the end of a document.
    needed = np.unique(
      np.searchsorted(self._offsets, plan.starts, side="right") - 1
    )
    with self._lock:
      missing = needed[~self._read[needed]]
      if len(missing):
        self._fill(missing)
    tokenizer = self._dataset.tokenizer
    return plan_lib.assemble(
      plan,
      self._tokens,
      self._dataset.seq_len,
      pad_id=tokenizer.pad_id,
      cls_id=tokenizer.cls_id,
      sep_id=tokenizer.sep_id,
    )

  def _fill(self, missing) -> None:
    documents = self._dataset.cache.documents(self._documents[missing])
    for number, document in zip(missing, documents):
      begin, end = self._offsets[number : number + 2]
      self._tokens[begin:end] = document.tokens
    self._read[missing] = True


def check_seq_len(seq_len: int, mode: plan_lib.InstanceMode, name: str) -> None:
  """Raises ValueError for a length of rows that the mode, by name, has not."""
  if seq_len < mode.min_seq_len:
    raise ValueError(
      f"data.seq_len={seq_len} is too short for data.instances.name={name!r},"
      f" which needs {mode.min_seq_len} or more."
    )
  if seq_len > masking_lib.MAX_SEQ_LEN:
    raise ValueError(
      f"data.seq_len={seq_len} must be at most {masking_lib.MAX_SEQ_LEN}."
    )


def text_row_spec(
  mode: plan_lib.InstanceMode, masking: masking_lib.Masking | None, seq_len: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a row of text."""

  def row(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)

  names = ("tokens", "segment_ids", "positions", "type_ids")
  spec = {name: row(seq_len) for name in names}
  if masking is not None:
    slots = masking.slots(seq_len)
    spec |= {"masked_positions": row(slots), "labels": row(slots)}
  if mode.has_pairs:
    spec["pair_labels"] = row()
  return spec


def build_masking(spec: Mapping[str, Any]) -> masking_lib.Masking:
  """`Masking` from `config.data.masking`; refuses unknown options by name."""
  table = {"masking": masking_lib.Masking}
  return registry.build(table, {"name": "masking", **spec}, "data.masking")


def _block_index(cache, lengths, documents) -> plan_lib.BlockIndex:
  first = np.asarray(cache.sentence_offsets)
  counts = first[documents + 1] - first[documents]
  sentences = plan_lib.ragged_arange(first[documents], counts)
  return plan_lib.BlockIndex(
    document_lengths=lengths[documents].astype(np.int64),
    sentence_counts=counts.astype(np.int64),
    sentence_lengths=np.asarray(cache.sentence_lengths)[sentences].astype(
      np.int64
    ),
  )


def _tokenizer_of(cache) -> str | None:
  """Fingerprint of the tokenizer that a cache's manifest names, if any."""
  made_by = cache.manifest.get("tokenizer")
  if isinstance(made_by, Mapping):
    made_by = made_by.get("fingerprint")
  return made_by
