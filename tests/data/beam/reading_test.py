"""Readers share a source: every block once, and what it always held."""

import itertools

from absl.testing import absltest, parameterized
from apache_beam.internal import pickler

from bertjax.data import cache_shards
from bertjax.data.beam import reading
from tests.data.sources import splits_test


class FakeSource:
  """Numbered examples in parts; notes which parts are opened."""

  splits = ("train",)

  def __init__(self, counts):
    self._counts = counts
    self.opened = []

  def examples(self, split):
    return itertools.chain.from_iterable(p() for p in self.parts(split))

  def parts(self, split):
    del split
    return [lambda i=i: self._read(i) for i in range(len(self._counts))]

  def _read(self, part):
    self.opened.append(part)
    first = sum(self._counts[:part])
    yield from range(first, first + self._counts[part])


def _read(blocks):
  return [(number, list(examples)) for number, examples in blocks]


class ShareTest(parameterized.TestCase):
  @parameterized.product(
    counts=((7, 0, 5, 9), (0, 3), (20, 1, 1), None),
    readers=(1, 2, 3, 10),
    size=(1, 4, 5, 100),
  )
  def test_each_block_is_read_once_and_is_what_it_is_in_process(
    self, counts, readers, size
  ):
    source = FakeSource(counts or (11,))
    expected = _read(cache_shards.blocks(source.examples("train"), size))
    found = [
      block
      for reader in range(readers)
      for block in _read(
        reading.Share(reader, readers, counts).blocks(source, "train", size)
      )
    ]
    if counts is not None:
      self.assertEqual(found, expected)  # consecutive ones for each reader
    self.assertCountEqual(found, expected)

  def test_readers_open_only_parts_that_hold_their_blocks(self):
    counts = (8, 8, 0, 4, 12)  # blocks of 4: two, two, none, one, three
    opened = []
    for reader in range(4):
      source = FakeSource(counts)
      share = reading.Share(reader, 4, counts)
      self.assertLen(_read(share.blocks(source, "train", 4)), 2)
      opened.append(source.opened)
    self.assertEqual(opened, [[0], [1], [3, 4], [4]])

  def test_blocks_that_are_not_read_are_passed_over(self):
    source = FakeSource((8, 5))
    blocks = reading.Share(1, 2, (8, 5)).blocks(source, "train", 3)
    self.assertEqual(
      [(number, next(examples)) for number, examples in blocks],
      [(2, 6), (3, 9), (4, 12)],
    )


class WorkerTest(splits_test.SourceTestCase):
  @parameterized.parameters(*splits_test.RULES)
  def test_a_divided_source_reaches_workers(self, name):
    source = self.build(split=dict(name=name, **splits_test.RULES[name]))
    for _ in range(2):  # before it was read, and after
      sent = pickler.loads(pickler.dumps(source))
      for split in source.splits:
        self.assertEqual(
          list(sent.examples(split)), list(source.examples(split))
        )


if __name__ == "__main__":
  absltest.main()
