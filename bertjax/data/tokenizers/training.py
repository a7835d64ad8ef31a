"""Vocabularies from text, the same bytes on every run.

The `tokenizers` trainers number the pieces of single characters in the order
of a randomised hash map, and break ties between equally frequent merges by
those numbers, so that even the *set* of pieces differs between runs. Here the
characters are counted and sorted first and handed over with their numbers;
what follows is deterministic. WordPiece pieces come from these BPE merges, not
from Google's unpublished likelihood criterion (as in `tokenizers`).
"""

import collections
import importlib.metadata
import inspect
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from bertjax import registry
from bertjax.data.tokenizers import (
  base,
  byte,
  extend,
  library,
  sampling,
  unigram,
  words,
)

# Documents, or how often each word of `words_of` occurs in them.
Counted = list[str] | Mapping[str, int]
Words = Callable[[str], list[str]]

_ALPHABET = 1_000  # distinct characters kept, as BERT's own vocabularies


def _check_names(specials: base.Specials, user_tokens: Sequence[str]) -> None:
  """Refuses special names that some text could spell as ordinary pieces."""
  for name in specials.names():
    mixed = any(c.isalnum() for c in name) and not name.isalnum()
    if not mixed or name.startswith("##") or any(c.isspace() for c in name):
      raise ValueError(
        f"special token {name!r} could be a word of a text; use a name of"
        " letters and punctuation without spaces, like [MASK]."
      )
  for name in user_tokens:
    if not name or name in specials.names():
      raise ValueError(
        f"user token {name!r} is empty or a special token; remove it."
      )


def _without(texts: Iterable[str], names: Sequence[str]) -> Iterator[str]:
  """The texts between user tokens, which training must not see."""
  pattern = base.literal_pattern(names)
  for text in texts:
    yield from pattern.split(text)[::2] if pattern else [text]


