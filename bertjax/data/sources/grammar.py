"""Documents from a small probabilistic grammar: learnable text, no network.

A stand-in for a corpus where there is none: small enough that a BERT-tiny
learns it in a minute, with something to learn for each part of pre-training.

* A document has one topic. Most of its content words come from that topic's
  lexicon, the others from one that all topics share, and a few nouns of the
  topic (its cast) return again and again. So the next sentence of a document
  can be told from a sentence of another one.
* Determiners, nouns and verbs agree in number, and a verb selects its
  preposition, so that masked words follow from both sides of their context.
* Words of a class have Zipf frequencies.

Content words are invented (`bavo`, plural `bavos`), function words English:

    the bavos of this leru often miru with some tiga fopus .
"""

import bisect
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

from bertjax.data.sources import base

_VERSION = 1  # of the grammar; part of the fingerprint

_SINGULAR = ("the", "a", "this", "every")
_PLURAL = ("the", "some", "these", "many")
_PREPOSITIONS = ("with", "near", "into", "from", "under", "against")
_ADVERBS = ("often", "today", "never", "slowly", "again", "soon")
_FUNCTION_WORDS = frozenset(
  (*_SINGULAR, *_PLURAL, *_PREPOSITIONS, *_ADVERBS, "of", "and", ",", ".")
)
# Shares of the classes in a lexicon; the rest are adjectives.
_NOUNS, _VERBS = 0.5, 0.3
# How often an optional part is there.
_ADJECTIVE, _COMPLEMENT, _ADVERB, _CONJUNCTION = 0.2, 0.1, 0.15, 0.05
_TRANSITIVE, _FROM_CAST, _IS_PLURAL = 0.5, 0.7, 0.4

DOCUMENTS = {"train": 3000, "validation": 300, "test": 300}


@dataclasses.dataclass(frozen=True)
class Lexicon:
  """Stems by class, the most frequent first."""

  nouns: tuple[str, ...]
  verbs: tuple[str, ...]
  adjectives: tuple[str, ...]

  @classmethod
  def of(cls, stems: Sequence[str]) -> "Lexicon":
    """Deals out the stems to the classes."""
    a = round(_NOUNS * len(stems))
    b = a + round(_VERBS * len(stems))
    return cls(tuple(stems[:a]), tuple(stems[a:b]), tuple(stems[b:]))

  @property
  def forms(self) -> tuple[str, ...]:
    """All words, inflected ones included."""
    inflected = (*self.nouns, *self.verbs)
    return (*inflected, *(f"{w}s" for w in inflected), *self.adjectives)


@functools.cache
def _cumulative(count: int) -> tuple[float, ...]:
  """Cumulative Zipf weights; the offset keeps the first word in bounds."""
  return tuple(itertools.accumulate(1 / (rank + 3) for rank in range(count)))


def _zipf(rng: random.Random, words: Sequence[str]) -> str:
  weights = _cumulative(len(words))
  return words[bisect.bisect(weights, rng.random() * weights[-1])]


def _uniform(rng: random.Random, words: Sequence[str]) -> str:
  return words[int(rng.random() * len(words))]


def _stems(seed: int) -> list[str]:
  """Every word of two open syllables, in an order that `seed` decides."""
  syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
  rng = random.Random(f"{seed}/lexicon")
  found = [a + b for a in syllables for b in syllables]
  order = {stem: rng.random() for stem in found}
  return sorted(set(found) - _FUNCTION_WORDS, key=order.__getitem__)


class _Document:
  """Writes the sentences of one document."""

  def __init__(
    self,
    rng: random.Random,
    topic: Lexicon,
    shared: Lexicon,
    topic_rate: float,
    cast_size: int,
  ):
    self._rng, self._topic, self._shared = rng, topic, shared
    self._topic_rate = topic_rate
    self._cast = [_zipf(rng, topic.nouns) for _ in range(cast_size)]

  def _maybe(self, rate: float) -> bool:
    return self._rng.random() < rate

  def _content(self, kind: str) -> str:
    lexicon = self._topic if self._maybe(self._topic_rate) else self._shared
    return _zipf(self._rng, getattr(lexicon, kind))

  def _noun_phrase(self, plural: bool, complement: bool) -> list[str]:
    words = [_uniform(self._rng, _PLURAL if plural else _SINGULAR)]
    if self._maybe(_ADJECTIVE):
      words.append(self._content("adjectives"))
    if self._cast and self._maybe(_FROM_CAST):
      noun = _uniform(self._rng, self._cast)
    else:
      noun = self._content("nouns")
    words.append(noun + "s" if plural else noun)
    if complement and self._maybe(_COMPLEMENT):
      words += ["of", *self._noun_phrase(self._maybe(_IS_PLURAL), False)]
    return words

  def _clause(self) -> list[str]:
    plural = self._maybe(_IS_PLURAL)
    words = self._noun_phrase(plural, True)
    if self._maybe(_ADVERB):
      words.append(_uniform(self._rng, _ADVERBS))
    verb = self._content("verbs")
    words.append(verb if plural else verb + "s")
    if not self._maybe(_TRANSITIVE):
      words.append(preposition_of(verb))
    return words + self._noun_phrase(self._maybe(_IS_PLURAL), False)

  def sentence(self) -> str:
    words = self._clause()
    if self._maybe(_CONJUNCTION):
      words += [",", "and", *self._clause()]
    return " ".join((*words, "."))


