import contextlib
import functools
import gzip
import json
import pathlib
import pickle
import sys
import tempfile
from unittest import mock

import pyarrow.parquet
from absl.testing import absltest
from apache_beam.io.filesystems import FileSystems

from bertjax.data import cache_build, sentences, sources
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
      self.remote("caches/tokens-*.shards/shard-*.arrayrecord"),
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

  def test_texts_of_an_object_store(self):
    """What is at a URL is what is in a folder, whatever packs it."""
    written = cache_test.texts(12)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in written]
    table = pyarrow.table({"text": written[6:]})
    pyarrow.parquet.write_table(table, self.folder / "b.parquet")
    parts = {
      "en/a.jsonl.gz": gzip.compress(b"".join(lines[:6]), mtime=0),
      "de/b.jsonl": b"".join(lines[6:]),
      "en/b.parquet": (self.folder / "b.parquet").read_bytes(),
      "d.txt": b"no",
    }
    for name, content in parts.items():
      memory_filesystem.FILES[f"mem://corpus/{name}"] = content
      path = self.folder / "local" / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
    for kind, pattern, files in (
      ("jsonl", "*/*.jsonl*", 2),
      ("parquet", "en/b.parquet", 1),
      ("text_files", "**.txt", 1),
    ):
      with self.subTest(kind):
        build = sources.SOURCES[kind]
        local = build(f"{self.folder}/local/{pattern.replace('**', '*')}")
        there = build(f"mem://corpus/{pattern}")
        self.assertLen(there.parts("train"), files)
        self.assertEqual(there.fingerprint(), local.fingerprint())
        self.assertEqual(
          list(there.examples("train")), list(local.examples("train"))
        )
        where = pickle.loads(pickle.dumps(there))  # on another machine
        with contextlib.chdir(self.folder):
          self.assertEqual(
            list(where.examples("train")), list(local.examples("train"))
          )
    both = sources.SOURCES["jsonl"](
      ["mem://corpus/en/*.gz", f"{self.folder}/local/de/b.jsonl"]
    )
    self.assertCountEqual([e["text"] for e in both.examples("train")], written)
    with self.assertRaisesRegex(ValueError, "'mem://corpus/x/.*matches no"):
      sources.SOURCES["jsonl"]("mem://corpus/x/*")

  def test_a_url_without_beam_says_what_to_install(self):
    with (
      mock.patch.dict(sys.modules, {"apache_beam.io.filesystems": None}),
      self.assertRaisesRegex(ImportError, r"pip install 'bertjax\[beam\]'"),
    ):
      sources.SOURCES["jsonl"]("gs://corpus/*.jsonl")

  def test_texts_of_a_store_become_shards_in_it(self):
    for i in range(3):
      lines = (json.dumps({"text": t}) + "\n" for t in cache_test.texts(9 + i))
      memory_filesystem.FILES[f"mem://corpus/{i}.jsonl"] = "".join(
        lines
      ).encode()
    self.source = sources.SOURCES["jsonl"]("mem://corpus/*.jsonl")
    self.assertEqual(files_of(self.build(readers=3)), self.expected())

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
