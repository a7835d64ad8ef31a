"""Extractive question answering (Rajpurkar et al. 2016, 2018).

Contexts longer than a row are read through overlapping windows; a token's
window is the one that shows most of its surroundings. A span of tokens maps
back to the characters it came from, so answers are cut out of the context as it
was written.
"""

import collections
import dataclasses
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from bertjax.data.tokenizers import Tokenizer
from bertjax.data.tokenizers.words import WordTokenizer

_MARKS = "\u0120\u2581"  # how byte-level BPE and SentencePiece write a space


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
  """A tokenised text that knows where its tokens came from.

  Attributes:
    ids: token ids.
    starts: first character of every token.
    ends: the character after its last.
  """

  ids: Int[np.ndarray, "n"]
  starts: Int[np.ndarray, "n"]
  ends: Int[np.ndarray, "n"]

  def span(self, first: int, stop: int) -> tuple[int, int]:
    """First and last token that touch the characters `first:stop`."""
    return (
      int(np.searchsorted(self.ends, first, side="right")),
      int(np.searchsorted(self.starts, stop, side="left")) - 1,
    )


@dataclasses.dataclass(frozen=True)
class Window:
  """A row's view of a context.

  Attributes:
    example: index of the question.
    offset: place of the context in the row.
    first: its first token.
    stop: the token after its last.
  """

  example: int
  offset: int
  first: int
  stop: int


def _stands_alone(char: str) -> bool:
  if char.isascii():
    return char.isprintable() and not char.isalnum()
  return unicodedata.category(char).startswith("P")


def units(text: str) -> Iterator[tuple[int, int]]:
  """Character ranges of words and single punctuation marks."""
  for found in re.finditer(r"\S+", text):
    start = found.start()
    for i in range(found.start(), found.end()):
      if _stands_alone(text[i]):
        if start < i:
          yield start, i
        yield i, i + 1
        start = i + 1
    if start < found.end():
      yield start, found.end()


