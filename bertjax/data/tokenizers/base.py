"""What every tokenizer can do: text to ids, back, and to standard files."""

import abc
import dataclasses
import functools
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.data.tokenizers import folder as folder_lib
from bertjax.data.tokenizers.folder import as_json, sha256

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: not text


@dataclasses.dataclass(frozen=True)
class Specials:
  """Names of the special tokens, in the order of their ids when trained."""

  pad: str = "[PAD]"
  unk: str = "[UNK]"
  cls: str = "[CLS]"
  sep: str = "[SEP]"
  mask: str = "[MASK]"
  order: Sequence[str] = ("pad", "unk", "cls", "sep", "mask")

  def __post_init__(self):
    object.__setattr__(self, "order", tuple(self.order))
    roles = ("pad", "unk", "cls", "sep", "mask")
    if sorted(self.order) != sorted(roles):
      raise ValueError(
        f"specials.order={self.order!r} must name each of"
        f" {', '.join(roles)} once."
      )
    if len(set(self.names())) < len(roles):
      raise ValueError(
        f"specials={self.names()!r} repeats a name; give each its own."
      )

  def names(self) -> list[str]:
    """The five names in the order of their ids."""
    return [getattr(self, role) for role in self.order]


BERT_SPECIALS = Specials()
ROBERTA_SPECIALS = Specials(
  pad="<pad>",
  unk="<unk>",
  cls="<s>",
  sep="</s>",
  mask="<mask>",
  order=("cls", "pad", "sep", "unk", "mask"),
)


def tokenizer_config(specials: Specials, **options: Any) -> bytes:
  """The tokenizer_config.json that lets `transformers` read the folder."""
  roles = ("pad", "unk", "cls", "sep", "mask")
  named = {f"{role}_token": getattr(specials, role) for role in roles}
  return as_json(
    {"tokenizer_class": "PreTrainedTokenizerFast", **named, **options}
  )