def _repeated(counts: Mapping[str, int]) -> Iterator[list[str]]:
  """Texts that hold every word as often as counted, in sorted order."""
  batch, size = [], 0
  for word, count in sorted(counts.items()):
    while count:
      take = min(count, max(1, 1_000_000 // (len(word) + 1)))
      batch.append(f"{word} " * take)
      size += len(batch[-1])
      count -= take
      if size > 8_000_000:
        yield batch
        batch, size = [], 0
  yield batch


def _alphabet(
  counts: Mapping[str, int], limit: int
) -> tuple[list[str], list[str]]:
  """The most frequent characters, and their "##" forms that occur; sorted."""
  total = collections.Counter()
  inside = set()
  for word, count in counts.items():
    inside.update(word[1:])
    for char in word:
      total[char] += count
  best = sorted(total, key=lambda char: (-total[char], char))[:limit]
  return sorted(best), [f"##{c}" for c in sorted(best) if c in inside]


def _merge(
  texts: Iterable[Any],
  start: Sequence[str],
  alphabet: Sequence[str],
  pre_tokenizer: Any,
  *,
  vocab_size: int,
  min_frequency: int,
  prefix: str | None,
) -> tuple[list[str], list[tuple[str, str]]]:
  """Pieces (`start` first, in that order) and merges, best first."""
  if vocab_size < len(start):
    raise ValueError(
      f"vocab_size={vocab_size} is too small: special tokens and single"
      f" characters alone are {len(start)} pieces; raise it, or lower"
      " max_alphabet where the kind has it."
    )
  inside = {"continuing_subword_prefix": prefix} if prefix else {}
  model = tokenizers.Tokenizer(models.BPE(**inside))
  model.pre_tokenizer = pre_tokenizer
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=min_frequency,
    special_tokens=list(start),
    initial_alphabet=list(alphabet),
    limit_alphabet=len(alphabet),
    **inside,
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  spec = json.loads(model.to_str())["model"]
  pieces = sorted(spec["vocab"], key=spec["vocab"].get)
  if pieces[: len(start)] != list(start):
    raise AssertionError("the trainer renumbered the pieces it was given")
  pairs = [m.split(" ") if isinstance(m, str) else m for m in spec["merges"]]
  return pieces, [tuple(pair) for pair in pairs]


def _bert_words(
  lowercase: bool, strip_accents: bool | None, **options: Any
) -> Words:
  del options  # of the merges
  rules = words.WordRules(lowercase, strip_accents)
  return lambda text: rules(text).split()


def _byte_words(
  lowercase: bool, add_prefix_space: bool, **options: Any
) -> Words:
  del options  # of the merges
  cut = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)

  def split(text: str) -> list[str]:
    text = text.lower() if lowercase else text
    return [word for word, _ in cut.pre_tokenize_str(text)]

  return split


# Kinds whose trainers need no more than how often each word occurs.
WORDS: dict[str, Callable[..., Words]] = {
  "wordpiece": _bert_words,
  "bpe": _bert_words,
  "byte_bpe": _byte_words,
}


def words_of(kind: str, options: Mapping[str, Any]) -> Words:
  """How a document becomes the words that a training by counts counts.

  Args:
    kind: key of `WORDS`.
    options: from `resolve`.

  Raises:
    ValueError: a kind that learns from more than words.
  """
  if kind not in WORDS:
    raise ValueError(
      f"kind={kind!r} cannot be trained from counts of words; choose from"
      f" {', '.join(sorted(WORDS))}, or train it in process from a sample."
    )
  split = WORDS[kind](**options)

  def document_words(text: str) -> list[str]:
    parts = sampling.parts(base.whole_characters(text))
    parts = _without(parts, options["user_tokens"])
    return [word for part in parts if part.strip() for word in split(part)]

  return document_words


def _train_words(
  texts: Counted,
  vocab_size: int,
  specials: base.Specials,
  user_tokens: Sequence[str],
  *,
  keep_merges: bool,
  min_frequency: int,
  max_alphabet: int,
  max_word_chars: int,
  **options: Any,
) -> words.WordTokenizer:
  """Pieces inside BERT's words; with their merges BPE, else WordPiece."""
  if not isinstance(texts, Mapping):
    split, counts = _bert_words(**options), collections.Counter()
    for text in texts:
      counts.update(split(text))
  else:
    counts = texts
  counts = {w: n for w, n in counts.items() if len(w) <= max_word_chars}
  first, inside = _alphabet(counts, max_alphabet)
  pieces, merges = _merge(
    _repeated(counts),
    [*specials.names(), *user_tokens, *first, *inside],
    first,
    pre_tokenizers.WhitespaceSplit(),
    vocab_size=vocab_size,
    min_frequency=min_frequency,
    prefix="##",
  )
  return words.WordTokenizer(
    pieces,
    specials,
    merges=merges if keep_merges else None,
    max_word_chars=max_word_chars,
    user_tokens=user_tokens,
    **options,
  )


def wordpiece(
  texts: Counted,
  vocab_size: int,
  specials: base.Specials = base.BERT_SPECIALS,
  user_tokens: Sequence[str] = (),
  *,
  min_frequency: int = 2,
  lowercase: bool = True,
  strip_accents: bool | None = None,
  max_word_chars: int = 200,
  max_alphabet: int = _ALPHABET,
) -> base.Tokenizer:
  """Trains a WordPiece vocabulary; arguments as in `train_tokenizer`."""
  return _train_words(
    texts,
    vocab_size,
    specials,
    user_tokens,
    keep_merges=False,
    min_frequency=min_frequency,
    max_alphabet=max_alphabet,
    max_word_chars=max_word_chars,
    lowercase=lowercase,
    strip_accents=strip_accents,
  )


def bpe(
  texts: Counted,
  vocab_size: int,
  specials: base.Specials = base.BERT_SPECIALS,
  user_tokens: Sequence[str] = (),
  *,
  min_frequency: int = 2,
  lowercase: bool = True,
  strip_accents: bool | None = None,
  max_alphabet: int = _ALPHABET,
) -> base.Tokenizer:
  """Trains BPE inside BERT's words; arguments as in `train_tokenizer`."""
  return _train_words(
    texts,
    vocab_size,
    specials,
    user_tokens,
    keep_merges=True,
    min_frequency=min_frequency,
    max_alphabet=max_alphabet,
    max_word_chars=200,
    lowercase=lowercase,
    strip_accents=strip_accents,
  )


def byte_bpe(
  texts: Counted,
  vocab_size: int,
  specials: base.Specials = base.ROBERTA_SPECIALS,
  user_tokens: Sequence[str] = (),
  *,
  min_frequency: int = 2,
  lowercase: bool = False,
  add_prefix_space: bool = False,
) -> base.Tokenizer:
  """Trains byte-level BPE; arguments as in `train_tokenizer`."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  if isinstance(texts, Mapping):  # of words whose bytes are letters already
    texts, cut = _repeated(texts), pre_tokenizers.WhitespaceSplit()
  else:
    texts = (text.lower() for text in texts) if lowercase else texts
    cut = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  pieces, merges = _merge(
    texts,
    [*specials.names(), *user_tokens, *alphabet],
    alphabet,
    cut,
    vocab_size=vocab_size,
    min_frequency=min_frequency,
    prefix=None,
  )
  return library.byte_bpe(
    pieces,
    merges,
    specials,
    add_prefix_space=add_prefix_space,
    lowercase=lowercase,
    user_tokens=user_tokens,
  )


def train_unigram(
  texts: list[str],
  vocab_size: int,
  specials: base.Specials = base.BERT_SPECIALS,
  user_tokens: Sequence[str] = (),
  *,
  lowercase: bool = False,
  character_coverage: float = 0.9995,
  byte_fallback: bool = False,
) -> base.Tokenizer:
  """Trains a SentencePiece unigram model; arguments as in `train_tokenizer`.

  A small corpus may support fewer pieces than `vocab_size`.
  """
  order = {name: i for i, name in enumerate(specials.names())}
  out = io.BytesIO()
  room = vocab_size - len(user_tokens)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=(
        line
        for text in texts
        for line in text.replace("\0", " ").split("\n")
        if line.strip()
      ),
      model_writer=out,
      vocab_size=room,
      model_type="unigram",
      character_coverage=character_coverage,
      byte_fallback=byte_fallback,
      normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
      pad_piece=specials.pad,
      pad_id=order[specials.pad],
      unk_piece=specials.unk,
      unk_id=order[specials.unk],
      bos_piece=specials.cls,
      bos_id=order[specials.cls],
      eos_piece=specials.sep,
      eos_id=order[specials.sep],
      control_symbols=[specials.mask],
      hard_vocab_limit=False,
      max_sentence_length=4 * sampling.CHUNK_BYTES,
      num_threads=4,  # sums of floats: the number decides, not the machine
      minloglevel=2,
    )
  except RuntimeError as err:
    raise ValueError(
      f"vocab_size={vocab_size} does not suit this text and"
      f" character_coverage={character_coverage}; SentencePiece says: {err}"
    ) from err
  return unigram.SentencePieceTokenizer(
    out.getvalue(), specials, tail=user_tokens, user_tokens=user_tokens
  )


def train_bytes(
  texts: list[str],
  specials: base.Specials = base.BERT_SPECIALS,
  user_tokens: Sequence[str] = (),
) -> base.Tokenizer:
  """The byte tokenizer; its vocabulary is the same for every text."""
  del texts
  return byte.ByteTokenizer(specials, tail=user_tokens, user_tokens=user_tokens)


TRAINERS: dict[str, Callable[..., base.Tokenizer]] = {
  "wordpiece": wordpiece,
  "bpe": bpe,
  "byte_bpe": byte_bpe,
  "unigram": train_unigram,
  "bytes": train_bytes,
}


def resolve(
  kind: str, options: Mapping[str, Any], field: str
) -> dict[str, Any]:
  """All options of a training, defaults included, as JSON values.

  Raises:
    ValueError: unknown kind, unknown or missing option.
  """
  trainer = registry.lookup(TRAINERS, kind, f"{field}.kind")
  known = {
    name: p.default
    for name, p in inspect.signature(trainer).parameters.items()
    if name != "texts"
  } | {"max_bytes": 1 << 26, "seed": 0, "pad_to_multiple": 1}
  for name in options:
    if name not in known:
      raise ValueError(
        f"{field}.{name} is not an option of kind={kind!r}; it takes"
        f" {', '.join(sorted(known))}."
      )
  resolved = known | dict(options)
  for name, value in resolved.items():
    if value is inspect.Parameter.empty:
      raise ValueError(f"{field}.{name} is required for kind={kind!r}.")
  specials = resolved["specials"]
  if isinstance(specials, Mapping):
    try:
      specials = base.Specials(**specials)
    except TypeError as err:
      raise ValueError(
        f"{field}.specials={dict(specials)!r} takes pad, unk, cls, sep, mask"
        " and order."
      ) from err
  resolved["specials"] = specials
  resolved["user_tokens"] = tuple(resolved["user_tokens"])
  _check_names(specials, resolved["user_tokens"])
  return resolved


def train_tokenizer(
  kind: str, texts: Iterable[str], **options: Any
) -> base.Tokenizer:
  """Makes a vocabulary from text; equal input gives equal bytes.

  Args:
    kind: wordpiece, bpe, byte_bpe, unigram or bytes.
    texts: documents, read once.
    **options: for every kind
      specials: a `base.Specials` or its fields; BERT's by default, RoBERTa's
        for byte_bpe. Their ids come first.
      user_tokens: pieces kept whole wherever a text spells them.
      max_bytes: bound on the text that the trainer sees (default 64 MiB),
        sampled from the whole stream.
      seed: of that sample.
      pad_to_multiple: add [unusedN] rows up to a multiple of this.
      For all but bytes
      vocab_size: number of pieces, special tokens included, padding not.
      For wordpiece, bpe, byte_bpe
      min_frequency: least number of occurrences of a merge (2).
      lowercase: lower all text (True; False for byte_bpe; unigram has it too).
      For wordpiece and bpe
      strip_accents: drop accents (None: if lowercase).
      max_alphabet: distinct characters kept (1000), most frequent first.
      For wordpiece: max_word_chars (200). For byte_bpe: add_prefix_space
      (False). For unigram: character_coverage (0.9995), byte_fallback (False).

  Raises:
    ValueError: unknown kind or option; no text; a vocabulary too small for the
      characters; a special name that an ordinary text could spell.
  """
  return train_resolved(kind, texts, resolve(kind, options, "tokenizer"))


def train_resolved(
  kind: str, texts: Iterable[str], options: Mapping[str, Any]
) -> base.Tokenizer:
  """`train_tokenizer` with options that come from `resolve`."""
  options = dict(options)
  max_bytes, seed = options.pop("max_bytes"), options.pop("seed")
  multiple = options.pop("pad_to_multiple")
  # Bytes learn nothing: do not read a corpus for them.
  sample, facts = [], {}
  if kind != "bytes":
    sample, facts = sampling.sample_texts(texts, max_bytes, seed)
    sample = [t for t in _without(sample, options["user_tokens"]) if t.strip()]
    if not sample:
      raise ValueError(
        f"No text to train a {kind} vocabulary on: {facts['documents_read']}"
        " documents, all empty; check the source."
      )
  facts |= {"max_bytes": max_bytes, "seed": seed}
  return _trained(kind, sample, options, multiple, facts)


def train_counted(
  kind: str,
  counts: Mapping[str, int],
  options: Mapping[str, Any],
  facts: Mapping[str, Any],
) -> base.Tokenizer:
  """The vocabulary of all documents whose words were counted.

  Equals `train_resolved` where `max_bytes` holds them all.

  Args:
    kind: key of `WORDS`.
    counts: how often each word of `words_of` occurs.
    options: from `resolve`; `max_bytes` and `seed`, which are of a sample, do
      not count.
    facts: about the counting, for the tokenizer's `training`.

  Raises:
    ValueError: no word, or a vocabulary too small for the characters.
  """
  if not counts:
    raise ValueError(
      f"No word to train a {kind} vocabulary on; check the source."
    )
  options = dict(options)
  for name in ("max_bytes", "seed"):
    options.pop(name)
  multiple = options.pop("pad_to_multiple")
  return _trained(kind, counts, options, multiple, facts)


def _trained(
  kind: str,
  texts: Counted,
  options: Mapping[str, Any],
  multiple: int,
  facts: Mapping[str, Any],
) -> base.Tokenizer:
  trained = TRAINERS[kind](texts, **options)
  trained = extend.pad_vocabulary(trained, multiple)
  trained.training = {
    **facts,
    "options": {
      name: list(value) if isinstance(value, tuple) else value
      for name, value in options.items()
      if name != "specials"
    },
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("tokenizers", "sentencepiece")
    },
  }
  return trained
