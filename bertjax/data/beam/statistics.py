"""How large a corpus is, and how much of it is there twice."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from bertjax.data import cache as cache_lib
from bertjax.data import cache_shards
from bertjax.data.beam import minhash
from bertjax.data.beam.pipeline import results
from bertjax.data.beam.reading import Share, Shares

_HASHES = minhash.MinHash()
_SUMS = ("documents", "empty", "characters", "sentences", "tokens")


class _Facts(NamedTuple):
  """What is kept of a document.

  Attributes:
    index: of the document in the source.
    sums: 1, whether it is empty, and its numbers, in the order of `_SUMS`.
    digest: of its tokens; b"" if it has none.
    signature: its MinHash; b"" for what is not compared.
  """

  index: int
  sums: tuple[int, ...]
  digest: bytes
  signature: bytes


def corpus_statistics(
  job: cache_shards.Job,
  scratch: str,
  *,
  readers: int = 1,
  options: PipelineOptions | None = None,
  threshold: float = 0.8,
  hashes: minhash.MinHash = _HASHES,
) -> dict[str, int]:
  """Counts a split, before anything is cut or dropped.

  About 10 KB a document go between workers for the near-duplicates.

  Args:
    job: what to count; its limit on tokens is not applied.
    scratch: folder or URL that all workers see.
    readers: workers that read at the same time.
    options: see `pipeline_options`.
    threshold: estimated overlap from which texts are near-duplicates.
    hashes: of which n-grams, how exactly.

  Returns:
    `documents`, `characters`, `sentences` and `tokens`; `empty`, documents
    without a token; `duplicates`, documents of the same tokens as an earlier
    one, which a token cache drops (copies that a mixture makes are none); and
    `near_duplicates`, further documents that overlap with an earlier one.
    Of the earlier documents with a key in common, only the first counts.

  Raises:
    ValueError: `readers` below 1, or a threshold outside (0, 1].
  """
  shares = Shares(job.source, job.split, readers)
  if not 0 < threshold <= 1:
    raise ValueError(f"threshold={threshold} must be above 0 and at most 1.")
  next(iter(job.source.examples(job.split)), None)  # see `cache.make_shards`

  def build(pipeline: beam.Pipeline) -> beam.PCollection:
    facts = (
      pipeline | shares | "Describe" >> beam.FlatMap(_described, job, hashes)
    )
    sums = (
      facts
      | "Sums" >> beam.Map(lambda fact: fact.sums)
      | "Add" >> beam.CombineGlobally(_added)
      | "NameSums" >> beam.FlatMap(lambda sums: list(zip(_SUMS, sums)))
    )
    distinct = (
      facts
      | "Full" >> beam.Filter(lambda fact: fact.digest)
      | "Digest" >> beam.Map(lambda fact: fact.digest)
      | "DistinctDigests" >> beam.Distinct()
      | "CountDistinct" >> beam.combiners.Count.Globally()
      | "NameDistinct" >> beam.Map(lambda count: ("distinct", count))
    )
    near = (
      facts
      | "NearDuplicates" >> _NearDuplicates(hashes, threshold)
      | "CountNear" >> beam.combiners.Count.Globally()
      | "NameNear" >> beam.Map(lambda count: ("near_duplicates", count))
    )
    return (sums, distinct, near) | beam.Flatten()

  found = dict(results(build, options, scratch))
  full = found["documents"] - found["empty"]
  found["duplicates"] = full - found.pop("distinct")
  return {
    name: found[name] for name in (*_SUMS, "duplicates", "near_duplicates")
  }


def _described(
  share: Share, job: cache_shards.Job, hashes: minhash.MinHash
) -> Iterator[_Facts]:
  blocks = share.blocks(job.source, job.split, job.documents_per_shard)
  for shard, examples in blocks:
    examples, texts = itertools.tee(examples)
    pairs = zip(texts, job.tokenized(examples))
    first = shard * job.documents_per_shard
    for index, (example, labelled) in enumerate(pairs, first):
      text, (document, copy, _) = example["text"], labelled
      size = len(document.tokens)
      digest = cache_lib.document_digest(document, copy) if size else b""
      compared = size and not copy
      yield _Facts(
        index,
        (1, int(not size), len(text), len(document.sentence_ends), size),
        digest,
        hashes.signature(text).tobytes() if compared else b"",
      )


def _added(sums: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
  total = [0] * len(_SUMS)
  for row in sums:
    total = [a + b for a, b in zip(total, row)]
  return tuple(total)


class _NearDuplicates(beam.PTransform):
  """Indices of documents that overlap with an earlier one of other tokens."""

  def __init__(self, hashes: minhash.MinHash, threshold: float):
    super().__init__()
    self._hashes, self._threshold = hashes, threshold

  def expand(self, facts):
    return (
      facts
      | beam.Filter(lambda fact: fact.signature)
      | beam.Map(lambda fact: (fact.digest, (fact.index, fact.signature)))
      | "FirstOfEqual" >> beam.CombinePerKey(min)
      | beam.Values()
      | "Keys" >> beam.FlatMap(_by_key, self._hashes)
      | "ByKey" >> beam.GroupByKey()
      | "Compare" >> beam.FlatMap(_near, self._threshold)
      | "DistinctNear" >> beam.Distinct()
    )


def _by_key(
  document: tuple[int, bytes], hashes: minhash.MinHash
) -> Iterator[tuple[bytes, tuple[int, bytes]]]:
  for key in hashes.keys(np.frombuffer(document[1], np.uint32)):
    yield key, document


def _near(
  element: tuple[bytes, Iterable[tuple[int, bytes]]], threshold: float
) -> Iterator[int]:
  _, documents = element
  first, signature = min(documents)
  signature = np.frombuffer(signature, np.uint32)
  for index, other in documents:
    alike = minhash.similarity(signature, np.frombuffer(other, np.uint32))
    if index != first and alike >= threshold:
      yield index
