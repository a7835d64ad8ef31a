"""The shards of a token cache: what goes into one, and how it is written.

Shard s holds what is left of the source's documents s*n .. (s+1)*n-1 once
empty documents and exact duplicates of earlier ones are dropped. Given the
digests of earlier documents a shard is a pure function of that range, so it
does not matter which process makes it, or when.
"""

import collections
import dataclasses
import itertools
import os
import pathlib
import uuid
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from bertjax.data import cache as cache_lib
from bertjax.data import sentences as sentences_lib
from bertjax.data.cache import TokenizedDocument
from bertjax.data.sources import base

COUNTS = ("empty", "duplicates", "truncated")
STATES = "shard-*.state.npz"
UNFINISHED = ".tmp"  # ends the name of a file that is being written
_WRITER = "group_size:1,uncompressed"  # one record a chunk: random access
_BATCH = 256  # documents that are tokenised together
_BATCH_CHARS = 4_000_000  # and no more text than this, so books fit too


class Labelled(NamedTuple):
  """A document with what its example says of it."""

  document: TokenizedDocument
  copy: int
  component: int


class Kept(NamedTuple):
  """A document that goes into a shard."""

  document: TokenizedDocument
  digest: bytes  # see `document_digest`
  component: int


@dataclasses.dataclass(frozen=True)
class Job:
  """All that decides the shards of a cache.

  Attributes:
    source: where documents come from.
    split: one of `source.splits`.
    tokenizer: a `bertjax.data.tokenizers.Tokenizer`.
    splitter: key of `SPLITTERS`.
    max_tokens_per_document: longer documents are cut; None: never.
    documents_per_shard: documents of the source that one shard covers.
  """

  source: base.Source
  split: str
  tokenizer: Any
  splitter: str
  max_tokens_per_document: int | None
  documents_per_shard: int

  def recipe(self) -> dict[str, Any]:
    """What names the cache, and stands in its manifest."""
    return {
      "format": cache_lib.FORMAT,
      "source": self.source.name,
      "source_fingerprint": self.source.fingerprint(),
      "split": self.split,
      "tokenizer": self.tokenizer.fingerprint(),
      "splitter": self.splitter,
      "splitter_version": sentences_lib.VERSION,
      "max_tokens_per_document": self.max_tokens_per_document,
      "documents_per_shard": self.documents_per_shard,
    }

  def blocks(self) -> Iterator[tuple[int, Iterator[base.Example]]]:
    """(shard, its examples), shard after shard."""
    return blocks(self.source.examples(self.split), self.documents_per_shard)

  def tokenized(self, examples: Iterable[base.Example]) -> Iterator[Labelled]:
    """The document of each example, tokenised in batches."""
    splitter = sentences_lib.SPLITTERS[self.splitter]
    for batch in _batches(examples):
      texts = [example["text"] for example in batch]
      documents = cache_lib.tokenize_documents(texts, self.tokenizer, splitter)
      for example, document in zip(batch, documents):
        copy, component = example.get("copy", 0), example.get("component", 0)
        yield Labelled(document, copy, component)

  def write(
    self,
    folder: pathlib.Path,
    shard: int,
    examples: Iterable[base.Example],
    seen: Container[bytes],
  ) -> dict[str, Any]:
    """Writes the shard of these examples; see `select` and `write_shard`."""
    counts = collections.Counter()
    documents = self.tokenized(examples)
    kept = select(documents, seen, self.max_tokens_per_document, counts)
    return write_shard(folder, shard, kept, counts)


def blocks(
  examples: Iterable[base.Example], size: int
) -> Iterator[tuple[int, Iterator[base.Example]]]:
  """(number, its examples) for each `size` of them; the last may be shorter.

  A block must be read before the next one is asked for, which passes over what
  is left of it.
  """
  examples = iter(examples)
  for number in itertools.count():
    first = list(itertools.islice(examples, 1))
    if not first:
      return
    rest = itertools.islice(examples, size - 1)
    yield number, itertools.chain(first, rest)
    collections.deque(rest, maxlen=0)


