"""Text to ids: train a vocabulary, load one, extend one.

  tokenizer = train_tokenizer("wordpiece", texts, vocab_size=4096)
  tokenizer.save("runs/vocab")
  load_tokenizer("runs/vocab").encode_batch(["a text", "another"])

A config's `data.tokenizer` is `dict(name=...)` with a row of TOKENIZERS.
"""

import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.data.tokenizers import training, words
from bertjax.data.tokenizers.base import (
  BERT_SPECIALS,
  ROBERTA_SPECIALS,
  Specials,
  Tokenizer,
)
from bertjax.data.tokenizers.extend import (
  append_pieces,
  pad_vocabulary,
  reuse_unused,
)
from bertjax.data.tokenizers.folder import MANIFEST, as_json, sha256
from bertjax.data.tokenizers.storage import load_tokenizer
from bertjax.data.tokenizers.training import TRAINERS, train_tokenizer

__all__ = [
  "BERT_SPECIALS",
  "ROBERTA_SPECIALS",
  "TOKENIZERS",
  "TRAINERS",
  "Specials",
  "Tokenizer",
  "append_pieces",
  "build_tokenizer",
  "load_tokenizer",
  "pad_vocabulary",
  "reuse_unused",
  "train_tokenizer",
]

Texts = Callable[[], Iterable[str]]


def _trained(
  kind: str,
  source: Mapping[str, Any] | None = None,
  split: str = "train",
  *,
  texts: Texts,
  cache_dir: str | os.PathLike,
  source_fingerprint: str,
  **options: Any,
) -> Tokenizer:
  """The vocabulary of these options and this source, trained once.

  Args:
    kind: key of `TRAINERS`.
    source: a name of `SOURCES` and its options, if the vocabulary is not of the
      data themselves: another mixture, say, in which a domain weighs more (Wada
      et al. 2020, arXiv:2005.07202).
    split: of that source.
    texts: as in `build_tokenizer`; likewise what follows.
    cache_dir: where trained vocabularies live.
    source_fingerprint: changes when the texts do.
    **options: of the trainer.
  """
  if source is not None:
    from bertjax.data.sources import SOURCES  # sources may tokenise

    own = registry.build(SOURCES, source, "data.tokenizer.source")
    source_fingerprint = base.sha256(base.as_json([own.fingerprint(), split]))

    def texts() -> Iterable[str]:
      return (example["text"] for example in own.examples(split))

  resolved = training.resolve(kind, options, "data.tokenizer")
  spec = resolved | {"specials": vars(resolved["specials"])}
  content = {"kind": kind, "options": spec, "source": source_fingerprint}
  name = f"vocab-{sha256(as_json(content))[:16]}"
  folder = pathlib.Path(cache_dir) / name
  if folder.exists():
    try:
      return load_tokenizer(folder)
    except ValueError as err:
      logging.warning("Training the vocabulary again: %s", err)
      # The same text and options give the same vocabulary. What a killed or
      # meddling process left moves aside for inspection.
      os.replace(folder, _free_name(folder))
  tokenizer = training.train_resolved(kind, texts(), resolved)
  try:
    tokenizer.save(folder)
  except OSError:
    # Another process of the same run may have been faster: same content.
    if not (folder / MANIFEST).exists():
      raise
  return load_tokenizer(folder)


def _free_name(folder: pathlib.Path) -> pathlib.Path:
  names = (folder.with_name(f"{folder.name}.damaged-{i}") for i in range(10**6))
  return next(name for name in names if not name.exists())


def _folder(
  path: str | os.PathLike,
  *,
  texts: Texts,
  cache_dir: str | os.PathLike,
  source_fingerprint: str,
) -> Tokenizer:
  """A saved or published tokenizer."""
  del texts, cache_dir, source_fingerprint
  return load_tokenizer(path)


def _vocab_file(
  path: str | os.PathLike,
  lowercase: bool = True,
  strip_accents: bool | None = None,
  max_word_chars: int = 200,
  *,
  texts: Texts,
  cache_dir: str | os.PathLike,
  source_fingerprint: str,
) -> Tokenizer:
  """WordPiece by the reference rules over a vocab.txt."""
  del texts, cache_dir, source_fingerprint
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(
      f"data.tokenizer.path={str(path)!r} is not a file; name a vocab.txt."
    )
  return words.WordTokenizer(
    words.read_vocab_txt(path.read_bytes()),
    lowercase=lowercase,
    strip_accents=strip_accents,
    max_word_chars=max_word_chars,
  )


def _extended(
  of: Mapping[str, Any],
  append: Sequence[str] = (),
  reuse: Sequence[str] = (),
  pad_to_multiple: int = 1,
  *,
  texts: Texts,
  cache_dir: str | os.PathLike,
  source_fingerprint: str,
) -> Tokenizer:
  """Another row's tokenizer with further pieces.

  Args:
    of: a name of `TOKENIZERS` and its options; that of `init_from` by default.
    append: pieces that get rows after the last one; a model that is there
      already needs as many further embeddings (`init_from.new_rows`).
    reuse: pieces that take the place of [unusedN] rows; with
      `init_from.new_rows` these begin afresh too.
    pad_to_multiple: add [unusedN] rows up to a multiple of this, which tensor
      cores and matrix units like (8, 64, 128).
    texts: as in `build_tokenizer`; likewise what follows.
    cache_dir: where trained vocabularies live.
    source_fingerprint: changes when the texts do.
  """
  tokenizer = registry.build(
    TOKENIZERS,
    of,
    "data.tokenizer.of",
    texts=texts,
    cache_dir=cache_dir,
    source_fingerprint=source_fingerprint,
  )
  tokenizer = append_pieces(reuse_unused(tokenizer, reuse), append)
  return pad_vocabulary(tokenizer, pad_to_multiple)


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
  "extended": _extended,
  "train": _trained,
  "folder": _folder,
  "vocab_file": _vocab_file,
}


def build_tokenizer(
  spec: Mapping[str, Any],
  texts: Texts,
  cache_dir: str | os.PathLike,
  source_fingerprint: str,
) -> Tokenizer:
  """The tokenizer that a config's `data.tokenizer` describes.

  `dict(name="train", kind=..., ...)` takes the options of `train_tokenizer`. It
  keeps its result in `<cache_dir>/vocab-<hash>` of options and source, so that
  a second run reads it and never gets another one; a damaged folder is moved
  aside and made again, with a warning.

  Args:
    spec: `name` and that row's arguments.
    texts: makes the stream of documents; called only when training.
    cache_dir: where trained vocabularies live.
    source_fingerprint: changes when the texts do.

  Raises:
    ValueError: unknown name or option, unreadable folder, no text.
  """
  return registry.build(
    TOKENIZERS,
    spec,
    "data.tokenizer",
    texts=texts,
    cache_dir=cache_dir,
    source_fingerprint=source_fingerprint,
  )
