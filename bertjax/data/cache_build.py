"""Builds token caches, shard by shard; a killed build goes on where it was.

Shard s holds what is left of the source's documents s*n .. (s+1)*n-1 once
empty documents and exact duplicates of earlier ones are dropped. Given the
digests of earlier documents a shard is a pure function of that range.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from bertjax import registry
from bertjax.data import cache as cache_lib
from bertjax.data import sentences as sentences_lib
from bertjax.data.cache import TokenCache, TokenizedDocument
from bertjax.data.sources import base

_WRITER = "group_size:1,uncompressed"  # one record a chunk: random access
_BATCH = 256  # documents that are tokenised together
_BATCH_CHARS = 4_000_000  # and no more text than this, so books fit too


class _Labelled(NamedTuple):
  """A document with what its example says of it."""

  document: TokenizedDocument
  copy: int
  component: int


def build_cache(
  source: base.Source,
  split: str,
  tokenizer: Any,
  splitter: str,
  cache_dir: str | os.PathLike,
  *,
  max_tokens_per_document: int | None = None,
  documents_per_shard: int = 65_536,
  verify: str = "checksums",
) -> TokenCache:
  """The token cache of a split: opened when it exists, built when it does not.

  Several processes may ask at once: one builds, the others wait for it. A
  build that was interrupted goes on after its last finished shard. A corrupt
  cache is rebuilt with a warning.

  Memory: one batch of documents, the lengths of one shard's sentences, and
  about 100 bytes a document for finding duplicates.

  Args:
    source: where documents come from.
    split: one of `source.splits`.
    tokenizer: a `bertjax.data.tokenizers.Tokenizer`.
    splitter: key of `SPLITTERS`.
    cache_dir: folder of all caches.
    max_tokens_per_document: longer documents are cut off and counted.
    documents_per_shard: documents of the source that one shard covers.
    verify: how to check an existing cache, see `TokenCache`.

  Raises:
    ValueError: unknown split or splitter, limits below 1, or no document.
  """
  base.check_split(source, split)
  registry.lookup(sentences_lib.SPLITTERS, splitter, "data.splitter")
  for field, value in (
    ("max_tokens_per_document", max_tokens_per_document),
    ("documents_per_shard", documents_per_shard),
  ):
    if value is not None and value < 1:
      raise ValueError(f"{field}={value} must be at least 1.")
  recipe = {
    "format": cache_lib.FORMAT,
    "source": source.name,
    "source_fingerprint": source.fingerprint(),
    "split": split,
    "tokenizer": tokenizer.fingerprint(),
    "splitter": splitter,
    "splitter_version": sentences_lib.VERSION,
    "max_tokens_per_document": max_tokens_per_document,
    "documents_per_shard": documents_per_shard,
  }
  folder = pathlib.Path(cache_dir)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"tokens-{base.fingerprint_of(recipe)}"
  with contextlib.suppress(cache_lib.CorruptCacheError):
    return TokenCache(path, verify)
  with _lock(path.with_suffix(".lock")) as locked:
    if (cache := _open(path, verify)) is not None:
      return cache  # another process has built it while this one waited
    # Only the holder of the lock may go on with what a dead process left.
    partial = path.with_suffix(
      ".partial" if locked else f".partial-{socket.gethostname()}-{os.getpid()}"
    )
    _build(source, split, tokenizer, splitter, recipe, partial)
    try:
      if path.exists():
        shutil.rmtree(path)  # corrupt: `_open` has said so
      partial.rename(path)
    except OSError:  # without a lock another process may have been first
      if _open(path, verify) is None:
        raise
      shutil.rmtree(partial)
  return TokenCache(path, verify)


def _open(path: pathlib.Path, verify: str) -> TokenCache | None:
  """The cache at `path`; None when there is none or it must be rebuilt."""
  if not path.exists():
    return None
  try:
    return TokenCache(path, verify)
  except cache_lib.CorruptCacheError as err:
    logging.warning("corrupt cache: %s Rebuilding it.", err)
    return None


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[bool]:
  """Holds an exclusive lock; yields False where the file system has none."""
  import fcntl

  with open(path, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as err:
      logging.warning("no file locks on %s (%s).", path.parent, err)
      yield False
      return
    yield True  # closing the file releases the lock, and so does a kill


def _build(source, split, tokenizer, splitter, recipe, partial) -> None:
  """Writes all files of a cache into `partial`."""
  partial.mkdir(exist_ok=True)
  shards = _shards(source, split, tokenizer, splitter, recipe, partial)
  counts = {
    name: int(sum(int(shard[name]) for shard in shards))
    for name in ("empty", "duplicates", "truncated")
  }
  if not any(len(shard["document_lengths"]) for shard in shards):
    shutil.rmtree(partial)
    raise ValueError(
      f"source {source.name!r} has no text in split {split!r}:"
      f" {counts['empty']} documents, all of them empty. Check its paths,"
      " filters and fields."
    )
  sizes = _write_index(partial, shards)
  _write_manifest(partial, {**recipe, **sizes, **counts}, len(shards))
  for shard in range(len(shards)):
    (partial / _state_name(shard)).unlink()


def _shards(source, split, tokenizer, splitter, recipe, partial) -> list:
  """Facts of all shards; those that a killed build finished are kept."""
  split_text = sentences_lib.SPLITTERS[splitter]
  size, limit = recipe["documents_per_shard"], recipe["max_tokens_per_document"]
  seen: set[bytes] = set()
  shards = []
  while (done := _finished_shard(partial, len(shards))) is not None:
    seen.update(row.tobytes() for row in done["digests"])
    shards.append(done)
  if shards:
    logging.info("%s: going on after %d shards.", partial, len(shards))
  examples = iter(source.examples(split))
  examples = itertools.islice(examples, len(shards) * size, None)
  while block := list(itertools.islice(examples, 1)):
    rest = itertools.islice(examples, size - 1)
    documents = _tokenized(itertools.chain(block, rest), tokenizer, split_text)
    shards.append(_write_shard(partial, len(shards), documents, seen, limit))
  return shards


def _write_index(
  folder: pathlib.Path, shards: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, int]:
  """Writes the lengths of all documents and sentences; their totals."""

  def joined(name: str) -> np.ndarray:
    return np.concatenate([shard[name] for shard in shards])

  lengths = joined("document_lengths")
  sentence_lengths = joined("sentence_lengths")
  per_shard = [len(shard["document_lengths"]) for shard in shards]
  with open(folder / "index.npz", "wb") as f:
    np.savez(
      f,
      document_lengths=lengths,
      document_sources=joined("document_sources"),
      sentence_lengths=sentence_lengths,
      sentence_offsets=np.append(0, np.cumsum(joined("sentence_counts"))),
      shard_offsets=np.append(0, np.cumsum(per_shard)),
    )
    _sync(f)
  return {
    "documents": len(lengths),
    "tokens": int(lengths.sum()),
    "sentences": len(sentence_lengths),
  }


def _write_manifest(
  folder: pathlib.Path, facts: Mapping[str, Any], num_shards: int
) -> None:
  """Writes what the cache is, and the sums of its files."""
  names = ["index.npz", *map(cache_lib.shard_name, range(num_shards))]
  manifest = {
    **facts,
    "files": {
      name: {
        "bytes": (folder / name).stat().st_size,
        "sha256": cache_lib.sha256(folder / name),
      }
      for name in names
    },
  }
  manifest["checksum"] = base.fingerprint_of(manifest)
  with open(folder / "manifest.json", "w", encoding="utf-8") as f:
    json.dump(manifest, f, indent=2)
    _sync(f)


def _tokenized(
  examples: Iterator[base.Example], tokenizer, splitter
) -> Iterator[_Labelled]:
  """The document of each example, tokenised in batches."""
  batch: list[base.Example] = []
  chars = 0

  def flush():
    texts = [example["text"] for example in batch]
    documents = cache_lib.tokenize_documents(texts, tokenizer, splitter)
    for example, document in zip(batch, documents):
      copy, component = example.get("copy", 0), example.get("component", 0)
      yield _Labelled(document, copy, component)

  for example in examples:
    batch.append(example)
    chars += len(example["text"])
    if len(batch) == _BATCH or chars > _BATCH_CHARS:
      yield from flush()
      batch, chars = [], 0
  yield from flush()


def _write_shard(
  folder: pathlib.Path,
  shard: int,
  documents: Iterator[_Labelled],
  seen: set[bytes],
  max_tokens: int | None,
) -> dict[str, Any]:
  """Writes a shard, then its state, whose presence says that it is whole."""
  from array_record.python import array_record_module

  path = folder / cache_lib.shard_name(shard)
  lengths, sentence_counts, sentence_lengths = [], [], []
  digests, components = [], []
  counts = {"empty": 0, "duplicates": 0, "truncated": 0}
  writer = array_record_module.ArrayRecordWriter(str(path), _WRITER)
  for document, copy, component in documents:
    if not len(document.tokens):
      counts["empty"] += 1
      continue
    if max_tokens is not None and len(document.tokens) > max_tokens:
      counts["truncated"] += 1
      document = cache_lib.truncate(document, max_tokens)
    digest = cache_lib.document_digest(document, copy)
    if digest in seen:
      counts["duplicates"] += 1
      continue
    seen.add(digest)
    writer.write(cache_lib.pack_record(document))
    digests.append(np.frombuffer(digest, np.uint8))
    components.append(component)
    lengths.append(len(document.tokens))
    sentence_counts.append(len(document.sentence_ends))
    sentence_lengths.append(np.diff(document.sentence_ends, prepend=0))
  writer.close()
  state = {
    "document_lengths": np.array(lengths, np.int64),
    "document_sources": np.array(components, np.uint16),
    "sentence_counts": np.array(sentence_counts, np.int64),
    "sentence_lengths": np.concatenate(
      [np.zeros(0, np.int32), *sentence_lengths]
    ).astype(np.int32),
    "digests": np.array(digests, np.uint8).reshape(-1, 16),
    "sha256": np.array(cache_lib.sha256(path)),
    **{name: np.array(count) for name, count in counts.items()},
  }
  with open(folder / "state.tmp", "wb") as f:
    np.savez(f, **state)
    _sync(f)
  os.replace(folder / "state.tmp", folder / _state_name(shard))
  return state


def _finished_shard(folder: pathlib.Path, shard: int) -> dict[str, Any] | None:
  """State of a shard that an interrupted build has finished, or None."""
  try:
    with np.load(folder / _state_name(shard)) as arrays:
      state = {name: arrays[name] for name in arrays.files}
    state["document_sources"]  # an earlier version did not record them
    content = cache_lib.sha256(folder / cache_lib.shard_name(shard))
  except (OSError, ValueError, KeyError):
    return None
  return state if content == str(state["sha256"]) else None


def _state_name(shard: int) -> str:
  return f"shard-{shard:05d}.state.npz"


def _sync(file) -> None:
  file.flush()
  os.fsync(file.fileno())