def _batches(examples: Iterable[base.Example]) -> Iterator[list[base.Example]]:
  batch: list[base.Example] = []
  chars = 0
  for example in examples:
    batch.append(example)
    chars += len(example["text"])
    if len(batch) == _BATCH or chars > _BATCH_CHARS:
      yield batch
      batch, chars = [], 0
  yield batch


def select(
  documents: Iterable[Labelled],
  seen: Container[bytes],
  max_tokens: int | None,
  counts: collections.Counter[str],
) -> Iterator[Kept]:
  """The documents that stay, cut to `max_tokens`.

  Args:
    documents: of one shard, in order.
    seen: digests of documents of earlier shards, which are dropped.
    max_tokens: tokens of a document at most; None: any number.
    counts: grows by what was dropped (`empty`, `duplicates`) or `truncated`.
  """
  here = set()
  for document, copy, component in documents:
    if not len(document.tokens):
      counts["empty"] += 1
      continue
    if max_tokens is not None and len(document.tokens) > max_tokens:
      counts["truncated"] += 1
      document = cache_lib.truncate(document, max_tokens)
    digest = cache_lib.document_digest(document, copy)
    if digest in seen or digest in here:
      counts["duplicates"] += 1
      continue
    here.add(digest)
    yield Kept(document, digest, component)


def write_shard(
  folder: pathlib.Path,
  shard: int,
  documents: Iterable[Kept],
  counts: collections.Counter[str],
) -> dict[str, Any]:
  """Writes a shard, then its state, whose presence says that it is whole.

  Both appear under their names only once they are complete, so that several
  processes may write the same shard.

  Args:
    folder: of the unfinished cache.
    shard: its number.
    documents: what it holds.
    counts: `COUNTS`, read when the documents have been.

  Returns:
    The state: lengths, components and digests of the documents, the lengths
    of their sentences, the counts, and the checksum of the file.
  """
  from array_record.python import array_record_module

  path = folder / cache_lib.shard_name(shard)
  lengths, sentence_counts, sentence_lengths = [], [], []
  digests, components = [], []
  unfinished = _unfinished(path)
  writer = array_record_module.ArrayRecordWriter(str(unfinished), _WRITER)
  for document, digest, component in documents:
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
    "digests": np.array(digests, np.uint8).reshape(-1, cache_lib.DIGEST_BYTES),
    "sha256": np.array(cache_lib.sha256(unfinished)),
    **{name: np.array(counts[name]) for name in COUNTS},
  }
  os.replace(unfinished, path)
  path = folder / state_name(shard)
  unfinished = _unfinished(path)
  with open(unfinished, "wb") as f:
    np.savez(f, **state)
    sync(f)
  os.replace(unfinished, path)
  return state


def finished_shard(folder: pathlib.Path, shard: int) -> dict[str, Any] | None:
  """State of a shard that has been written whole, or None."""
  try:
    with np.load(folder / state_name(shard)) as arrays:
      state = {name: arrays[name] for name in arrays.files}
    state["document_sources"]  # an earlier version did not record them
    content = cache_lib.sha256(folder / cache_lib.shard_name(shard))
  except (OSError, ValueError, KeyError):
    return None
  return state if content == str(state["sha256"]) else None


def digests_of(state: dict[str, Int[np.ndarray, "..."]]) -> list[bytes]:
  """Digests of a shard's documents, in order."""
  return [row.tobytes() for row in state["digests"]]


def state_name(shard: int) -> str:
  """File of a shard's state."""
  return f"shard-{shard:05d}.state.npz"


def _unfinished(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.{uuid.uuid4().hex}{UNFINISHED}")


def sync(file) -> None:
  """Has the file on disk."""
  file.flush()
  os.fsync(file.fileno())
