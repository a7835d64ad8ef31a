"""Whole sentences up to the row's length (Liu et al. 2019, arXiv:1907.11692).

RoBERTa's two formats without next-sentence prediction: FULL-SENTENCES reads on
into the next document with one extra separator, DOC-SENTENCES stops at the
document's end.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from bertjax.data.instances import plan as plan_lib


class _WholeSentences:
  """Rows of consecutive sentences, as many as fit.

  Attributes:
    stop_at_document: whether a row ends where a document does.
  """

  stop_at_document: bool
  min_seq_len = 3
  min_documents = 1
  has_pairs = False
  needs_sources = False

  def plan(
    self,
    block: plan_lib.BlockIndex,
    seq_len: int,
    rng: np.random.Generator,
  ) -> plan_lib.Plan:
    del rng  # the dataset shuffles documents and rows
    pieces = _pieces(block, seq_len)
    return _rows(pieces, _boundaries(pieces, seq_len, self.stop_at_document))


@dataclasses.dataclass(frozen=True)
class FullSentences(_WholeSentences):
  """[CLS] sentences of one document [SEP] sentences of the next [SEP] ...

  A row is one segment: its documents see each other, as in the paper. Whole
  sentences only, except that a sentence longer than a row is cut. Every token
  of the corpus appears exactly once in an epoch.

  Cost: vectorised over sentences, plus one list access per row: about 0.1 us
  per sentence.
  """

  stop_at_document = False


@dataclasses.dataclass(frozen=True)
class DocSentences(_WholeSentences):
  """[CLS] consecutive sentences of one document [SEP].

  As `FullSentences`, but a row never crosses the end of a document, so rows at
  ends are shorter. (The paper grows the batch to make up for it; here shapes
  are static and the padding is masked.) Cost: as `FullSentences`.
  """

  stop_at_document = True


@dataclasses.dataclass(frozen=True, eq=False)
class _Pieces:
  """Sentences, the overlong ones cut: start, length, owner document."""

  starts: Int[np.ndarray, "n"]
  lengths: Int[np.ndarray, "n"]
  documents: Int[np.ndarray, "n"]


def _pieces(block: plan_lib.BlockIndex, seq_len: int) -> _Pieces:
  starts, lengths, sentence = plan_lib.cut(
    block.sentence_offsets[:-1], block.sentence_lengths, seq_len - 2
  )
  documents = np.repeat(np.arange(block.num_documents), block.sentence_counts)
  return _Pieces(starts, lengths, documents[sentence])


def _boundaries(
  pieces: _Pieces, seq_len: int, stop_at_document: bool
) -> Int[np.ndarray, "rows_plus_1"]:
  """Number of the first piece of each row, and the number of pieces."""
  count = len(pieces.starts)
  if not count:
    return np.zeros(1, np.int64)
  # A row that ends with piece i has closed a document at every document end
  # before i, and closes one at i: its [SEP]s are those plus one.
  is_end = np.append(pieces.documents[1:] != pieces.documents[:-1], True)
  closed_before = plan_lib.offsets(is_end)[:-1]
  tokens = plan_lib.offsets(pieces.lengths)
  size_at = tokens[1:] + closed_before + 1
  base = tokens[:-1] + closed_before
  following = np.searchsorted(size_at, base + seq_len - 1, side="right")
  if stop_at_document:
    document_end = np.searchsorted(
      pieces.documents, pieces.documents, side="right"
    )
    following = np.minimum(following, document_end)
  following = following.tolist()
  boundaries, piece = [0], 0
  while piece < count:
    piece = following[piece]
    boundaries.append(piece)
  return np.array(boundaries)


def _rows(
  pieces: _Pieces, boundaries: Int[np.ndarray, "rows_plus_1"]
) -> plan_lib.Plan:
  """One span per (row, document): consecutive pieces are adjacent tokens."""
  count = len(pieces.starts)
  row_start = np.zeros(count, bool)
  row_start[boundaries[:-1]] = True
  span_start = row_start.copy()
  span_start[1:] |= pieces.documents[1:] != pieces.documents[:-1]
  first = np.flatnonzero(span_start)
  lengths = np.add.reduceat(pieces.lengths, first) if count else pieces.lengths
  spans_before = np.append(0, np.cumsum(span_start))
  return plan_lib.Plan(
    row_offsets=spans_before[boundaries],
    starts=pieces.starts[first],
    lengths=lengths,
    segments=np.ones(len(first), np.int32),
    types=np.zeros(len(first), np.int32),
    opens=row_start[first],
  )
