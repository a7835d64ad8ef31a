"""Tokenise once, train many times: token documents on disk, read by index.

A cache is a folder `tokens-<hash>` whose name is made of everything that
decides its content: the source, the split, the tokenizer, the splitter, the
limits and the version of this format.

    shard-00000.arrayrecord ...   one record a document, see `pack_record`
    index.npz                     lengths of all documents and sentences, and
                                  which part of a mixture a document is of
    manifest.json                 counts, checksums; written last
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt

from bertjax import registry
from bertjax.data.sources import base

FORMAT = 1
DIGEST_BYTES = 16
CHECKS = ("checksums", "sizes")  # of `verify`
OPEN_SHARDS = 128  # at a time; systems allow 256 files and more
_READER = "readahead_buffer_size:0,max_parallelism:0"


class TokenizedDocument(NamedTuple):
  """Token ids of a document, and where each of its sentences ends."""

  tokens: Int[np.ndarray, "n"]
  sentence_ends: Int[np.ndarray, "k"]  # ascending; the last one equals n


class CorruptCacheError(ValueError):
  """A file of a cache is missing, cut, altered or of another format."""


def tokenize_documents(
  texts: Sequence[str],
  tokenizer: Any,
  splitter: Callable[[str], list[str]],
) -> list[TokenizedDocument]:
  """Tokens of each text, sentence by sentence.

  Args:
    texts: documents.
    tokenizer: a `bertjax.data.tokenizers.Tokenizer`.
    splitter: a value of `SPLITTERS`.

  Returns:
    One document a text; sentences without a token are left out, so a document
    may be empty.
  """
  split = [splitter(text) for text in texts]
  encoded = iter(tokenizer.encode_batch([s for part in split for s in part]))
  documents = []
  for part in split:
    pieces = [ids for ids in itertools.islice(encoded, len(part)) if len(ids)]
    tokens = np.concatenate([np.zeros(0, np.int32), *pieces]).astype(np.int32)
    ends = np.cumsum([len(ids) for ids in pieces], dtype=np.int64)
    documents.append(TokenizedDocument(tokens, ends.astype(np.int32)))
  return documents


def tokenize_document(
  text: str,
  tokenizer: Any,
  splitter: Callable[[str], list[str]],
) -> TokenizedDocument:
  """`tokenize_documents` for one text."""
  return tokenize_documents([text], tokenizer, splitter)[0]


def truncate(document: TokenizedDocument, max_tokens: int) -> TokenizedDocument:
  """The first `max_tokens` tokens, the last sentence cut where they end."""
  tokens, ends = document
  if len(tokens) <= max_tokens:
    return document
  ends = np.append(ends[ends < max_tokens], max_tokens)
  return TokenizedDocument(tokens[:max_tokens], ends.astype(np.int32))


def pack_record(document: TokenizedDocument) -> bytes:
  """Little-endian bytes: token width (2 or 4), k, k ends, n tokens (uint32).

  Tokens take two bytes each when all ids of the document fit.
  """
  tokens, ends = document
  width = 2 if len(tokens) == 0 or tokens.max() < 2**16 else 4
  return b"".join(
    (
      np.array([width, len(ends)], "<u4").tobytes(),
      ends.astype("<u4").tobytes(),
      tokens.astype(f"<u{width}").tobytes(),
    )
  )


def unpack_record(record: bytes) -> TokenizedDocument:
  """The inverse of `pack_record`."""
  width, count = np.frombuffer(record, "<u4", 2).tolist()
  ends = np.frombuffer(record, "<u4", count, offset=8)
  tokens = np.frombuffer(record, f"<u{width}", offset=8 + 4 * count)
  return TokenizedDocument(tokens.astype(np.int32), ends.astype(np.int32))


def document_digest(document: TokenizedDocument, copy: int = 0) -> bytes:
  """Equal for documents of equal tokens; deliberate copies count as new."""
  digest = hashlib.blake2b(
    document.tokens.astype("<i4"), digest_size=DIGEST_BYTES
  )
  digest.update(copy.to_bytes(4, "little"))
  return digest.digest()


class TokenCache:
  """A finished cache. Cheap to pickle: each process opens its own readers.

  Attributes:
    path: its folder.
    manifest: counts (`documents`, `tokens`, `sentences`, `duplicates`,
      `empty`, `truncated`), what it was made from, and checksums of its files.
  """

  def __init__(self, path: str | os.PathLike, verify: str | None = "checksums"):
    """Opens a cache and checks its files.

    Args:
      path: a folder that `cache_build.build_cache` made.
      verify: "checksums" reads every file once (1-2 GB/s); "sizes" reads only
        the manifest and the index, for caches too large to read at each start;
        None trusts what an earlier open in another process has checked.

    Raises:
      CorruptCacheError: names the bad file.
    """
    if verify is not None:
      registry.lookup(dict.fromkeys(CHECKS), verify, "verify")
    self.path = pathlib.Path(path)
    self.manifest = _read_manifest(self.path)
    if verify:
      _verify(self.path, self.manifest["files"], verify == "checksums")
    # One that is dropped closes once no thread reads from it any more.
    self._reader = functools.lru_cache(OPEN_SHARDS)(_reader)

  def __reduce__(self):
    return TokenCache, (self.path, None)

  def __repr__(self) -> str:
    return (
      f"TokenCache({str(self.path)!r}, documents={self.num_documents},"
      f" tokens={self.num_tokens})"
    )

  @functools.cached_property
  def _index(self) -> dict[str, np.ndarray]:
    with np.load(self.path / "index.npz") as arrays:
      return {name: arrays[name] for name in arrays.files}

  @property
  def num_documents(self) -> int:
    return self.manifest["documents"]

  @property
  def num_tokens(self) -> int:
    return self.manifest["tokens"]

  @property
  def duplicates(self) -> int:
    """Exact duplicate documents of the source that were dropped."""
    return self.manifest["duplicates"]

  @property
  def document_lengths(self) -> Int[np.ndarray, "documents"]:
    """Tokens of each document, int64."""
    return self._index["document_lengths"]

  @property
  def document_sources(self) -> UInt[np.ndarray, "documents"] | None:
    """Component of a mixture that each document is of, uint16.

    All 0 when the source is no mixture; None in a cache built before they were
    recorded.
    """
    return self._index.get("document_sources")

  @property
  def sentence_lengths(self) -> Int[np.ndarray, "sentences"]:
    """Tokens of each sentence, document after document, int32."""
    return self._index["sentence_lengths"]

  @property
  def sentence_offsets(self) -> Int[np.ndarray, "documents_plus_1"]:
    """Document i's are `sentence_lengths[offsets[i]:offsets[i + 1]]`; int64."""
    return self._index["sentence_offsets"]

  def document(self, index: int) -> TokenizedDocument:
    """Document `index`, counted over all shards."""
    return self.documents([index])[0]

  def documents(self, indices: Iterable[int]) -> list[TokenizedDocument]:
    """Documents in the order asked for, read shard by shard.

    Raises:
      IndexError: an index outside 0..num_documents-1.
      CorruptCacheError: a record that cannot be read.
    """
    wanted = np.asarray(
      indices if np.ndim(indices) else list(indices), np.int64
    )
    if wanted.size and not (
      wanted.min() >= 0 and wanted.max() < self.num_documents
    ):
      raise IndexError(
        f"document indices must lie in 0..{self.num_documents - 1}; got"
        f" {wanted.min()}..{wanted.max()}."
      )
    first = self._index["shard_offsets"]
    shards = np.searchsorted(first, wanted, side="right") - 1
    found: list[TokenizedDocument] = [None] * len(wanted)  # type: ignore
    for shard in np.unique(shards).tolist():
      places = np.flatnonzero(shards == shard)
      records = self._read(shard, (wanted[places] - first[shard]).tolist())
      for place, record in zip(places.tolist(), records):
        found[place] = unpack_record(record)
    return found

  def _read(self, shard: int, records: list[int]) -> list[bytes]:
    path = self.path / shard_name(shard)
    try:
      # Not shared with a forked child: the file offset is one.
      return self._reader(path, os.getpid()).read(records)
    except (RuntimeError, ValueError, IndexError, OSError) as err:
      raise CorruptCacheError(
        f"cannot read {path}: {err}. Start again to have the cache rebuilt."
      ) from err