def preposition_of(verb: str) -> str:
  """The preposition that a verb's stem selects."""
  return _PREPOSITIONS[sum(map(ord, verb)) % len(_PREPOSITIONS)]


class Grammar:
  """See the module; built by `grammar`.

  An example is `{"id": "train/17", "text": a sentence a line, "topic": int}`;
  read it with `splitter="lines"`.
  """

  name = "grammar"
  licence = "none needed: generated"

  def __init__(
    self,
    documents: Mapping[str, int] = DOCUMENTS,
    num_topics: int = 8,
    topic_words: int = 20,
    topic_rate: float = 0.9,
    cast_size: int = 4,
    sentences: tuple[int, int] = (6, 12),
    seed: int = 0,
  ):
    """Args:
    documents: how many each split has; a split's documents stay when others
      grow, and a longer split begins with those of a shorter one.
    num_topics: topics, which take turns.
    topic_words: stems of a topic's lexicon, and of the shared one. The
      vocabulary has about 1.8 (num_topics + 1) topic_words words.
    topic_rate: share of content words from the topic's lexicon.
    cast_size: nouns of its topic that a document prefers; 0: none.
    sentences: least and greatest number of sentences in a document.
    seed: of lexicon and documents.

    Raises:
      ValueError: a number out of range.
    """
    documents = base.as_dict(documents)
    low, high = sentences
    _check(
      (documents and min(documents.values()) > 0, f"documents={documents}",
       "must give at least one document to each of one or more splits"),
      (num_topics >= 1, f"num_topics={num_topics}", "must be at least 1"),
      (topic_words >= 10, f"topic_words={topic_words}", "must be at least 10"),
      (0 <= topic_rate <= 1, f"topic_rate={topic_rate}", "must lie in 0..1"),
      (cast_size >= 0, f"cast_size={cast_size}", "must not be negative"),
      (1 <= low <= high, f"sentences=({low}, {high})",
       "must be ordered and at least 1"),
    )  # fmt: skip
    stems = _stems(seed)
    most = len(stems) // topic_words
    _check(
      (
        num_topics < most,
        f"num_topics={num_topics}",
        f"must be below {most}: there are {len(stems)} stems, and"
        f" topic_words={topic_words} of them for each topic",
      )
    )
    lexicons = [
      Lexicon.of(stems[i * topic_words : (i + 1) * topic_words])
      for i in range(num_topics + 1)
    ]
    self.topics, self.shared = tuple(lexicons[1:]), lexicons[0]
    self.splits = tuple(documents)
    self._documents, self._seed = documents, seed
    self._topic_rate, self._cast_size = topic_rate, cast_size
    self._sentences = (low, high)

  @property
  def vocabulary(self) -> frozenset[str]:
    """All words that can occur, punctuation included."""
    content = (lexicon.forms for lexicon in (self.shared, *self.topics))
    return _FUNCTION_WORDS.union(*content)

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      "grammar",
      _VERSION,
      self._documents,
      len(self.topics),
      len(self.shared.nouns + self.shared.verbs + self.shared.adjectives),
      self._topic_rate,
      self._cast_size,
      self._sentences,
      self._seed,
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    base.check_split(self, split)
    for number in range(self._documents[split]):
      yield self._example(split, number)

  def _example(self, split: str, number: int) -> base.Example:
    # A stream of its own per document, from `random()` alone, which Python
    # promises to keep: the same text on every machine and version.
    rng = random.Random(f"{self._seed}/{split}/{number}")
    topic = number % len(self.topics)
    document = _Document(
      rng, self.topics[topic], self.shared, self._topic_rate, self._cast_size
    )
    low, high = self._sentences
    count = low + int(rng.random() * (high - low + 1))
    lines = [document.sentence() for _ in range(count)]
    return {
      "id": f"{split}/{number}",
      "text": "\n".join(lines),
      "topic": topic,
    }


def _check(*conditions: tuple[bool, str, str]) -> None:
  for holds, given, rule in conditions:
    if not holds:
      raise ValueError(f"{given} of source 'grammar' {rule}.")