def words(text: str, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
  """Character ranges of what can be encoded alone, as in the whole text.

  A vocabulary of words divides at punctuation, any other at spaces alone; a
  user token stays whole.
  """
  if tokenizer.backend != WordTokenizer.backend:
    yield from (found.span() for found in re.finditer(r"\S+", text))
    return
  begin = 0
  for i, part in enumerate(tokenizer.parts(text)):
    if i % 2:
      yield begin, begin + len(part)
    else:
      yield from ((begin + a, begin + b) for a, b in units(part))
    begin += len(part)


def tokenize(text: str, tokenizer: Tokenizer) -> Pieces:
  """Tokens with the characters they came from.

  They are those of `Tokenizer.encode`, but for runs of spaces, which count as
  one. Where the pieces of a word spell it letter by letter, each has its own
  characters; where normalisation changed it, each has the whole word.
  """
  ranges = list(words(text, tokenizer))
  # With its space before, if there is one: byte-level vocabularies tell apart.
  texts = [
    text[max(a - (a > 0 and text[a - 1].isspace()), 0) : b] for a, b in ranges
  ]
  ids, starts, ends = [], [], []
  for (a, b), unit in zip(ranges, tokenizer.encode_batch(texts)):
    ids.append(unit)
    found = _spelled(text[a:b], unit, tokenizer)
    if found is None:
      found = np.zeros(len(unit), np.int64), np.full(len(unit), b - a)
    starts.append(a + found[0])
    ends.append(a + found[1])
  if not ids:
    empty = np.zeros(0, np.int64)
    return Pieces(empty.astype(np.int32), empty, empty)
  return Pieces(*map(np.concatenate, (ids, starts, ends)))


def _spelled(
  word: str, ids: np.ndarray, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray] | None:
  """First and last character + 1 of every token; None if they spell it not."""
  if tokenizer.unk_id in ids:
    return None
  pieces = [p.removeprefix("##").lstrip(_MARKS) for p in tokenizer.pieces(ids)]
  edges = np.cumsum([0, *map(len, pieces)])
  if edges[-1] == len(word):
    return edges[:-1], edges[1:]
  # Tokens of bytes: of a character that is not complete yet, each has it all.
  said = [tokenizer.decode(ids[: i + 1]).lstrip() for i in range(len(ids))]
  if not said or said[-1] != word:
    return None
  whole = [len(text.rstrip("\ufffd")) for text in said]
  parted = [len(text) > count for text, count in zip(said, whole)]
  return np.array([0, *whole[:-1]]), np.add(whole, parted)


def window_ranges(
  num_tokens: int, room: int, stride: int
) -> list[tuple[int, int]]:
  """Overlapping ranges of at most `room` tokens, `stride` apart."""
  ranges, first = [], 0
  while True:
    stop = min(first + room, num_tokens)
    ranges.append((first, stop))
    if stop == num_tokens:
      return ranges
    first += min(stop - first, stride)


def owners(ranges: Sequence[tuple[int, int]], num_tokens: int) -> np.ndarray:
  """For every token the range in which it has most context on both sides."""
  tokens = np.arange(num_tokens)
  scores = np.full((len(ranges), num_tokens), -np.inf)
  for i, (first, stop) in enumerate(ranges):
    inside = tokens[first:stop]
    sides = np.minimum(inside - first, stop - 1 - inside)
    # Equal sides: the longer window, as in the reference.
    scores[i, first:stop] = sides + 0.01 * (stop - first)
  return scores.argmax(0)


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model says about one question.

  Attributes:
    text: the best span's characters; "" if no span is possible.
    score: of that span, sum of two logits.
    null_score: of "no answer".
  """

  text: str
  score: float
  null_score: float


def decode(
  context: str,
  pieces: Pieces,
  windows: Sequence[Window],
  logits: Float[np.ndarray, "w t 2"],
  *,
  num_best: int = 20,
  max_answer_tokens: int = 30,
) -> Answer:
  """The best answer to a question from the logits of its windows.

  Args:
    context: the text that holds the answer.
    pieces: its tokens.
    windows: the rows that show it.
    logits: scores of first and last token, one row a window.
    num_best: first and last tokens that are tried per window.
    max_answer_tokens: longer spans are no answers.
  """
  best, where = -np.inf, None
  ranges = [(w.first, w.stop) for w in windows]
  owner = owners(ranges, len(pieces.ids))
  for i, (window, scores) in enumerate(zip(windows, logits)):
    inside = scores[window.offset : window.offset + window.stop - window.first]
    own = owner[window.first : window.stop] == i
    first = np.argsort(-inside[:, 0], kind="stable")[:num_best]
    last = np.argsort(-inside[:, 1], kind="stable")[:num_best]
    length = last[None] - first[:, None] + 1
    allowed = (length >= 1) & (length <= max_answer_tokens)
    allowed &= own[first][:, None]
    total = inside[first, 0][:, None] + inside[last, 1][None]
    total = np.where(allowed, total, -np.inf)
    if total.size and total.max() > best:
      best = float(total.max())
      row, column = np.unravel_index(total.argmax(), total.shape)
      where = window.first + first[row], window.first + last[column]
  text = ""
  if where is not None:
    text = context[pieces.starts[where[0]] : pieces.ends[where[1]]]
  return Answer(text, best, float(logits[:, 0].sum(-1).min()))


def normalise(text: str) -> str:
  """Lower case without punctuation, articles and superfluous spaces."""
  text = "".join(c for c in text.lower() if c not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(guess: str, truth: str) -> float:
  """1 if the normalised texts are equal, else 0."""
  return float(normalise(guess) == normalise(truth))


def token_f1(guess: str, truth: str) -> float:
  """F1 of the bags of words; "no answer" only equals itself."""
  a, b = normalise(guess).split(), normalise(truth).split()
  if not a or not b:
    return float(a == b)
  common = sum((collections.Counter(a) & collections.Counter(b)).values())
  return 2 * common / (len(a) + len(b))


def _best(metric, guess: str, truths: Sequence[str]) -> float:
  # A truth of articles only would count as "no answer".
  truths = [t for t in truths if normalise(t)] or [""]
  return max(metric(guess, truth) for truth in truths)


def best_threshold(
  margins: np.ndarray, answered: np.ndarray, unanswered: np.ndarray
) -> tuple[float, float]:
  """The threshold on null score - span score that serves a metric best.

  Args:
    margins: null score - span score of every question.
    answered: its metric if the span is given.
    unanswered: its metric if "no answer" is given, which happens where the
      margin exceeds the threshold.

  Returns:
    Mean of the metric, threshold.
  """
  order = np.argsort(margins, kind="stable")
  margins = margins[order]
  gains = (answered - unanswered)[order]
  totals = unanswered.sum() + np.concatenate([[0.0], np.cumsum(gains)])
  # A cut between equal margins does not exist.
  possible = np.append(np.append(True, margins[1:] > margins[:-1]), True)
  cut = int(np.where(possible, totals, -np.inf).argmax())
  threshold = margins[cut - 1] if cut else margins[0] - 1.0
  return float(totals[cut] / len(margins)), float(threshold)


def score(
  answers: Sequence[Answer], truths: Sequence[Sequence[str]], *, null: bool
) -> dict[str, float]:
  """Exact match and F1, in per cent as the official script reports them.

  Args:
    answers: one per question.
    truths: accepted texts of every question; none means "no answer".
    null: questions may have no answer (SQuAD 2.0): "" is given where the null
      score is the higher one, and the best threshold for this split is
      searched. A threshold tuned on the split that is reported flatters, as
      the published dev results do.
  """
  out = {}
  for name, metric in (("exact", exact_match), ("f1", token_f1)):
    given = np.array(
      [_best(metric, a.text, t) for a, t in zip(answers, truths)]
    )
    if not null:
      out[name] = 100.0 * float(given.mean())
      continue
    empty = np.array([_best(metric, "", t) for t in truths])
    margins = np.array([a.null_score - a.score for a in answers])
    out[name] = 100.0 * float(np.where(margins > 0, empty, given).mean())
    best, threshold = best_threshold(margins, given, empty)
    out[f"best_{name}"] = 100.0 * best
    out[f"best_{name}_threshold"] = threshold
  return out