def open_shard(path: pathlib.Path) -> Any:
  """An `ArrayRecordReader` that reads no more than it is asked for."""
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordReader(str(path), _READER)


def _reader(path: pathlib.Path, process: int) -> Any:
  del process
  return open_shard(path)


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  file = path / "manifest.json"
  try:
    manifest = json.loads(file.read_bytes())
    content = {k: v for k, v in manifest.items() if k != "checksum"}
    matches = manifest["checksum"] == base.fingerprint_of(content)
  except FileNotFoundError as err:
    raise CorruptCacheError(f"{file} is missing.") from err
  except (ValueError, KeyError, AttributeError) as err:
    raise CorruptCacheError(f"{file} is damaged ({err}).") from err
  if not matches:
    raise CorruptCacheError(f"{file} does not match its own checksum.")
  if manifest["format"] != FORMAT:
    raise CorruptCacheError(
      f"{file} has format {manifest['format']}, this is format {FORMAT}."
    )
  return manifest


def _verify(path: pathlib.Path, files: dict[str, Any], shards: bool) -> None:
  """Checks all sizes, the index's checksum and on demand the shards'."""
  for name, wanted in files.items():
    file = path / name
    try:
      size = file.stat().st_size
    except OSError as err:
      raise CorruptCacheError(f"{file} is missing.") from err
    if size != wanted["bytes"]:
      raise CorruptCacheError(
        f"{file} has {size} bytes instead of {wanted['bytes']}."
      )
    if (shards or name == "index.npz") and sha256(file) != wanted["sha256"]:
      raise CorruptCacheError(f"{file} does not match its checksum.")


def shard_name(shard: int) -> str:
  """File of a shard."""
  return f"shard-{shard:05d}.arrayrecord"


def sha256(path: pathlib.Path) -> str:
  """Hex digest of a file."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