class Tokenizer(abc.ABC):
  """Text to ids and back. Immutable; safe to share between threads.

  `encode` treats its text as mere text: a document that says "[SEP]" gives the
  pieces of "[", "SEP", "]", never the special id, or anyone could write
  separators and masks into the training data by writing about BERT. Ask for
  `parse_special=True` where the text is a prompt that may hold them.

  Attributes:
    kind: wordpiece, bpe, byte_bpe, unigram or bytes.
    backend: the row of `storage.BACKENDS` that reads this tokenizer's files.
    specials: names of the special tokens.
    user_tokens: pieces that are found in any text by their literal spelling,
      before anything else, also inside a word; they are not special.
    training: facts about how the vocabulary was made; {} if it was not here.
  """

  backend: str

  def __init__(
    self,
    kind: str,
    pieces: Sequence[str],
    specials: Specials,
    user_tokens: Iterable[str] = (),
    strips_left: Iterable[str] = (),
  ):
    """Makes the tables that all kinds share.

    Args:
      kind: see the class.
      pieces: the vocabulary; the position is the id.
      specials: names of the special tokens, all of them among the pieces.
      user_tokens: see the class; all of them among the pieces.
      strips_left: special tokens that swallow the whitespace before them when
        parsed, as RoBERTa's <mask> does.
    """
    self.kind = kind
    self.specials = specials
    self.user_tokens = tuple(user_tokens)
    self.training: Mapping[str, Any] = {}
    self._pieces = list(pieces)
    self._id = {piece: i for i, piece in enumerate(self._pieces)}
    self._strips_left = frozenset(strips_left)
    if len(self._id) < len(self._pieces):
      twice = next(p for i, p in enumerate(pieces) if self._id[p] != i)
      raise ValueError(
        f"The vocabulary holds {twice!r} twice; each piece needs its own line."
      )
    for name in (*specials.names(), *self.user_tokens):
      if name not in self._id:
        raise ValueError(
          f"The vocabulary of {len(self._pieces)} pieces lacks the token"
          f" {name!r}; name the special tokens that it has."
        )

  # What a back end implements.

  @abc.abstractmethod
  def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
    """Ids of plain texts; no special or user token is looked for."""

  @abc.abstractmethod
  def _decode_ids(self, ids: list[int]) -> str:
    """Text of ids, special tokens by their names."""

  @abc.abstractmethod
  def files(self) -> dict[str, bytes]:
    """The vocabulary in the standard files of its kind, by file name."""

  @abc.abstractmethod
  def options(self) -> dict[str, Any]:
    """What the files do not say about turning text into ids (JSON values)."""

  @classmethod
  @abc.abstractmethod
  def from_files(
    cls, files: Mapping[str, bytes], manifest: Mapping[str, Any]
  ) -> "Tokenizer":
    """The inverse of `files`, `options` and the manifest's common fields."""

  @abc.abstractmethod
  def _continues(self, piece: str) -> bool:
    """Whether an ordinary piece goes on with the word of the one before."""

  def searches_for(self, piece: str) -> bool:
    """Whether a new piece is found in words without being a user token."""
    del piece
    return False

  @abc.abstractmethod
  def with_pieces(
    self, pieces: Sequence[str], user_tokens: Sequence[str]
  ) -> "Tokenizer":
    """The same tokenizer with other rows.

    Args:
      pieces: the whole vocabulary: as before, but for [unusedN] rows that may
        have new names and for further rows at the end.
      user_tokens: all the user tokens.
    """

  # What users call.

  @property
  def vocab_size(self) -> int:
    return len(self._pieces)

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """All pieces; the position is the id."""
    return tuple(self._pieces)

  @property
  def pad_id(self) -> int:
    return self._id[self.specials.pad]

  @property
  def unk_id(self) -> int:
    return self._id[self.specials.unk]

  @property
  def cls_id(self) -> int:
    return self._id[self.specials.cls]

  @property
  def sep_id(self) -> int:
    return self._id[self.specials.sep]

  @property
  def mask_id(self) -> int:
    return self._id[self.specials.mask]

  @functools.cached_property
  def special_ids(self) -> np.ndarray:
    """Sorted ids of the special tokens, int32."""
    ids = sorted(self._id[name] for name in self.specials.names())
    return np.array(ids, np.int32)

  @functools.cached_property
  def continues_word(self) -> np.ndarray:
    """bool [vocab_size]: the piece goes on with the word of the one before.

    Special, user and [unusedN] pieces do not.
    """
    alone = {*self.specials.names(), *self.user_tokens}
    return np.array(
      [
        p not in alone and unused_slot(p) is None and self._continues(p)
        for p in self._pieces
      ],
      bool,
    )

  def parts(self, text: str) -> list[str]:
    """Plain text, user token, plain text, ..., plain text: all of the text."""
    pattern = self._text_tokens
    return [text] if pattern is None else pattern.split(text)

  def encode(self, text: str, *, parse_special: bool = False) -> np.ndarray:
    """Ids of a text, int32 [n], without [CLS] and [SEP].

    Args:
      text: any string; half surrogates count as U+FFFD.
      parse_special: turn the spelling of a special token into its id.
    """
    return self.encode_batch([text], parse_special=parse_special)[0]

  def encode_batch(
    self, texts: Sequence[str], *, parse_special: bool = False
  ) -> list[np.ndarray]:
    """`encode` of many texts, several at a time on as many cores as there are.

    The Rust and C++ back ends use threads. Fork worker processes before the
    first call, or set TOKENIZERS_PARALLELISM=false, else the `tokenizers`
    library switches its threads off in the children and warns.
    """
    texts = [whole_characters(text) for text in texts]
    literal = self._prompt_tokens if parse_special else self._text_tokens
    if literal is None:
      return self._encode_texts(texts)
    # "a<t>b" becomes the plain parts "a" and "b" and the token between them.
    split = [literal.split(text) for text in texts]
    plain = [part for parts in split for part in parts[::2]]
    encoded = iter(self._encode_texts(plain))
    out = []
    for parts in split:
      ids = [next(encoded)]
      for token in parts[1::2]:
        ids += [np.array([self._id[token]], np.int32), next(encoded)]
      out.append(np.concatenate(ids))
    return out

  def decode(
    self, ids: Sequence[int] | np.ndarray, *, keep_special: bool = False
  ) -> str:
    """Text of ids; special tokens are left out unless `keep_special`."""
    ids = self._checked(ids)
    if not keep_special:
      special = set(self.special_ids.tolist())
      ids = [i for i in ids if i not in special]
    return self._decode_ids(ids)

  def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The vocabulary's entries for these ids."""
    return [self._pieces[i] for i in self._checked(ids)]

  def piece_id(self, piece: str) -> int | None:
    """The id of a vocabulary entry, or None."""
    return self._id.get(piece)

  def fingerprint(self) -> str:
    """Hash of everything that decides which ids a text gets."""
    return self._fingerprint

  def identity(self) -> dict[str, Any]:
    """The manifest's fields that decide which ids a text gets."""
    return {
      "kind": self.kind,
      "backend": self.backend,
      "options": self.options(),
      "specials": dataclasses.asdict(self.specials),
      "user_tokens": list(self.user_tokens),
      "strips_left": sorted(self._strips_left),
      "vocab_size": self.vocab_size,
      "files": {n: sha256(c) for n, c in sorted(self.files().items())},
    }

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the standard files and manifest.json; all of them or nothing.

    To put the standard files beside others, as an export does, write
    `self.files()`.

    Args:
      folder: a new or empty folder, or one that this wrote, which is replaced.

    Raises:
      ValueError: the folder holds something else.
    """
    manifest = self.identity() | {
      "special_ids": self.special_ids.tolist(),
      "fingerprint": self.fingerprint(),
      "training": self.training,
    }
    folder_lib.write(folder, self.files(), manifest)

  def pin_fingerprint(self, files: Mapping[str, str]) -> None:
    """Keeps the fingerprint of the files (name to sha256) it was read from.

    Another release of a library may write the same content in other bytes;
    caches made with this tokenizer stay valid.
    """
    self.__dict__["_fingerprint"] = sha256(
      as_json({**self.identity(), "files": dict(files)})
    )

  # Common parts of the back ends.

  def _checked(self, ids) -> list[int]:
    ids = np.asarray(ids, np.int64).reshape(-1).tolist()
    for i in ids:
      if not 0 <= i < len(self._pieces):
        raise ValueError(
          f"id {i} is outside the vocabulary; ids go from 0 to"
          f" {len(self._pieces) - 1}."
        )
    return ids

  @functools.cached_property
  def _fingerprint(self) -> str:
    return sha256(as_json(self.identity()))

  @functools.cached_property
  def _text_tokens(self) -> re.Pattern[str] | None:
    return literal_pattern(self.user_tokens, self._strips_left)

  @functools.cached_property
  def _prompt_tokens(self) -> re.Pattern[str] | None:
    names = (*self.user_tokens, *self.specials.names())
    return literal_pattern(names, self._strips_left)


def unused_slot(piece: str) -> int | None:
  """The N of "[unusedN]", or None for any other piece."""
  found = re.fullmatch(r"\[unused(\d+)\]", piece)
  return int(found[1]) if found else None


def whole_characters(text: str) -> str:
  """The text with half surrogates, which no encoding has, as U+FFFD."""
  return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def literal_pattern(
  names: Iterable[str], strips_left: Collection[str] = ()
) -> re.Pattern[str] | None:
  """A pattern whose `split` gives text, name, text, ..., text.

  Args:
    names: what to find; none gives None.
    strips_left: those that swallow the whitespace before them.
  """
  # Longest first: "<url_2>" is not "<url" and a rest.
  names = sorted(set(names), key=lambda name: (-len(name), name))
  if not names:
    return None
  bare = "|".join(re.escape(n) for n in names)
  left = "|".join(re.escape(n) for n in names if n in strips_left)
  swallow = rf"(?:\s+(?={left}))?" if left else ""
  return re.compile(f"{swallow}({bare})")
