"""How the readers of a pipeline share a source.

A source of several parts (see `sources.base.parts`) is counted first, part by
part; then every reader reads the consecutive blocks that are its own and opens
no other part. Of a source that is one part every reader passes over all and
takes each R-th block. The blocks, and so what is made of them, are the same.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import apache_beam as beam

from bertjax.data import cache_shards
from bertjax.data.sources import base


class Share(NamedTuple):
  """What one of the readers works on.

  Attributes:
    reader: its number.
    readers: their count.
    counts: examples of each part of the source; None: it is one part.
  """

  reader: int
  readers: int
  counts: tuple[int, ...] | None = None

  def blocks(
    self, source: base.Source, split: str, size: int
  ) -> Iterator[tuple[int, Iterator[base.Example]]]:
    """Those of `cache_shards.blocks` of the split that this reader takes."""
    if self.counts is None:
      for block in cache_shards.blocks(source.examples(split), size):
        if block[0] % self.readers == self.reader:
          yield block
      return
    count = -(-sum(self.counts) // size)
    first, stop = (count * (self.reader + i) // self.readers for i in (0, 1))
    examples = itertools.islice(
      _examples_from(first * size, base.parts(source, split), self.counts),
      (stop - first) * size,
    )
    for number, block in cache_shards.blocks(examples, size):
      yield first + number, block


def _examples_from(
  first: int, parts: Sequence[base.Part], counts: Sequence[int]
) -> Iterator[base.Example]:
  """The examples from number `first` on; earlier parts stay closed."""
  for part, count in zip(parts, counts, strict=True):
    if first < count:
      yield from itertools.islice(part(), first, None)
    first = max(first - count, 0)


class Shares(beam.PTransform):
  """The `Share` of each reader, for a worker of its own."""

  def __init__(self, source: base.Source, split: str, readers: int):
    """Args:
    source: what is read.
    split: of the source.
    readers: how many workers read at the same time.

    Raises:
      ValueError: `readers` below 1.
    """
    super().__init__()
    if readers < 1:
      raise ValueError(f"readers={readers} must be at least 1.")
    self._source, self._split, self._readers = source, split, readers

  def expand(self, begin):
    readers = self._readers
    numbers = begin | "Readers" >> _Numbers(readers)
    source, split = self._source, self._split
    parts = len(base.parts(source, split))
    if parts == 1 or readers == 1:
      return numbers | beam.Map(lambda reader: Share(reader, readers))

    def counted(part):  # a closure: Beam cannot check the type of a protocol
      return part, sum(1 for _ in base.parts(source, split)[part]())

    counts = begin | "Parts" >> _Numbers(parts) | "Count" >> beam.Map(counted)
    return numbers | beam.Map(
      lambda reader, counts: Share(
        reader, readers, tuple(counts[i] for i in range(parts))
      ),
      beam.pvalue.AsDict(counts),
    )


class _Numbers(beam.PTransform):
  """0..count-1, each for a worker of its own."""

  def __init__(self, count: int):
    super().__init__()
    self._count = count

  def expand(self, begin):
    return begin | beam.Create(range(self._count)) | beam.Reshuffle()
