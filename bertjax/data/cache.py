"""Tokenise once, train many: documents as ids in ArrayRecord files.

A cache is a folder whose name is a hash of all that went into it:

  <cache_dir>/tokens-<hash>/
    00000.array_record ...  one record per document
    index.npz               lengths of documents and sentences
    manifest.json           counts, and size and CRC-32 of every file; last

Document number i of the source is a candidate of shard i // SHARD_DOCUMENTS, so
a shard is a pure function of a range of the source, but for exact duplicates,
which only the first shard that meets them keeps.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from bertjax import registry
from bertjax.data.sentences import SPLITTERS
from bertjax.data.sources.base import Source, nonempty
from bertjax.data.tokenizers import Tokenizer

FORMAT = 1
SHARD_DOCUMENTS = 65_536
_BATCH = 256  # documents per call of the tokenizer
_HEADER = struct.Struct("<BxxxII")  # bytes per token, tokens, sentences
_MANIFEST, _INDEX = "manifest.json", "index.npz"


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
  """One document.

  Attributes:
    tokens: ids without special tokens, int32 [n].
    sentence_ends: where each sentence ends, int32 [k]; the last is n.
  """

  tokens: Int[np.ndarray, "n"]
  sentence_ends: Int[np.ndarray, "k"]


class DamagedCacheError(ValueError):
  """A cache file is missing, truncated or altered."""


def tokenize_documents(
  texts: Sequence[str],
  tokenizer: Tokenizer,
  split: Callable[[str], list[str]],
  max_tokens: int | None = None,
) -> list[TokenizedDocument]:
  """Texts to ids, sentence by sentence; sentences without ids vanish.

  Args:
    texts: documents.
    tokenizer: used without special tokens.
    split: text -> sentences.
    max_tokens: longer documents are cut.
  """
  sentences = [split(text) for text in texts]
  encoded = iter(tokenizer.encode_batch(list(itertools.chain(*sentences))))
  documents = []
  for parts in sentences:
    ids = [i for i in itertools.islice(encoded, len(parts)) if len(i)]
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    ends = np.cumsum([len(i) for i in ids], dtype=np.int32)
    if max_tokens is not None and len(tokens) > max_tokens:
      tokens = tokens[:max_tokens]
      ends = np.append(ends[ends < max_tokens], np.int32(max_tokens))
    documents.append(
      TokenizedDocument(tokens.astype(np.int32), ends.astype(np.int32))
    )
  return documents


def pack_record(document: TokenizedDocument, wide: bool) -> bytes:
  """A document as bytes: header, ids, sentence ends; little-endian.

  Args:
    document: what to pack.
    wide: 4 bytes per id instead of 2.
  """
  width = 4 if wide else 2
  return b"".join(
    (
      _HEADER.pack(width, len(document.tokens), len(document.sentence_ends)),
      document.tokens.astype(f"<u{width}").tobytes(),
      document.sentence_ends.astype("<u4").tobytes(),
    )
  )


def unpack_record(record: bytes) -> TokenizedDocument:
  """The inverse of `pack_record`."""
  width, count, sentences = _HEADER.unpack_from(record)
  tokens = np.frombuffer(record, f"<u{width}", count, _HEADER.size)
  ends = np.frombuffer(record, "<u4", sentences, _HEADER.size + count * width)
  return TokenizedDocument(tokens.astype(np.int32), ends.astype(np.int32))


class TokenCache:
  """Tokenised documents by number; picklable, opened where it is used.

  Attributes:
    folder: where the files are.
    manifest: counts and what the cache was made from.
    document_lengths: tokens per document, int64 [documents].
    sentence_lengths: tokens per sentence of all documents in order, int64.
    sentence_offsets: document i has sentences offsets[i]:offsets[i + 1].
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens a cache after checking it.

    Raises:
      DamagedCacheError: names the file that is not as it was written.
    """
    self.folder = pathlib.Path(folder)
    self.manifest = _verified_manifest(self.folder)
    with np.load(self.folder / _INDEX) as index:
      self.sentence_lengths = index["sentence_lengths"].astype(np.int64)
      counts = index["sentence_counts"].astype(np.int64)
      self.document_lengths = index["document_lengths"].astype(np.int64)
    self.sentence_offsets = np.concatenate([[0], np.cumsum(counts)])
    self._first = np.cumsum([0, *self.manifest["shard_documents"]])
    self._readers: dict[int, Any] = {}

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_readers": {}}

  @property
  def num_documents(self) -> int:
    return len(self.document_lengths)

  @property
  def num_tokens(self) -> int:
    return int(self.document_lengths.sum())

  @property
  def duplicates(self) -> int:
    """Exact duplicates that were dropped."""
    return int(self.manifest["duplicates"])

  def document(self, index: int) -> TokenizedDocument:
    """Document `index`."""
    return self.documents([index])[0]

  def documents(self, indices: Iterable[int]) -> list[TokenizedDocument]:
    """Documents in the order asked; one read per shard."""
    indices = np.asarray(list(indices), np.int64)
    shards = np.searchsorted(self._first, indices, side="right") - 1
    found: list[Any] = [None] * len(indices)
    for shard in np.unique(shards):
      where = np.flatnonzero(shards == shard)
      inside = (indices[where] - self._first[shard]).tolist()
      for place, record in zip(where, self._reader(int(shard)).read(inside)):
        found[place] = unpack_record(record)
    return found

  def _reader(self, shard: int) -> Any:
    if shard not in self._readers:
      from array_record.python import array_record_module

      # Random access: no read-ahead of neighbours.
      self._readers[shard] = array_record_module.ArrayRecordReader(
        str(self.folder / _shard_name(shard)), options="readahead_buffer_size:0"
      )
    return self._readers[shard]


def _shard_name(shard: int) -> str:
  return f"{shard:05d}.array_record"


def _checksum(path: pathlib.Path) -> int:
  crc = 0
  with path.open("rb") as file:
    while block := file.read(1 << 20):
      crc = zlib.crc32(block, crc)
  return crc


def _verified_manifest(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / _MANIFEST
  try:
    manifest = json.loads(path.read_bytes())
    files = manifest["files"]
    written = manifest["crc32"]
  except (OSError, ValueError, KeyError) as err:
    raise DamagedCacheError(f"{path} is missing or unreadable.") from err
  if _manifest_crc(manifest) != written:
    raise DamagedCacheError(f"{path} was altered.")
  for name, (size, crc) in files.items():
    file = folder / name
    if not file.is_file() or file.stat().st_size != size:
      raise DamagedCacheError(f"{file} is missing or has another size.")
    if _checksum(file) != crc:
      raise DamagedCacheError(f"{file} has another checksum than written.")
  return manifest


def _manifest_crc(manifest: dict[str, Any]) -> int:
  rest = {k: v for k, v in manifest.items() if k != "crc32"}
  return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  items = iter(items)
  while batch := list(itertools.islice(items, size)):
    yield batch


class _Builder:
  """Writes one cache into a folder, a shard at a time."""

  def __init__(self, folder: pathlib.Path, wide: bool):
    self._folder, self._wide = folder, wide
    self._seen: set[bytes] = set()
    self._lengths: list[int] = []
    self._counts: list[int] = []
    self._sentences: list[np.ndarray] = []
    self.shard_documents: list[int] = []
    self.duplicates = self.empty = 0

  def add_shard(self, documents: Iterable[TokenizedDocument]) -> None:
    """Writes the documents that are neither empty nor known already."""
    from array_record.python import array_record_module

    name = _shard_name(len(self.shard_documents))
    writer = array_record_module.ArrayRecordWriter(
      str(self._folder / name), "group_size:1,uncompressed"
    )
    before = len(self._lengths)
    for document in documents:
      digest = hashlib.blake2b(document.tokens.tobytes(), digest_size=12)
      if not len(document.tokens):
        self.empty += 1
      elif digest.digest() in self._seen:
        self.duplicates += 1
      else:
        self._seen.add(digest.digest())
        writer.write(pack_record(document, self._wide))
        self._lengths.append(len(document.tokens))
        self._counts.append(len(document.sentence_ends))
        self._sentences.append(np.diff(document.sentence_ends, prepend=0))
    writer.close()
    self.shard_documents.append(len(self._lengths) - before)

  def finish(self, facts: dict[str, Any]) -> None:
    """Writes the index, and the manifest last."""
    np.savez(
      self._folder / _INDEX,
      document_lengths=np.asarray(self._lengths, np.int64),
      sentence_counts=np.asarray(self._counts, np.int32),
      sentence_lengths=np.concatenate(self._sentences).astype(np.int32),
    )
    files = sorted(p for p in self._folder.iterdir())
    manifest = facts | {
      "documents": len(self._lengths),
      "tokens": int(sum(self._lengths)),
      "sentences": int(sum(self._counts)),
      "duplicates": self.duplicates,
      "empty": self.empty,
      "shard_documents": self.shard_documents,
      "files": {p.name: [p.stat().st_size, _checksum(p)] for p in files},
    }
    manifest["crc32"] = _manifest_crc(manifest)
    (self._folder / _MANIFEST).write_text(json.dumps(manifest, sort_keys=True))


def build_cache(
  source: Source,
  split: str,
  tokenizer: Tokenizer,
  splitter: str,
  cache_dir: str | os.PathLike,
  *,
  max_tokens_per_document: int | None = None,
) -> TokenCache:
  """Opens the cache of these parts, tokenising the split if there is none.

  A damaged cache is built again, with a warning that names the bad file.
  Memory is bounded by the index and the digests of the documents (about 40
  bytes per document and 8 per sentence), not by their text.

  Args:
    source: where documents come from.
    split: of the source.
    tokenizer: makes the ids.
    splitter: key of `SPLITTERS`.
    cache_dir: where caches live.
    max_tokens_per_document: longer documents are cut.

  Raises:
    ValueError: unknown split or splitter, or a split without text.
  """
  split_text = registry.lookup(SPLITTERS, splitter, "data.splitter")
  facts = {
    "format": FORMAT,
    "source": source.fingerprint(),
    "split": split,
    "tokenizer": tokenizer.fingerprint(),
    "splitter": splitter,
    "max_tokens_per_document": max_tokens_per_document,
  }
  name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
  folder = pathlib.Path(cache_dir) / f"tokens-{name[:16]}"
  if folder.exists():
    try:
      return TokenCache(folder)
    except DamagedCacheError as err:
      logging.warning("Rebuilding a damaged token cache: %s", err)
  folder.parent.mkdir(parents=True, exist_ok=True)
  # Built aside and renamed: nobody sees half a cache, and two processes that
  # build at once both end with one whole cache.
  partial = pathlib.Path(
    tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent)
  )
  try:
    builder = _Builder(partial, wide=tokenizer.vocab_size > 2**16)
    examples = nonempty(source.examples(split), source.name, split)
    for block in _shards(examples):
      builder.add_shard(
        document
        for batch in _batches(block, _BATCH)
        for document in tokenize_documents(
          [e["text"] for e in batch],
          tokenizer,
          split_text,
          max_tokens_per_document,
        )
      )
    if not sum(builder.shard_documents):
      raise ValueError(
        f"data.source {source.name!r} has no text in split {split!r}: all of"
        f" its {builder.empty} documents are empty."
      )
    builder.finish(facts)
    _move(partial, folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return TokenCache(folder)


def _shards(examples: Iterable[Any]) -> Iterator[Iterator[Any]]:
  """Blocks of SHARD_DOCUMENTS, each consumed before the next is asked for."""
  examples = iter(examples)
  while (first := next(examples, None)) is not None:
    rest = itertools.islice(examples, SHARD_DOCUMENTS - 1)
    yield itertools.chain([first], rest)


def _move(partial: pathlib.Path, folder: pathlib.Path) -> None:
  """Renames `partial` to `folder`, replacing a damaged one there."""
  try:
    os.rename(partial, folder)
    return
  except OSError:
    if not folder.exists():
      raise
  try:
    TokenCache(folder)  # another process was faster
  except DamagedCacheError:
    aside = pathlib.Path(tempfile.mkdtemp(dir=folder.parent)) / "old"
    os.rename(folder, aside)
    os.rename(partial, folder)
    shutil.rmtree(aside.parent)
