"""Tokenizers that the `tokenizers` library runs from end to end.

Byte-level BPE (Radford et al. 2019; RoBERTa, Liu et al. 2019,
arXiv:1907.11692) that we train, and any published tokenizer.json as it is:
its ids are those of `transformers`' fast tokenizers by construction.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from bertjax.data.tokenizers import base

# Texts handed to the library at once: its result objects are some 100 bytes
# a token, so a whole corpus in one call would not fit in memory.
_CHUNK_CHARS = 4_000_000


def encode_chunked(
  backend: tokenizers.Tokenizer, texts: Sequence[str]
) -> list[np.ndarray]:
  """Ids of many texts, each int32 [n], with memory bounded by the texts."""
  out, start, size = [], 0, 0
  for i, text in enumerate(texts):
    size += len(text)
    if size >= _CHUNK_CHARS or i + 1 == len(texts):
      encoded = backend.encode_batch_fast(
        list(texts[start : i + 1]), add_special_tokens=False
      )
      out += [np.array(e.ids, np.int32) for e in encoded]
      start, size = i + 1, 0
  return out


def vocab_json(pieces: Sequence[str]) -> bytes:
  """A vocab.json: one object from piece to id, in the order of the ids."""
  table = {piece: i for i, piece in enumerate(pieces)}
  return (json.dumps(table, ensure_ascii=False) + "\n").encode()


def merges_txt(merges: Sequence[Sequence[str]]) -> bytes:
  """A merges.txt: a version line, then one pair a line, best first."""
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  return ("\n".join(lines) + "\n").encode()


def add_literals(
  backend: tokenizers.Tokenizer,
  specials: base.Specials,
  user_tokens: Sequence[str] = (),
  strips_left: Collection[str] = (),
) -> tokenizers.Tokenizer:
  """Tells a tokenizer.json which pieces other programs shall find in text."""
  backend.add_special_tokens(
    [
      tokenizers.AddedToken(n, lstrip=n in strips_left, special=True)
      for n in specials.names()
    ]
  )
  backend.add_tokens(
    [tokenizers.AddedToken(n, normalized=False) for n in user_tokens]
  )
  return backend


def byte_bpe(
  pieces: Sequence[str],
  merges: Sequence[tuple[str, str]],
  specials: base.Specials = base.ROBERTA_SPECIALS,
  *,
  add_prefix_space: bool = False,
  lowercase: bool = False,
  user_tokens: Sequence[str] = (),
  mask_strips_left: bool = True,
) -> "LibraryTokenizer":
  """Byte-level BPE: every text has ids and decodes to itself.

  Parsed in a prompt, RoBERTa's mask swallows the whitespace before it.
  """
  vocab = {piece: i for i, piece in enumerate(pieces)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
  if lowercase:
    backend.normalizer = normalizers.Lowercase()
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=add_prefix_space
  )
  backend.decoder = decoders.ByteLevel()
  strips_left = (specials.mask,) if mask_strips_left else ()
  add_literals(backend, specials, user_tokens, strips_left)
  return LibraryTokenizer(backend, specials, user_tokens)


def bert_pipeline(
  model: Any,
  *,
  lowercase: bool,
  strip_accents: bool | None,
  space_cjk: bool = True,
) -> tokenizers.Tokenizer:
  """A word model behind `transformers`' idea of BERT's text cleaning.

  It differs from the reference rules (`words.py`) in what the Unicode tables of
  the library's release know and in the final Greek sigma.
  """
  backend = tokenizers.Tokenizer(model)
  backend.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=space_cjk,
    strip_accents=strip_accents,
    lowercase=lowercase,
  )
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece(prefix="##")
  return backend


class LibraryTokenizer(base.Tokenizer):
  """A tokenizer.json as it stands, without its truncation and special tokens.

  Published files often carry truncation and padding settings of the model they
  came with; those are dropped, since `encode` promises the whole text.
  """

  backend = "library"

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    specials: base.Specials,
    user_tokens: Sequence[str] = (),
  ):
    """Wraps a copy of `backend`.

    Args:
      backend: model, normalizer, pre-tokenizer, decoder.
      specials: names of the special tokens, all known to `backend`.
      user_tokens: see `base.Tokenizer`; `backend` has them as added tokens.
    """
    spec = json.loads(backend.to_str())
    spec.update(truncation=None, padding=None, post_processor=None)
    added = {t["id"]: t for t in spec["added_tokens"]}
    self._spec = spec
    self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    # Texts are split at tokens by the base class, so the library must not.
    names = {token["content"] for token in added.values()}
    self._plain = tokenizers.Tokenizer.from_str(
      json.dumps(
        spec | {"added_tokens": [], "model": _unspelt(spec["model"], names)}
      )
    )
    vocab = backend.get_vocab(with_added_tokens=True)
    if sorted(vocab.values()) != list(range(len(vocab))):
      raise ValueError(
        f"tokenizer.json: the {len(vocab)} pieces do not have the ids 0 to"
        f" {len(vocab) - 1}; a tokenizer with gaps cannot be used."
      )
    super().__init__(
      _kind(spec),
      sorted(vocab, key=vocab.get),
      specials,
      user_tokens,
      [t["content"] for t in added.values() if t["lstrip"]],
    )

  def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
    return encode_chunked(self._plain, texts)

  def _decode_ids(self, ids: list[int]) -> str:
    return self._backend.decode(ids, skip_special_tokens=False)

  def _continues(self, piece: str) -> bool:
    if self.kind == "byte_bpe":
      # How byte-level BPE writes " \n\t\r\v\f".
      return not piece.startswith(("Ġ", "Ċ", "ĉ", "č", "ċ", "Č"))
    model = self._spec["model"]
    if model.get("end_of_word_suffix"):
      raise ValueError(
        "tokenizer.json: model.end_of_word_suffix="
        f"{model['end_of_word_suffix']!r} marks where words end, so no piece"
        " says whether it continues one; mask single pieces instead of whole"
        " words."
      )
    if prefix := model.get("continuing_subword_prefix"):
      return piece.startswith(prefix)
    return not piece.startswith("▁")

  def files(self) -> dict[str, bytes]:
    model = self._spec["model"]
    out = {
      "tokenizer.json": self._backend.to_str(pretty=True).encode(),
      "tokenizer_config.json": base.tokenizer_config(self.specials),
    }
    if self.kind == "wordpiece":
      out["vocab.txt"] = "".join(f"{p}\n" for p in self._pieces).encode()
    if self.kind in ("bpe", "byte_bpe"):
      out["vocab.json"] = vocab_json(self._pieces)
      pairs = [
        m.split(" ") if isinstance(m, str) else m for m in model["merges"]
      ]
      out["merges.txt"] = merges_txt(pairs)
    return out

  def options(self) -> dict[str, Any]:
    return {}

  @classmethod
  def from_files(
    cls, files: Mapping[str, bytes], manifest: Mapping[str, Any]
  ) -> "LibraryTokenizer":
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    return cls(
      backend,
      base.Specials(**manifest["specials"]),
      manifest["user_tokens"],
    )

  def with_pieces(
    self, pieces: Sequence[str], user_tokens: Sequence[str]
  ) -> "LibraryTokenizer":
    spec = json.loads(json.dumps(self._spec))
    model = spec["model"]
    if self.kind == "unigram":
      rows = model["vocab"]
      # A lower score would change the price of unknown characters.
      lowest = min(score for _, score in rows)
      rows += [[piece, lowest] for piece in pieces[len(rows) :]]
      model["vocab"] = [[p, score] for p, (_, score) in zip(pieces, rows)]
    else:
      model["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    add_literals(backend, self.specials, user_tokens, self._strips_left)
    return LibraryTokenizer(backend, self.specials, user_tokens)


def _unspelt(model: Mapping[str, Any], names: Collection[str]) -> Any:
  """A unigram model whose tokens and [unusedN] rows no text can spell.

  Unigram takes every row of its table wherever the letters stand; other models
  reach only what their merges or their words make.
  """
  if model.get("type") != "Unigram":
    return model
  # What the model sees has no spaces: they are word marks by then.
  vocab = [
    [f"{p} " if p in names or base.unused_slot(p) is not None else p, score]
    for p, score in model["vocab"]
  ]
  return {**model, "vocab": vocab}


def _kind(spec: Mapping[str, Any]) -> str:
  """The kind of a parsed tokenizer.json."""
  kind = spec["model"].get("type")
  if kind == "BPE":
    byte_level = "ByteLevel" in json.dumps(spec["pre_tokenizer"])
    return "byte_bpe" if byte_level else "bpe"
  if kind in ("WordPiece", "Unigram"):
    return kind.lower()
  raise ValueError(
    f"tokenizer.json: model.type={kind!r} is not supported; it must be"
    " WordPiece, BPE or Unigram."
  )


def read_bpe(
  vocab: bytes, merges: bytes
) -> tuple[list[str], list[tuple[str, str]]]:
  """Pieces and merges of a vocab.json and a merges.txt."""
  table = json.loads(vocab)
  pieces = sorted(table, key=table.get)
  if [table[p] for p in pieces] != list(range(len(pieces))):
    raise ValueError(
      f"vocab.json: the {len(pieces)} pieces do not have the ids 0 to"
      f" {len(pieces) - 1}."
    )
  lines = merges.decode().split("\n")
  if lines[0].startswith("#version"):
    lines = lines[1:]
  pairs = [tuple(line.split(" ")) for line in lines if line]
  for pair in pairs:
    if len(pair) != 2:
      raise ValueError(
        f"merges.txt: {' '.join(pair)!r} is not two pieces and a space."
      )
  return pieces, pairs
