"""Builds token caches, shard by shard; a killed build goes on where it was.

What a shard is, `cache_shards` says; who makes the shards is a function, this
process (`shards_in_order`) or a Beam pipeline (`data.beam.cache`).
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from bertjax import registry
from bertjax.data import cache as cache_lib
from bertjax.data import cache_shards
from bertjax.data import sentences as sentences_lib
from bertjax.data.cache import TokenCache
from bertjax.data.sources import base

State = Mapping[str, Any]  # see `cache_shards.write_shard`
# (job, folder) -> states of all shards in order, which the folder then holds.
MakeShards = Callable[[cache_shards.Job, pathlib.Path], Sequence[State]]


def shards_in_order(job: cache_shards.Job, folder: pathlib.Path) -> list[State]:
  """Makes all shards one after the other; keeps those that are whole.

  Memory: one batch of documents, the lengths of all sentences, and about 100
  bytes a document for finding duplicates.
  """
  seen: set[bytes] = set()
  states, found = [], 0
  for shard, examples in job.blocks():
    state = cache_shards.finished_shard(folder, shard)
    found += state is not None
    if state is None:
      state = job.write(folder, shard, examples, seen)
    seen.update(cache_shards.digests_of(state))
    states.append(state)
  if found:
    logging.info("%s: %d shards were there.", folder, found)
  return states


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
  make_shards: MakeShards = shards_in_order,
) -> TokenCache:
  """The token cache of a split: opened when it exists, built when it does not.

  Several processes may ask at once: one builds, the others wait for it. A
  build that was interrupted keeps its finished shards. A corrupt cache is
  rebuilt with a warning.

  Args:
    source: where documents come from.
    split: one of `source.splits`.
    tokenizer: a `bertjax.data.tokenizers.Tokenizer`.
    splitter: key of `SPLITTERS`.
    cache_dir: folder of all caches.
    max_tokens_per_document: longer documents are cut off and counted.
    documents_per_shard: documents of the source that one shard covers.
    verify: how to check an existing cache, see `TokenCache`.
    make_shards: who makes the shards; the bytes do not depend on it.

  Raises:
    ValueError: unknown split or splitter, limits below 1, or no document.
  """
  base.check_split(source, split)
  registry.lookup(dict.fromkeys(cache_lib.CHECKS), verify, "verify")
  registry.lookup(sentences_lib.SPLITTERS, splitter, "data.splitter")
  for field, value in (
    ("max_tokens_per_document", max_tokens_per_document),
    ("documents_per_shard", documents_per_shard),
  ):
    if value is not None and value < 1:
      raise ValueError(f"{field}={value} must be at least 1.")
  job = cache_shards.Job(
    source,
    split,
    tokenizer,
    splitter,
    max_tokens_per_document,
    documents_per_shard,
  )
  recipe = job.recipe()
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
    _build(job, recipe, partial, make_shards)
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


def _build(
  job: cache_shards.Job,
  recipe: Mapping[str, Any],
  partial: pathlib.Path,
  make_shards: MakeShards,
) -> None:
  """Writes all files of a cache into `partial`."""
  partial.mkdir(exist_ok=True)
  for path in partial.glob(f"*{cache_shards.UNFINISHED}"):
    path.unlink(missing_ok=True)  # of a build that was killed
  shards = make_shards(job, partial)
  counts = {
    name: int(sum(int(shard[name]) for shard in shards))
    for name in cache_shards.COUNTS
  }
  if not any(len(shard["document_lengths"]) for shard in shards):
    shutil.rmtree(partial)
    raise ValueError(
      f"source {job.source.name!r} has no text in split {job.split!r}:"
      f" {counts['empty']} documents, all of them empty. Check its paths,"
      " filters and fields."
    )
  sizes = _write_index(partial, shards)
  _write_manifest(partial, {**recipe, **sizes, **counts}, len(shards))
  for shard in range(len(shards)):
    (partial / cache_shards.state_name(shard)).unlink()


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
    cache_shards.sync(f)
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
    cache_shards.sync(f)
