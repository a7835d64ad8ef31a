"""What an instance mode hands over: spans of a block's tokens, row by row.

The corpus of one epoch is a shuffled list of documents, cut into *blocks* of
consecutive documents. An instance mode sees only the lengths in one block and
answers with a `Plan`: for every row, which spans of the block's concatenated
tokens it holds. Rendering a span is the same for all modes:

    [CLS] (only where the span opens a segment)  tokens  [SEP]

so one vectorised `assemble` serves them all, and a mode is nothing but the
decision what goes where.
"""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Integer


@dataclasses.dataclass(frozen=True, eq=False)
class BlockIndex:
  """Lengths of the documents of one block, in the order they are read.

  Attributes:
    document_lengths: tokens per document.
    sentence_counts: sentences per document.
    sentence_lengths: tokens per sentence, all documents one after another.
    sources: component of a mixture that each document is of; None if the mode
      does not need it.
  """

  document_lengths: Int[np.ndarray, "documents"]
  sentence_counts: Int[np.ndarray, "documents"]
  sentence_lengths: Int[np.ndarray, "sentences"]
  sources: Integer[np.ndarray, "documents"] | None = None

  @property
  def num_documents(self) -> int:
    return len(self.document_lengths)

  @functools.cached_property
  def document_offsets(self) -> Int[np.ndarray, "documents_plus_1"]:
    """Where each document starts in the block's concatenated tokens."""
    return offsets(self.document_lengths)

  @functools.cached_property
  def sentence_offsets(self) -> Int[np.ndarray, "sentences_plus_1"]:
    """Where each sentence starts in the block's concatenated tokens."""
    return offsets(self.sentence_lengths)

  @functools.cached_property
  def first_sentences(self) -> Int[np.ndarray, "documents_plus_1"]:
    """Number of each document's first sentence."""
    return offsets(self.sentence_counts)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Rows as spans of a block's tokens.

  Attributes:
    row_offsets: spans `row_offsets[i]:row_offsets[i + 1]` belong to row i.
    starts: first token of each span in the block's concatenated tokens.
    lengths: tokens of each span, without special tokens.
    segments: segment id of each span, 1 for the first segment of a row.
    types: type id of each span (BERT's A/B).
    opens: whether the span begins its segment and so carries the [CLS].
    pair_labels: one per row, or None if the mode makes no pairs.
  """

  row_offsets: Int[np.ndarray, "rows_plus_1"]
  starts: Int[np.ndarray, "spans"]
  lengths: Int[np.ndarray, "spans"]
  segments: Int[np.ndarray, "spans"]
  types: Int[np.ndarray, "spans"]
  opens: Bool[np.ndarray, "spans"]
  pair_labels: Int[np.ndarray, "rows"] | None = None

  @property
  def num_rows(self) -> int:
    return len(self.row_offsets) - 1

  def rows(self, order: Int[np.ndarray, "n"]) -> "Plan":
    """The plan of the given rows, in the given order."""
    counts = np.diff(self.row_offsets)[order]
    spans = ragged_arange(self.row_offsets[:-1][order], counts)
    return Plan(
      row_offsets=offsets(counts),
      starts=self.starts[spans],
      lengths=self.lengths[spans],
      segments=self.segments[spans],
      types=self.types[spans],
      opens=self.opens[spans],
      pair_labels=(
        None if self.pair_labels is None else self.pair_labels[order]
      ),
    )


@runtime_checkable
class InstanceMode(Protocol):
  """How documents become rows.

  Attributes:
    min_seq_len: the shortest row this mode can fill.
    min_documents: how many documents a corpus needs.
    has_pairs: whether batches carry `pair_labels`.
    needs_sources: whether `plan` reads `BlockIndex.sources`.
  """

  min_seq_len: int
  min_documents: int
  has_pairs: bool

  @property
  def needs_sources(self) -> bool: ...

  def plan(
    self, block: BlockIndex, seq_len: int, rng: np.random.Generator
  ) -> Plan:
    """Decides the rows of a block from its lengths alone.

    A pure function of its arguments: `rng` is seeded by (seed, epoch, block).
    """
    ...


def offsets(
  counts: Int[np.ndarray, "n"] | Bool[np.ndarray, "n"],
) -> Int[np.ndarray, "n_plus_1"]:
  """Exclusive prefix sums with the total at the end."""
  result = np.zeros(len(counts) + 1, np.int64)
  np.cumsum(counts, out=result[1:])
  return result


def ragged_arange(
  starts: Int[np.ndarray, "n"], counts: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "total"]:
  """`concatenate([arange(s, s + c) for s, c in zip(starts, counts)])`."""
  shifts = starts - offsets(counts)[:-1]
  return np.repeat(shifts, counts) + np.arange(counts.sum())


def cut(
  starts: Int[np.ndarray, "n"],
  lengths: Int[np.ndarray, "n"],
  width: int,
) -> tuple[Int[np.ndarray, "pieces"], ...]:
  """Cuts spans into pieces of `width` tokens, the last one shorter.

  Returns:
    (starts, lengths, owner): the pieces in order, and the span each one is of.
  """
  pieces = -(-lengths // width)
  owner = np.repeat(np.arange(len(lengths)), pieces)
  within = ragged_arange(np.zeros_like(pieces), pieces) * width
  return (
    starts[owner] + within,
    np.minimum(width, lengths[owner] - within),
    owner,
  )


def one_span_rows(
  starts: Int[np.ndarray, "rows"], lengths: Int[np.ndarray, "rows"]
) -> Plan:
  """The plan whose row i is [CLS], span i, [SEP]."""
  count = len(starts)
  return Plan(
    row_offsets=np.arange(count + 1),
    starts=starts,
    lengths=lengths,
    segments=np.ones(count, np.int32),
    types=np.zeros(count, np.int32),
    opens=np.ones(count, bool),
  )


def assemble(
  plan: Plan,
  tokens: Int[np.ndarray, "block"],
  seq_len: int,
  *,
  pad_id: int,
  cls_id: int,
  sep_id: int,
) -> dict[str, np.ndarray]:
  """Renders rows.

  Args:
    plan: the wanted rows.
    tokens: the block's concatenated tokens.
    seq_len: length t of a row; the plan was made for it.
    pad_id: fills the end of a row.
    cls_id: opens a segment.
    sep_id: closes every span.

  Returns:
    `tokens, segment_ids, positions, type_ids`, int32 [b, t], and `pair_labels`
    int32 [b] if the plan has them.
  """
  rows = plan.num_rows
  spans_per_row = np.diff(plan.row_offsets)
  opens = plan.opens.astype(np.int64)
  rendered = plan.lengths + opens + 1
  ends = np.cumsum(rendered)
  begins = ends - rendered
  row_of_span = np.repeat(np.arange(rows), spans_per_row)
  row_begin = offsets(rendered)[plan.row_offsets[:-1]]
  # Where each span lands in the flattened [rows, seq_len] arrays.
  target = begins - row_begin[row_of_span] + row_of_span * seq_len
  # Positions count from the span that opened the segment.
  opener = np.maximum.accumulate(np.where(plan.opens, np.arange(len(opens)), 0))
  total = int(ends[-1]) if len(ends) else 0
  steps = np.arange(total)
  where = np.repeat(target - begins, rendered) + steps
  read = np.repeat(plan.starts - opens - begins, rendered) + steps
  # The slots of [CLS] and [SEP] read a neighbour and are overwritten below.
  np.clip(read, 0, max(len(tokens) - 1, 0), out=read)

  def fill(values, empty=0):
    result = np.full(rows * seq_len, empty, np.int32)
    result[where] = values
    return result

  row_tokens = fill(tokens[read], pad_id)
  row_tokens[target[plan.opens]] = cls_id
  row_tokens[target + rendered - 1] = sep_id
  arrays = {
    "tokens": row_tokens,
    "segment_ids": fill(np.repeat(plan.segments, rendered)),
    "positions": fill(np.repeat(-target[opener], rendered) + where),
    "type_ids": fill(np.repeat(plan.types, rendered)),
  }
  batch = {k: v.reshape(rows, seq_len) for k, v in arrays.items()}
  if plan.pair_labels is not None:
    batch["pair_labels"] = plan.pair_labels.astype(np.int32)
  return batch
