"""Reads tokenizers: our folders with a manifest, and plain published ones."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import models

from bertjax import registry
from bertjax.data.tokenizers import base, byte, library, unigram, words
from bertjax.data.tokenizers.folder import FORMAT, MANIFEST, as_json, sha256

BACKENDS: dict[str, type[base.Tokenizer]] = {
  "words": words.WordTokenizer,
  "library": library.LibraryTokenizer,
  "sentencepiece": unigram.SentencePieceTokenizer,
  "bytes": byte.ByteTokenizer,
}
_SENTENCEPIECE = ("spiece.model", "spm.model", "sentencepiece.bpe.model")
_PUBLISHED = (
  "tokenizer.json",
  "vocab.txt",
  "vocab.json with merges.txt",
  *_SENTENCEPIECE,
)


def load_tokenizer(folder: str | os.PathLike) -> base.Tokenizer:
  """Reads a folder that `Tokenizer.save` wrote, or a published one.

  Published folders are read as `transformers` reads them: tokenizer.json if
  there is one, else vocab.txt, vocab.json with merges.txt, or a SentencePiece
  model, with the names and options of tokenizer_config.json. A vocab.txt
  without any configuration (a release of Google's) gets the reference rules,
  and counts as cased when one of its pieces has a capital letter.

  Raises:
    ValueError: a file is missing, damaged, or of a kind that is not supported.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise ValueError(f"{folder} is not a folder; it should hold a tokenizer.")
  if (folder / MANIFEST).exists():
    return _load_ours(folder)
  return _load_published(folder)


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_bytes())
  except ValueError as err:
    raise ValueError(
      f"{path} is damaged (not JSON: {err}); restore it or make the"
      " tokenizer again."
    ) from err
  if not isinstance(value, dict):
    raise ValueError(f"{path} is not a JSON object; restore it.")
  return value


def _load_ours(folder: pathlib.Path) -> base.Tokenizer:
  path = folder / MANIFEST
  manifest = _json(path)
  needed = ("format", "backend", "files", "specials", "user_tokens", "options",
            "fingerprint", "training")  # fmt: skip
  for field in needed:
    if field not in manifest:
      raise ValueError(
        f"{path} has no {field!r}; restore it or make the tokenizer again."
      )
  if manifest["format"] != FORMAT:
    raise ValueError(
      f"{path}: format={manifest['format']!r}, but this version reads"
      f" {FORMAT}; make the tokenizer again."
    )
  files = {}
  for name, expected in manifest["files"].items():
    if not (folder / name).is_file():
      raise ValueError(
        f"{folder / name} is missing; the manifest expects it with sha256"
        f" {expected}."
      )
    files[name] = (folder / name).read_bytes()
    if (found := sha256(files[name])) != expected:
      raise ValueError(
        f"{folder / name} is not the file that was saved: sha256 {found}, the"
        f" manifest expects {expected}; restore it or make the tokenizer"
        " again."
      )
  backend = registry.lookup(BACKENDS, manifest["backend"], f"{path}: backend")
  try:
    tokenizer = backend.from_files(files, manifest)
  except (KeyError, TypeError) as err:
    raise ValueError(
      f"{path} does not describe a {manifest['backend']} tokenizer ({err});"
      " restore it or make the tokenizer again."
    ) from err
  same = {**tokenizer.identity(), "files": manifest["files"]}
  # Files are checked above; a newer library may write the same content anew.
  for field, value in same.items():
    if json.loads(as_json(value)) != manifest.get(field):
      raise ValueError(
        f"{path}: {field}={manifest.get(field)!r} contradicts the files, which"
        f" give {value!r}; restore it or make the tokenizer again."
      )
  tokenizer.training = manifest["training"]
  tokenizer.pin_fingerprint(manifest["files"])
  return tokenizer


def _name(token: Any) -> str | None:
  """A special token in a configuration: a string, or an object with one."""
  return token.get("content") if isinstance(token, Mapping) else token


def _specials(
  config: Mapping[str, Any], vocabulary: Mapping[str, Any], where: str
) -> base.Specials:
  """Special names: as configured, else BERT's or RoBERTa's if they are there.

  RoBERTa's files call <s> both bos and cls, others only bos.
  """
  roles = {
    "pad": ("pad_token",),
    "unk": ("unk_token",),
    "cls": ("cls_token", "bos_token"),
    "sep": ("sep_token", "eos_token"),
    "mask": ("mask_token",),
  }
  names = {}
  for role, fields in roles.items():
    configured = [_name(config.get(field)) for field in fields]
    usual = [getattr(s, role) for s in (base.BERT_SPECIALS,
                                        base.ROBERTA_SPECIALS)]  # fmt: skip
    found = [n for n in (*configured, *usual) if n and n in vocabulary]
    if not found:
      raise ValueError(
        f"{where} has no {role} token; name one of its pieces as {fields[0]}"
        " in tokenizer_config.json."
      )
    names[role] = found[0]
  return base.Specials(**names)


