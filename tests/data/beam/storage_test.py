import functools
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
from apache_beam.io.filesystems import FileSystems

from bertjax.data import cache_build, sentences
from bertjax.data.beam import cache as beam_cache
from bertjax.data.beam import statistics, storage
from tests.data import cache_test
from tests.data.beam import beam_cache_test, memory_filesystem

_SHARED = "mem://bucket/caches"
files_of = cache_test.files_of


class StorageTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.dict(memory_filesystem.FILES, clear=True))
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.source = cache_test.FakeSource(beam_cache_test.corpus())

  def build(self, tokenizer=None, where="here", shared=_SHARED, readers=2):
    return cache_build.build_cache(
      self.source,
      "train",
      tokenizer or cache_test.FakeTokenizer(),
      "sentences",
      self.folder / where,
      documents_per_shard=5,
      make_shards=functools.partial(
        beam_cache.make_shards, readers=readers, shared=shared
      ),
    )

  def expected(self):
    return files_of(self.build(where="alone", shared=None))

  def remote(self, pattern):
    """Names of what the object store holds below the cache's."""
    return sorted(
      name.split("/", 5)[-1]
      for name in memory_filesystem.FILES
      if pathlib.PurePosixPath(name).match(pattern)
    )

  def test_bytes_of_a_cache_made_in_an_object_store(self):
    cache = self.build()
    self.assertEqual(files_of(cache), self.expected())
    # Whole shards stay, drafts and temporary files do not.
    self.assertLen(memory_filesystem.FILES, 2 * 7)
    self.assertEqual(
      self.remote("caches/tokens-*/shard-*.arrayrecord"),
      [f"shard-{i:05d}.arrayrecord" for i in range(7)],
    )

  def test_local_folder_for_the_workers(self):
    shared = self.folder / "sh[a]red"
    cache = self.build(shared=str(shared))
    self.assertEqual(files_of(cache), self.expected())
    (made,) = shared.iterdir()
    self.assertNotIn("drafts", [path.name for path in made.iterdir()])

  def test_failed_pipeline_keeps_its_drafts_in_the_store(self):
    with self.assertRaisesRegex(Exception, "no luck"):
      self.build(beam_cache_test.UnluckyTokenizer(), readers=1)
    self.assertLen(self.remote("drafts/*.state.npz"), 3)
    self.assertEmpty(list(self.folder.glob("here/*.partial/*")))
    notes = self.folder / "notes"
    tokenizer = beam_cache_test.NotingTokenizer(notes)
    cache = self.build(tokenizer)
    left = [text.removeprefix("COPY") for text in beam_cache_test.corpus()[15:]]
    self.assertEqual(
      tokenizer.noted(), sum(len(sentences.sentences(t)) for t in left)
    )
    self.assertEqual(files_of(cache), self.expected())
    notes.unlink()  # the store has all of it for the next machine
    self.assertEqual(
      files_of(self.build(tokenizer, where="there")), files_of(cache)
    )
    self.assertFalse(notes.exists())

  def test_shard_whose_sending_breaks_is_not_there(self):
    copied, sent = beam_cache.storage.shutil.copyfileobj, []

    def breaks(source, target, length):
      sent.append(source.name)
      if len(sent) == 4:  # the state of the second draft
        target.write(source.read(40))
        raise OSError("connection lost")
      copied(source, target, length)

    with (
      mock.patch.object(storage.shutil, "copyfileobj", breaks),
      self.assertRaisesRegex(Exception, "connection lost"),
    ):
      self.build(readers=1)
    self.assertLen(self.remote("drafts/*.state.npz"), 1)
    self.assertLen(self.remote("drafts/*.tmp"), 1)
    self.assertEqual(files_of(self.build()), self.expected())
    self.assertEmpty(self.remote("*.tmp"))

  def test_damaged_shard_in_the_store_is_made_anew(self):
    self.build()
    (name,) = [n for n in memory_filesystem.FILES if "2.arrayrecord" in n]
    memory_filesystem.FILES[name] = memory_filesystem.FILES[name][:-1]
    self.assertEqual(files_of(self.build(where="there")), self.expected())

  def test_statistics_exchange_results_in_the_store(self):
    job = beam_cache.cache_shards.Job(
      source=self.source,
      split="train",
      tokenizer=cache_test.FakeTokenizer(),
      splitter="sentences",
      max_tokens_per_document=None,
      documents_per_shard=5,
    )
    with mock.patch.object(
      FileSystems, "open", wraps=FileSystems.open
    ) as opened:
      found = statistics.corpus_statistics(job, _SHARED, readers=2)
    self.assertTrue(opened.call_args.args[0].startswith(_SHARED))
    self.assertEqual(found, statistics.corpus_statistics(job, str(self.folder)))
    self.assertEmpty(memory_filesystem.FILES)
    self.assertEmpty(list(self.folder.iterdir()))


if __name__ == "__main__":
  absltest.main()
