"""WordPiece as BERT reads text (Devlin et al. 2018, arXiv:1810.04805), and BPE.

Both cut text into words by BERT's rules. WordPiece takes the longest piece that
fits, again and again; BPE (Sennrich et al. 2016, arXiv:1508.07909) replays its
merges. A piece that goes on with a word starts with "##".

The rules are those of the reference implementation. They map nearly every
character to a fixed string, so `WordRules` is one `str.translate`; the pieces
of each word then come from the `tokenizers` library.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from bertjax.data.tokenizers import base, library

_CJK = (  # ideographs, each a word of its own; not Hangul, Hiragana, Katakana
  (0x4E00, 0x9FFF),
  (0x3400, 0x4DBF),
  (0x20000, 0x2A6DF),
  (0x2A700, 0x2B73F),
  (0x2B740, 0x2B81F),
  (0x2B820, 0x2CEAF),
  (0xF900, 0xFAFF),
  (0x2F800, 0x2FA1F),
)

# Characters outside Mn that NFD may move past each other (a regex class).
SORTED_BY_NFD = (
  "\u1715\u1734\u1b44\u1baa\u1bf2\u1bf3\u302e\u302f\ua953\ua9c0"
  "\U000111c0\U00011235\U0001134d\U000116b6\U0001193d\U00011f41"
  "\U00016ff0\U00016ff1\U0001d15e-\U0001d172\U0001d1bb-\U0001d1c0"
)


def _is_cjk(char: str) -> bool:
  return any(low <= ord(char) <= high for low, high in _CJK)


def _is_punctuation(char: str) -> bool:
  # All ASCII that is no letter, digit or space counts: "$", "^" and "`" too.
  if char.isascii():
    return char.isprintable() and not char.isalnum() and char != " "
  return unicodedata.category(char).startswith("P")


def _clean(char: str) -> str:
  category = unicodedata.category(char)
  if char in "\t\n\r" or category == "Zs" or char in "\u2028\u2029":
    return " "
  if char in "\0\ufffd" or category in ("Cc", "Cf"):
    return ""
  return f" {char} " if _is_cjk(char) else char


class _Cleaned(dict):
  """Character to its cleaned form, filled as characters turn up."""

  def __missing__(self, code: int) -> str:
    self[code] = _clean(chr(code))
    return self[code]


class _Prepared(dict):
  """Character to its words-apart form, filled as characters turn up."""

  def __init__(self, lowercase: bool, strip_accents: bool):
    super().__init__()
    self._lowercase = lowercase
    self._strip_accents = strip_accents

  def __missing__(self, code: int) -> str:
    text = _clean(chr(code))
    if self._lowercase:
      text = text.lower()
    if self._strip_accents:
      text = unicodedata.normalize("NFD", text)
      text = "".join(c for c in text if unicodedata.category(c) != "Mn")
    self[code] = "".join(f" {c} " if _is_punctuation(c) else c for c in text)
    return self[code]


class WordRules:
  """BERT's text cleaning and word splitting.

  Drops control characters, sets CJK ideographs and punctuation apart, and for
  uncased models lowers case and strips accents (NFD without category Mn).
  """

  def __init__(self, lowercase: bool, strip_accents: bool | None):
    """`strip_accents=None` means "if lowercase"."""
    strip_accents = lowercase if strip_accents is None else strip_accents
    self._lowercase = lowercase
    self._strip_accents = strip_accents
    self._cleaned = _Cleaned()
    self._prepared = _Prepared(lowercase, strip_accents)
    # Where a neighbour decides: a capital sigma is lowered by its place in the
    # word, and NFD sorts combining characters, of which some are no Mn.
    context = "\u03a3" if lowercase else ""
    if strip_accents:
      context += SORTED_BY_NFD
    self._context = re.compile(f"[{context}]") if context else None

  def __call__(self, text: str) -> str:
    """The text with spaces between its words; `split()` gives the words."""
    if self._context and not text.isascii() and self._context.search(text):
      text = text.translate(self._cleaned)
      if self._lowercase:
        text = text.lower()
      if self._strip_accents:
        text = unicodedata.normalize("NFD", text)
    return text.translate(self._prepared)


class WordTokenizer(base.Tokenizer):
  """WordPiece, or BPE inside words when it has merges.

  A word of more than `max_word_chars` characters, or in which some rest has no
  piece, is one [UNK] (BPE: one [UNK] for each run of unknown characters).
  """

  backend = "words"

  def __init__(
    self,
    pieces: Sequence[str],
    specials: base.Specials = base.BERT_SPECIALS,
    *,
    merges: Sequence[tuple[str, str]] | None = None,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    max_word_chars: int = 200,
    user_tokens: Sequence[str] = (),
  ):
    """Makes a tokenizer from its vocabulary.

    Args:
      pieces: the vocabulary; the position is the id.
      specials: names of the special tokens.
      merges: for BPE the pairs of pieces to join, best first.
      lowercase: lower all text (an "uncased" model).
      strip_accents: None means "if lowercase".
      max_word_chars: limit of WordPiece; `transformers` has 100.
      user_tokens: see `base.Tokenizer`.
    """
    kind = "wordpiece" if merges is None else "bpe"
    super().__init__(kind, pieces, specials, user_tokens)
    self.lowercase = lowercase
    self.strip_accents = lowercase if strip_accents is None else strip_accents
    self.max_word_chars = max_word_chars
    self._merges = None if merges is None else [tuple(m) for m in merges]
    self._rules = WordRules(self.lowercase, self.strip_accents)
    self._plain = tokenizers.Tokenizer(self._model())
    self._plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

  def _model(self):
    if self._merges is None:
      return models.WordPiece(
        self._id,
        unk_token=self.specials.unk,
        max_input_chars_per_word=self.max_word_chars,
      )
    return models.BPE(
      self._id,
      self._merges,
      unk_token=self.specials.unk,
      continuing_subword_prefix="##",
      fuse_unk=True,
    )

  def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
    return library.encode_chunked(self._plain, [self._rules(t) for t in texts])

  def _decode_ids(self, ids: list[int]) -> str:
    """Words with single spaces between them; what was split stays split."""
    return " ".join(self._pieces[i] for i in ids).replace(" ##", "")

  def _continues(self, piece: str) -> bool:
    return piece.startswith("##")

  def searches_for(self, piece: str) -> bool:
    part = piece.removeprefix("##")
    return self._merges is None and self._rules(part).split() == [part]

  def files(self) -> dict[str, bytes]:
    exported = library.bert_pipeline(
      self._model(),
      lowercase=self.lowercase,
      strip_accents=self.strip_accents,
    )
    library.add_literals(exported, self.specials, self.user_tokens)
    config = base.tokenizer_config(
      self.specials,
      do_lower_case=self.lowercase,
      strip_accents=self.strip_accents,
    )
    out = {
      "tokenizer.json": exported.to_str(pretty=True).encode(),
      "tokenizer_config.json": config,
    }
    if self._merges is None:
      out["vocab.txt"] = "".join(f"{p}\n" for p in self._pieces).encode()
    else:
      out["vocab.json"] = library.vocab_json(self._pieces)
      out["merges.txt"] = library.merges_txt(self._merges)
    return out

  def options(self) -> dict[str, Any]:
    return {
      "lowercase": self.lowercase,
      "strip_accents": self.strip_accents,
      "max_word_chars": self.max_word_chars,
    }

  @classmethod
  def from_files(
    cls, files: Mapping[str, bytes], manifest: Mapping[str, Any]
  ) -> "WordTokenizer":
    if "vocab.txt" in files:
      pieces, merges = read_vocab_txt(files["vocab.txt"]), None
    else:
      pieces, merges = library.read_bpe(
        files["vocab.json"], files["merges.txt"]
      )
    return cls(
      pieces,
      base.Specials(**manifest["specials"]),
      merges=merges,
      user_tokens=manifest["user_tokens"],
      **manifest["options"],
    )

  def with_pieces(
    self, pieces: Sequence[str], user_tokens: Sequence[str]
  ) -> "WordTokenizer":
    return WordTokenizer(
      pieces,
      self.specials,
      merges=self._merges,
      user_tokens=user_tokens,
      **self.options(),
    )


def read_vocab_txt(content: bytes) -> list[str]:
  """Pieces of a vocab.txt: one a line, the line number is the id.

  Only the line feed ends a line: published vocabularies hold pieces such as
  U+2028, at which `str.splitlines` would break.
  """
  lines = content.decode().split("\n")
  if lines[-1] == "":
    lines.pop()
  return [line.removesuffix("\r") for line in lines]
