"""Dynamic masking of rows: BERT's 15 % and 80/10/10 (Devlin et al. 2018,
arXiv:1810.04805), whole words, SpanBERT's spans (Joshi et al. 2020,
arXiv:1907.10529), ALBERT's n-grams (Lan et al. 2020, arXiv:1909.11942).

Every random number is a hash of (seed, epoch, index of the row, position), as
in counter-based generators, so a mask depends on the row alone: not on the
batch size, the number of hosts or the order of reading. It is also what makes
masking fast: a batch is masked by whole-array operations.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int


def geometric_lengths(p: float = 0.2, max_length: int = 10) -> np.ndarray:
  """SpanBERT: P(k) ~ p (1 - p)^(k - 1), k = 1..max_length, renormalised."""
  weights = p * (1 - p) ** np.arange(max_length)
  return weights / weights.sum()


def inverse_lengths(max_length: int = 3) -> np.ndarray:
  """ALBERT: P(k) ~ 1 / k, k = 1..max_length."""
  weights = 1 / np.arange(1, max_length + 1)
  return weights / weights.sum()


@dataclasses.dataclass(frozen=True)
class Masking:
  """What to mask and with what. Built from `config.data.masking`.

  A row gets `min(max_masked, max(1, round(rate * r)))` masked tokens, r the
  real tokens of the row *with* special ones and round half to even, as in the
  reference; never more than there are ordinary tokens. The count is per row,
  not per packed segment, so that no short segment is masked beyond the rate;
  a segment may have none, which the loss (a sum over the batch over its number
  of labels) does not mind.

  Units other than `token` are walked in random order and a word that would
  exceed the count is left out, so words are masked wholly or not at all.

  Attributes:
    rate: share of the real tokens to predict.
    unit: `token`; `whole_word`; `span`, runs of whole words with geometric
      length; `ngram`, runs of n words with P(n) ~ 1/n.
    mask_share: of the chosen tokens, the share replaced by [MASK].
    random_share: the share replaced by a random token; the rest is kept.
    random_specials: whether a random token may be a special one (as in the
      reference implementation) or never is.
    max_masked: label slots per row; None takes what a full row needs.
    span_p: parameter of the geometric distribution of span lengths.
    max_span: longest span or n-gram in words; None is 10 and 3.
    dupe_factor: None masks every epoch afresh. n gives static masking: epoch k
      repeats the rows and masks of epoch k mod n.
  """

  rate: float = 0.15
  unit: str = "token"
  mask_share: float = 0.8
  random_share: float = 0.1
  random_specials: bool = False
  max_masked: int | None = None
  span_p: float = 0.2
  max_span: int | None = None
  dupe_factor: int | None = None

  def __post_init__(self):
    def check(name, ok, allowed):
      if not ok:
        value = getattr(self, name)
        raise ValueError(f"data.masking.{name}={value!r} must be {allowed}.")

    check("rate", 0 < self.rate < 1, "between 0 and 1, both excluded")
    check("unit", self.unit in UNITS, f"one of {', '.join(UNITS)}")
    check("mask_share", 0 <= self.mask_share <= 1, "in 0..1")
    check(
      "random_share",
      0 <= self.random_share <= 1 - self.mask_share + 1e-9,
      f"in 0..{1 - self.mask_share:g}, what data.masking.mask_share leaves",
    )
    check("span_p", 0 < self.span_p <= 1, "above 0 and at most 1")
    for name in ("max_masked", "max_span", "dupe_factor"):
      value = getattr(self, name)
      check(name, value is None or value >= 1, "at least 1, or None")

  def slots(self, seq_len: int) -> int:
    """Label slots m per row.

    Raises:
      ValueError: `max_masked` is far from what a full row asks for: it does not
        even hold the rate of its ordinary tokens (76 of 512, as in MLPerf), or
        exceeds the row.
    """
    ordinary, full_row = _counts(
      np.array([max(seq_len - _SPECIALS, 1), seq_len]), self.rate
    )
    if self.max_masked is None:
      return int(full_row)
    if not ordinary <= self.max_masked <= seq_len:
      raise ValueError(
        f"data.masking.max_masked={self.max_masked} must be at least"
        f" {ordinary}, what data.masking.rate={self.rate:g} asks of a full"
        f" row of data.seq_len={seq_len}, and at most the row; leave it out"
        f" to get {full_row}."
      )
    return self.max_masked

  @property
  def span_lengths(self) -> np.ndarray | None:
    """P(k words in a unit), k = 1, 2, ...; None if units are single words."""
    if self.unit == "span":
      return geometric_lengths(self.span_p, self.max_span or 10)
    if self.unit == "ngram":
      return inverse_lengths(self.max_span or 3)
    return None


UNITS = ("token", "whole_word", "span", "ngram")
_SPECIALS = 3  # of a pair: [CLS] and two [SEP]


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
  """What masking must know of a tokenizer.

  Attributes:
    mask_id: the [MASK] token.
    is_special: [v], tokens never chosen.
    continues_word: [v], pieces that continue the word before them.
  """

  mask_id: int
  is_special: Bool[np.ndarray, "v"]
  continues_word: Bool[np.ndarray, "v"]

  @classmethod
  def of(cls, tokenizer) -> "Vocabulary":
    """Reads the tables of a `Tokenizer`."""
    is_special = np.zeros(tokenizer.vocab_size, bool)
    is_special[tokenizer.special_ids] = True
    return cls(
      tokenizer.mask_id,
      is_special,
      np.asarray(tokenizer.continues_word, bool),
    )


def mask_rows(
  tokens: Int[np.ndarray, "b t"],
  segment_ids: Int[np.ndarray, "b t"],
  *,
  masking: Masking,
  vocabulary: Vocabulary,
  seed: int,
  epochs: Int[np.ndarray, "b"],
  indices: Int[np.ndarray, "b"],
) -> dict[str, np.ndarray]:
  """Masks rows; row i depends on (seed, epochs[i], indices[i]) only.

  Args:
    tokens: original ids; not modified.
    segment_ids: 0 marks padding.
    masking: what to mask.
    vocabulary: which tokens are special or continue words.
    seed: of the run's masks.
    epochs: epoch of each row.
    indices: number of each row within its epoch.

  Returns:
    `tokens` [b, t] with masks; `masked_positions` [b, m], ascending, 0 where
    unused; `labels` [b, m], original ids, -1 where unused. All int32.
  """
  num_rows, seq_len = tokens.shape
  slots = masking.slots(seq_len)
  keys = row_keys(seed, epochs, indices)
  candidates = (segment_ids > 0) & ~vocabulary.is_special[tokens]
  wanted = _counts(np.count_nonzero(segment_ids, axis=1), masking.rate)
  wanted = np.minimum(wanted, slots)
  if masking.unit == "token":
    positions = _choose_tokens(keys, candidates, wanted, slots)
  else:
    words = word_starts(tokens, segment_ids, candidates, vocabulary)
    positions = _choose_words(
      keys, candidates, words, wanted, slots, masking.span_lengths
    )
  used = positions < seq_len
  positions = np.where(used, positions, 0)
  labels = np.take_along_axis(tokens, positions, axis=1)

  share = _uniform(keys, positions, stream=1)
  replaced = np.where(share < masking.mask_share, vocabulary.mask_id, labels)
  is_random = (share >= masking.mask_share) & (
    share < masking.mask_share + masking.random_share
  )
  if is_random.any():
    choices = np.arange(len(vocabulary.is_special), dtype=np.int32)
    if not masking.random_specials:
      choices = choices[~vocabulary.is_special]
    draw = (_uniform(keys, positions, stream=2) * len(choices)).astype(np.int64)
    replaced = np.where(is_random, choices[draw], replaced)
  masked = tokens.astype(np.int32)  # a copy
  rows = np.broadcast_to(np.arange(num_rows)[:, None], positions.shape)[used]
  masked[rows, positions[used]] = replaced[used]
  return {
    "tokens": masked,
    "masked_positions": positions.astype(np.int32),
    "labels": np.where(used, labels, -1).astype(np.int32),
  }


def word_starts(
  tokens: Int[np.ndarray, "b t"],
  segment_ids: Int[np.ndarray, "b t"],
  candidates: Bool[np.ndarray, "b t"],
  vocabulary: Vocabulary,
) -> Bool[np.ndarray, "b t"]:
  """True where a word begins: a piece that continues nothing, or the first
  ordinary token after a special one or of a segment."""
  starts = candidates.copy()
  starts[:, 1:] &= ~(
    vocabulary.continues_word[tokens[:, 1:]]
    & candidates[:, :-1]
    & (segment_ids[:, 1:] == segment_ids[:, :-1])
  )
  return starts


def unit_starts(
  keys: np.ndarray,
  candidates: Bool[np.ndarray, "b t"],
  words: Bool[np.ndarray, "b t"],
  span_lengths: np.ndarray | None,
) -> Bool[np.ndarray, "b t"]:
  """True at the words that begin a unit.

  A row's words are parted into consecutive units of random length; a special
  token always ends a unit. A row begins in the middle of a unit: what is left
  of it has k words with a probability proportional to that of units of k words
  or more, so that of the words behind it none begins units more often than
  another.
  """
  if span_lengths is None:
    return words
  num_rows, seq_len = words.shape
  max_length = len(span_lengths)
  left = np.cumsum(span_lengths[::-1])[::-1]  # P(k words or more)
  draws = _uniform(keys, np.arange(seq_len + 1)[None], stream=3)
  cumulative = np.cumsum(span_lengths)
  cumulative[-1] = 1
  lengths = 1 + np.searchsorted(cumulative, draws, side="right")
  first = np.cumsum(left / left.sum())
  first[-1] = 1
  lengths[:, 0] = 1 + np.searchsorted(first, draws[:, 0], side="right")
  # Word numbers, counted from 0 along the row, at which units begin.
  ends = np.cumsum(lengths, axis=1)
  begins = np.zeros((num_rows, seq_len + max_length + 1), bool)
  np.put_along_axis(begins, np.clip(ends, 0, seq_len + max_length), True, 1)
  number = np.cumsum(words, axis=1) - 1
  starts = words & np.take_along_axis(begins, np.maximum(number, 0), 1)
  starts[:, 0] |= words[:, 0]
  starts[:, 1:] |= words[:, 1:] & ~candidates[:, :-1]
  return starts


def row_keys(
  seed: int, epochs: Int[np.ndarray, "b"], indices: Int[np.ndarray, "b"]
) -> np.ndarray:
  """One 64-bit key per row."""
  key = _mix(np.full(len(indices), seed & (2**64 - 1), np.uint64))
  key = _mix(key ^ np.asarray(epochs).astype(np.uint64))
  return _mix(key ^ np.asarray(indices).astype(np.uint64))


def _counts(real: Int[np.ndarray, "b"], rate: float) -> Int[np.ndarray, "b"]:
  """max(1, round(rate * real)), but 0 for an empty row."""
  return np.where(real > 0, np.maximum(np.rint(real * rate), 1), 0).astype(
    np.int64
  )


def _choose_tokens(keys, candidates, wanted, slots):
  """Positions [b, slots] of the `wanted` candidates with the smallest draws.

  Unused slots hold seq_len.
  """
  seq_len = candidates.shape[1]
  order = np.sort(_ordered(keys, candidates), axis=1)[:, :slots]
  positions = (order & _LOW).astype(np.int64)
  unused = (order == _LAST) | (np.arange(slots) >= wanted[:, None])
  positions[unused] = seq_len
  positions.sort(axis=1)
  return positions


def _choose_words(keys, candidates, words, wanted, slots, span_lengths):
  """As `_choose_tokens`, whole words only, unit after unit."""
  num_rows, seq_len = candidates.shape
  units = unit_starts(keys, candidates, words, span_lengths)
  place = np.arange(seq_len)
  unit_of = np.maximum.accumulate(np.where(units, place, 0), axis=1)
  word_of = np.maximum.accumulate(np.where(words, place, 0), axis=1)
  # A word's rank: the draw of its unit, then its place in the row.
  draws = _hash(keys, place[None], stream=0) & ~_LOW
  draws = np.take_along_axis(draws, unit_of, axis=1) | place.astype(np.uint64)
  order = np.sort(np.where(words, draws, _LAST), axis=1)
  # Tokens per word, at the position where the word begins.
  flat = (word_of + np.arange(num_rows)[:, None] * seq_len)[candidates]
  sizes = np.bincount(flat, minlength=num_rows * seq_len)
  sizes = sizes.reshape(num_rows, seq_len)

  at = np.where(order == _LAST, 0, order & _LOW).astype(np.int64)
  size_in_order = np.take_along_axis(sizes, at, axis=1)
  size_in_order[order == _LAST] = 0
  taken = np.zeros((seq_len, num_rows), bool)
  left = wanted.copy()
  for rank, size in enumerate(np.ascontiguousarray(size_in_order.T)):
    if not left.any() or not size.any():
      break
    take = (size <= left) & (size > 0)
    taken[rank] = take
    left -= size * take
  chosen = np.zeros((num_rows, seq_len), bool)
  rows, ranks = np.nonzero(taken.T)
  chosen[rows, at[rows, ranks]] = True
  chosen = np.take_along_axis(chosen, word_of, axis=1) & candidates
  positions = np.sort(np.where(chosen, place, seq_len), axis=1)
  return positions[:, :slots]


# The low bits of a sort key hold the position: sorting values is several times
# faster than argsort, and 44 random bits do not tie in practice (a tie would
# only fall back to the order in the row).
_LOW = np.uint64(2**20 - 1)
_LAST = np.uint64(2**64 - 1)
MAX_SEQ_LEN = 2**20 - 1


def _ordered(keys, candidates):
  """A random sort key per position with the position in its low bits."""
  place = np.arange(candidates.shape[1])
  draws = _hash(keys, place[None], stream=0) & ~_LOW | place.astype(np.uint64)
  return np.where(candidates, draws, _LAST)


def _uniform(keys, positions, stream):
  """Uniform float64 in [0, 1) per (row, position, stream)."""
  return (_hash(keys, positions, stream) >> np.uint64(11)) * 2.0**-53


def _hash(keys, positions, stream):
  """64 random bits per (row, position, stream)."""
  counters = np.asarray(positions).astype(np.uint64)
  counters = counters * np.uint64(4) + np.uint64(stream + 1)
  return _mix(keys[:, None] + counters * np.uint64(0x9E3779B97F4A7C15))


def _mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