def _load_published(folder: pathlib.Path) -> base.Tokenizer:
  config = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (folder / name).exists():
      config |= {k: v for k, v in _json(folder / name).items() if v is not None}
  readers = {
    "tokenizer.json": _read_tokenizer_json,
    "vocab.txt": _read_vocab_txt,
    "vocab.json": _read_byte_bpe,
    **dict.fromkeys(_SENTENCEPIECE, _read_sentencepiece),
  }
  for name, reader in readers.items():
    if (folder / name).exists():
      try:
        return reader(folder / name, config)
      except UnicodeDecodeError as err:
        raise ValueError(f"{folder / name} is not UTF-8 text: {err}") from err
  raise ValueError(
    f"{folder} holds no tokenizer; it needs {MANIFEST} or one of"
    f" {', '.join(_PUBLISHED)}."
  )


def _read_tokenizer_json(
  path: pathlib.Path, config: Mapping[str, Any]
) -> base.Tokenizer:
  try:
    backend = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
  except UnicodeDecodeError:
    raise
  except Exception as err:  # the library raises nothing narrower
    raise ValueError(
      f"{path} is not a tokenizer that the tokenizers library reads: {err}"
    ) from err
  vocabulary = backend.get_vocab(with_added_tokens=True)
  specials = _specials(config, vocabulary, str(path))
  added = backend.get_added_tokens_decoder().values()
  user = [t.content for t in added if not t.special]
  user = [name for name in user if name not in specials.names()]
  return library.LibraryTokenizer(backend, specials, user)


def _read_vocab_txt(
  path: pathlib.Path, config: Mapping[str, Any]
) -> base.Tokenizer:
  pieces = words.read_vocab_txt(path.read_bytes())
  table = {piece: i for i, piece in enumerate(pieces)}
  specials = _specials(config, table, str(path))
  if not config:
    return words.WordTokenizer(pieces, specials, lowercase=_uncased(pieces))
  if len(table) < len(pieces):
    raise ValueError(f"{path} holds a piece twice; each needs its own line.")
  model = models.WordPiece(table, unk_token=specials.unk)
  backend = library.bert_pipeline(
    model,
    lowercase=config.get("do_lower_case", True),
    strip_accents=config.get("strip_accents"),
    space_cjk=config.get("tokenize_chinese_chars", True),
  )
  library.add_literals(backend, specials)
  return library.LibraryTokenizer(backend, specials)


def _uncased(pieces: list[str]) -> bool:
  return not any(
    piece != piece.lower() and not piece.startswith(("[", "<"))
    for piece in pieces
  )


def _read_byte_bpe(
  path: pathlib.Path, config: Mapping[str, Any]
) -> base.Tokenizer:
  merges = path.with_name("merges.txt")
  if not merges.exists():
    raise ValueError(f"{merges} is missing; {path.name} needs it.")
  _json(path)
  pieces, pairs = library.read_bpe(path.read_bytes(), merges.read_bytes())
  specials = _specials(config, dict.fromkeys(pieces), str(path))
  return library.byte_bpe(
    pieces,
    pairs,
    specials,
    add_prefix_space=config.get("add_prefix_space", False),
  )


def _read_sentencepiece(
  path: pathlib.Path, config: Mapping[str, Any]
) -> base.Tokenizer:
  fairseq = path.name == "sentencepiece.bpe.model"
  rows = unigram.model_pieces(path.read_bytes(), str(path))
  if fairseq:
    rows += ["<pad>"]
  # These models come without a mask; `transformers` puts it after the last row.
  tail = []
  mask = _name(config.get("mask_token"))
  mask = mask or ("<mask>" if fairseq else "[MASK]")
  if mask not in rows:
    tail = [mask]
  specials = _specials(
    {**config, "mask_token": mask}, dict.fromkeys([*rows, *tail]), str(path)
  )
  return unigram.SentencePieceTokenizer(
    path.read_bytes(),
    specials,
    tail=tail,
    layout="fairseq" if fairseq else "plain",
  )
