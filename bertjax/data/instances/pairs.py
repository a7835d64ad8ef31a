"""Pairs of text: next-sentence prediction (Devlin et al. 2018,
arXiv:1810.04805) and sentence order (Lan et al. 2020, arXiv:1909.11942).

Both cut a document's sentences into chunks of a target length and part the
chunk in two at a random sentence. The distribution is that of the reference
generator; all documents of a block advance together, one chunk per round, so
that the work is done by numpy. `bertjax.data.bert_instances` is the generator
in the reference's own order of random draws.
"""

import abc
import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Integer

from bertjax.data.instances import plan as plan_lib

NEGATIVES = ("any_document", "same_source")
_SPECIALS = 3  # [CLS] A [SEP] B [SEP]


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunks:
  """One round: the next chunk of every document that has one.

  Attributes:
    documents: the documents d.
    targets: wanted tokens of the pair.
    first: first sentence.
    split: first sentence of the second part; equals `end` for one sentence.
    end: one past the last sentence.
  """

  documents: Int[np.ndarray, "d"]
  targets: Int[np.ndarray, "d"]
  first: Int[np.ndarray, "d"]
  split: Int[np.ndarray, "d"]
  end: Int[np.ndarray, "d"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs:
  """Two spans of tokens per chunk; `b_lengths` 0 means there is no B."""

  a_starts: Int[np.ndarray, "d"]
  a_lengths: Int[np.ndarray, "d"]
  b_starts: Int[np.ndarray, "d"]
  b_lengths: Int[np.ndarray, "d"]
  labels: Int[np.ndarray, "d"]
  following: Int[np.ndarray, "d"]  # the sentence where the next chunk begins


@dataclasses.dataclass(frozen=True)
class _PairMode(abc.ABC):
  """What the modes share: chunks, their parting, truncation, checks.

  A mode adds the rates of its own and `_pair`.
  """

  short_seq_prob: float = 0.1

  min_seq_len = _SPECIALS + 2
  min_documents = 1
  has_pairs = True
  needs_sources = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(field.default, float) and not 0 <= value <= 1:
        raise ValueError(
          f"data.instances.{field.name}={value} must lie in 0..1: it is a"
          " probability."
        )

  def plan(
    self,
    block: plan_lib.BlockIndex,
    seq_len: int,
    rng: np.random.Generator,
  ) -> plan_lib.Plan:
    max_tokens = seq_len - _SPECIALS
    count = block.num_documents
    short = rng.random(count) < self.short_seq_prob
    targets = np.where(
      short, rng.integers(2, max_tokens + 1, size=count), max_tokens
    )
    at = block.sentence_offsets
    last = block.first_sentences[1:]
    cursor = block.first_sentences[:-1].copy()
    rounds = []
    active = np.flatnonzero(cursor < last)
    while len(active):
      first = cursor[active]
      end = _reach(at, first, targets[active], last[active])
      size = end - first
      split = first + np.where(
        size == 1, 1, rng.integers(1, np.maximum(size, 2))
      )
      chunks = _Chunks(active, targets[active], first, split, end)
      pairs = self._pair(block, chunks, rng)
      rounds.append(_truncated(pairs, max_tokens, rng))
      cursor[active] = pairs.following
      active = active[pairs.following < last[active]]
    return _rows(rounds)

  @abc.abstractmethod
  def _pair(
    self, block: plan_lib.BlockIndex, chunks: _Chunks, rng: np.random.Generator
  ) -> _Pairs:
    """What becomes of each chunk."""


@dataclasses.dataclass(frozen=True)
class NextSentence(_PairMode):
  """[CLS] A [SEP] B [SEP], B the continuation (label 0) or random (label 1).

  A chunk of one sentence always gets a random B; otherwise B is random with
  `random_rate`, and the sentences it displaced start the next chunk. A random
  B starts at a random sentence of a random other document *of the block*: a
  block is a random sample of the corpus, so over epochs every document can
  meet every other. An overlong pair loses tokens from its longer part, each
  time from a random side.

  With `negatives="same_source"` a random B comes from a document of the same
  component of a mixture, so that the register of a text does not give the
  answer away. A document that is the only one of its component in the block
  then gets no random B: its chunks continue, and those of one sentence become
  [CLS] A [SEP] with label -1, which trains the masked words only.

  Cost: vectorised over the documents of a block, about 0.5 us per row (more
  when a few documents are very much longer than the others).

  Attributes:
    short_seq_prob: probability that a document aims at a random shorter length.
    random_rate: probability of a random B for chunks of two sentences or more.
    negatives: which documents a random B may come from: `any_document` or
      `same_source`.
  """

  random_rate: float = 0.5
  negatives: str = "any_document"

  min_documents = 2

  def __post_init__(self):
    super().__post_init__()
    if self.negatives not in NEGATIVES:
      raise ValueError(
        f"data.instances.negatives={self.negatives!r} must be one of"
        f" {', '.join(NEGATIVES)}."
      )

  @property
  def needs_sources(self) -> bool:
    return self.negatives == "same_source"

  def _pair(
    self, block: plan_lib.BlockIndex, chunks: _Chunks, rng: np.random.Generator
  ) -> _Pairs:
    at = block.sentence_offsets
    documents = chunks.documents
    alone = chunks.end - chunks.first == 1
    wanted = alone | (rng.random(len(alone)) < self.random_rate)
    groups = (
      block.sources
      if self.needs_sources
      else np.zeros_like(block.document_lengths)
    )
    other = _other_documents(groups, documents, rng)
    random = wanted & (other != documents)
    a_lengths = at[chunks.split] - at[chunks.first]
    start, end = _run(block, other, chunks.targets - a_lengths, rng)
    b_first = np.where(random, start, chunks.split)
    b_end = np.where(random, end, chunks.end)
    return _Pairs(
      a_starts=at[chunks.first],
      a_lengths=a_lengths,
      b_starts=at[b_first],
      b_lengths=at[b_end] - at[b_first],
      labels=np.where(alone & ~random, -1, random).astype(np.int32),
      following=np.where(random, chunks.split, chunks.end),
    )


@dataclasses.dataclass(frozen=True)
class SentenceOrder(_PairMode):
  """[CLS] A [SEP] B [SEP], consecutive (label 0) or swapped (label 1).

  A chunk of one sentence has no order: it becomes [CLS] A [SEP] with label -1,
  which trains the masked words only. Cost: as `NextSentence`.

  Attributes:
    short_seq_prob: probability that a document aims at a random shorter length.
    swap_rate: probability of swapping the parts.
  """

  swap_rate: float = 0.5

  def _pair(
    self, block: plan_lib.BlockIndex, chunks: _Chunks, rng: np.random.Generator
  ) -> _Pairs:
    at = block.sentence_offsets
    alone = chunks.end - chunks.first == 1
    swap = ~alone & (rng.random(len(alone)) < self.swap_rate)
    first, split, end = at[chunks.first], at[chunks.split], at[chunks.end]
    return _Pairs(
      a_starts=np.where(swap, split, first),
      a_lengths=np.where(swap, end - split, split - first),
      b_starts=np.where(swap, first, split),
      b_lengths=np.where(swap, split - first, end - split),
      labels=np.where(alone, -1, swap).astype(np.int32),
      following=chunks.end,
    )


def truncate_pair(
  a_lengths: Int[np.ndarray, "n"],
  b_lengths: Int[np.ndarray, "n"],
  max_tokens: int,
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
  """How many tokens each part keeps: the strictly longer one shrinks first.

  Of two equal parts B shrinks, so an even split leaves A the larger half.
  """
  a = np.minimum(a_lengths, max_tokens - np.minimum(b_lengths, max_tokens // 2))
  return a, np.minimum(b_lengths, max_tokens - a)


def _reach(
  at: Int[np.ndarray, "sentences_plus_1"],
  first: Int[np.ndarray, "n"],
  tokens: Int[np.ndarray, "n"],
  last: Int[np.ndarray, "n"],
) -> Int[np.ndarray, "n"]:
  """End of the shortest run of whole sentences with that many tokens."""
  end = np.searchsorted(at, at[first] + tokens, side="left")
  return np.minimum(np.maximum(end, first + 1), last)


def _other_documents(
  groups: Integer[np.ndarray, "documents"],
  documents: Int[np.ndarray, "n"],
  rng: np.random.Generator,
) -> Int[np.ndarray, "n"]:
  """A random other document of the same group; itself if there is none."""
  order = np.argsort(groups, kind="stable")
  _, first, member_of, sizes = np.unique(
    groups[order], return_index=True, return_inverse=True, return_counts=True
  )
  rank = np.empty_like(order)
  rank[order] = np.arange(len(order)) - first[member_of]
  group = np.empty_like(order)
  group[order] = member_of
  size = sizes[group[documents]]
  shift = np.where(size > 1, rng.integers(1, np.maximum(size, 2)), 0)
  return order[first[group[documents]] + (rank[documents] + shift) % size]


def _run(
  block: plan_lib.BlockIndex,
  documents: Int[np.ndarray, "n"],
  tokens: Int[np.ndarray, "n"],
  rng: np.random.Generator,
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
  """A run of sentences of about that many tokens, from a random place."""
  start = block.first_sentences[documents] + rng.integers(
    0, block.sentence_counts[documents]
  )
  end = _reach(
    block.sentence_offsets, start, tokens, block.first_sentences[documents + 1]
  )
  return start, end


def _truncated(
  pairs: _Pairs, max_tokens: int, rng: np.random.Generator
) -> _Pairs:
  a, b = truncate_pair(pairs.a_lengths, pairs.b_lengths, max_tokens)
  return dataclasses.replace(
    pairs,
    a_starts=pairs.a_starts + rng.binomial(pairs.a_lengths - a, 0.5),
    a_lengths=a,
    b_starts=pairs.b_starts + rng.binomial(pairs.b_lengths - b, 0.5),
    b_lengths=b,
  )


def _rows(rounds: list[_Pairs]) -> plan_lib.Plan:
  """Interleaves A and B spans, leaving out empty Bs."""

  def joined(name):
    return np.concatenate([getattr(r, name) for r in rounds])

  starts = np.stack([joined("a_starts"), joined("b_starts")], 1).ravel()
  lengths = np.stack([joined("a_lengths"), joined("b_lengths")], 1)
  has_b: Bool[np.ndarray, rows] = lengths[:, 1] > 0
  lengths = lengths.ravel()
  is_b = np.arange(len(lengths)) % 2
  keep = (is_b == 0) | (lengths > 0)
  return plan_lib.Plan(
    row_offsets=plan_lib.offsets(1 + has_b),
    starts=starts[keep],
    lengths=lengths[keep],
    segments=np.ones(int(keep.sum()), np.int32),
    types=is_b[keep].astype(np.int32),
    opens=is_b[keep] == 0,
    pair_labels=joined("labels"),
  )
