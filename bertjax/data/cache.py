"""Tokenise once, train many times: token documents on disk, read by index.

A cache is a folder `tokens-<hash>` whose name is made of everything that
decides its content: the source, the split, the tokenizer, the splitter, the
limits and the version of this format.

    shard-00000.arrayrecord ...   one record a document, see `pack_record`
    index.npz                     lengths of all documents and sentences, and
                                  which part of a mixture a document is of
    manifest.json                 counts, checksums; written last

Shard s holds what is left of the source's documents s*n .. (s+1)*n-1 once
empty documents and exact duplicates of earlier ones are dropped. Given the
digests of earlier documents a shard is a pure function of that range.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from bertjax import registry
from bertjax.data import sentences as sentences_lib
from bertjax.data.sources import base

FORMAT = 1
_WRITER = "group_size:1,uncompressed"  # one record a chunk: random access
_READER = "readahead_buffer_size:0,max_parallelism:0"
_BATCH = 256  # documents that are tokenised together
_BATCH_CHARS = 4_000_000  # and no more text than this, so books fit too


class _Labelled(NamedTuple):
  """A document with what its example says of it."""

  document: "TokenizedDocument"
  copy: int
  component: int


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
  digest = hashlib.blake2b(document.tokens.astype("<i4"), digest_size=16)
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
      path: a folder that `build_cache` made.
      verify: "checksums" reads every file once (1-2 GB/s); "sizes" reads only
        the manifest and the index, for caches too large to read at each start;
        None trusts what an earlier open in another process has checked.

    Raises:
      CorruptCacheError: names the bad file.
    """
    if verify not in ("checksums", "sizes", None):
      raise ValueError(
        f"verify={verify!r} is unknown; choose 'checksums' or 'sizes'."
      )
    self.path = pathlib.Path(path)
    self.manifest = _read_manifest(self.path)
    if verify:
      _verify(self.path, self.manifest["files"], verify == "checksums")
    self._readers: dict[tuple[int, int], Any] = {}

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
  def document_sources(self) -> Int[np.ndarray, "documents"] | None:
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
    from array_record.python import array_record_module

    path = self.path / _shard_name(shard)
    # A reader must not be shared with a forked child: the file offset is one.
    key = (os.getpid(), shard)
    try:
      if key not in self._readers:
        self._readers[key] = array_record_module.ArrayRecordReader(
          str(path), _READER
        )
      return self._readers[key].read(records)
    except (RuntimeError, ValueError, IndexError, OSError) as err:
      raise CorruptCacheError(
        f"cannot read {path}: {err}. Start again to have the cache rebuilt."
      ) from err


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
    "format": FORMAT,
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
  with contextlib.suppress(CorruptCacheError):
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
  except CorruptCacheError as err:
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
  split_text = sentences_lib.SPLITTERS[splitter]
  size, limit = recipe["documents_per_shard"], recipe["max_tokens_per_document"]
  partial.mkdir(exist_ok=True)
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
  counts = {
    name: int(sum(int(shard[name]) for shard in shards))
    for name in ("empty", "duplicates", "truncated")
  }
  per_shard = [len(shard["document_lengths"]) for shard in shards]
  if not sum(per_shard):
    shutil.rmtree(partial)
    raise ValueError(
      f"source {source.name!r} has no text in split {split!r}:"
      f" {counts['empty']} documents, all of them empty. Check its paths,"
      " filters and fields."
    )

  def joined(name: str) -> np.ndarray:
    return np.concatenate([shard[name] for shard in shards])

  lengths, sentence_lengths = (
    joined("document_lengths"),
    joined("sentence_lengths"),
  )
  with open(partial / "index.npz", "wb") as f:
    np.savez(
      f,
      document_lengths=lengths,
      document_sources=joined("document_sources"),
      sentence_lengths=sentence_lengths,
      sentence_offsets=np.append(0, np.cumsum(joined("sentence_counts"))),
      shard_offsets=np.append(0, np.cumsum(per_shard)),
    )
    _sync(f)
  manifest = {
    **recipe,
    "documents": len(lengths),
    "tokens": int(lengths.sum()),
    "sentences": len(sentence_lengths),
    **counts,
    "files": {
      name: {
        "bytes": (partial / name).stat().st_size,
        "sha256": _sha256(partial / name),
      }
      for name in ["index.npz", *map(_shard_name, range(len(shards)))]
    },
  }
  manifest["checksum"] = base.fingerprint_of(manifest)
  with open(partial / "manifest.json", "w", encoding="utf-8") as f:
    json.dump(manifest, f, indent=2)
    _sync(f)
  for shard in range(len(shards)):
    (partial / _state_name(shard)).unlink()


def _tokenized(
  examples: Iterator[base.Example], tokenizer, splitter
) -> Iterator[_Labelled]:
  """The document of each example, tokenised in batches."""
  batch: list[base.Example] = []
  chars = 0

  def flush():
    texts = [example["text"] for example in batch]
    documents = tokenize_documents(texts, tokenizer, splitter)
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

  path = folder / _shard_name(shard)
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
      document = truncate(document, max_tokens)
    digest = document_digest(document, copy)
    if digest in seen:
      counts["duplicates"] += 1
      continue
    seen.add(digest)
    writer.write(pack_record(document))
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
    "sha256": np.array(_sha256(path)),
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
    whole = _sha256(folder / _shard_name(shard)) == str(state["sha256"])
  except (OSError, ValueError, KeyError):
    return None
  return state if whole else None


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
    if (shards or name == "index.npz") and _sha256(file) != wanted["sha256"]:
      raise CorruptCacheError(f"{file} does not match its checksum.")


def _shard_name(shard: int) -> str:
  return f"shard-{shard:05d}.arrayrecord"


def _state_name(shard: int) -> str:
  return f"shard-{shard:05d}.state.npz"


def _sync(file) -> None:
  file.flush()
  os.fsync(file.fileno())


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
