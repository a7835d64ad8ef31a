import collections
import functools
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import tracemalloc
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from bertjax.data import (
  cache_build,
  cache_shards,
  sentences,
  sources,
  tokenizers,
)
from bertjax.data.beam import cache as beam_cache
from bertjax.data.beam.pipeline import pipeline_options
from bertjax.data.sources import files
from tests.data import cache_test

_REPOSITORY = pathlib.Path(__file__).parents[3]
files_of = cache_test.files_of


class NotingTokenizer(cache_test.FakeTokenizer):
  """Writes down how many texts it is given, wherever it runs."""

  def __init__(self, notes):
    super().__init__()
    self.notes = notes

  def encode_batch(self, texts):
    with open(self.notes, "a") as file:
      file.write(f"{len(texts)}\n")
    return super().encode_batch(texts)

  def noted(self):
    return sum(map(int, self.notes.read_text().split()))


class UnluckyTokenizer(cache_test.FakeTokenizer):
  """Fails on a document of the fourth shard."""

  def encode_batch(self, texts):
    if any("Unlucky" in text for text in texts):
      raise RuntimeError("no luck")
    return super().encode_batch(texts)


class LongTokenizer(cache_test.FakeTokenizer):
  """Makes 100,000 tokens of each sentence, no two alike."""

  def encode_batch(self, texts):
    return [np.arange(int(t), int(t) + 100_000, dtype=np.int32) for t in texts]


def corpus():
  """32 documents, of which shards 1, 4, 5 and 6 hold some of earlier ones."""
  written = cache_test.texts(23)
  written[16] += " Unlucky."
  twice = [written[5], "", written[5], *written[:4], "COPY" + written[0]]
  return [*written[:8], written[2], *written[8:], *twice]


class BeamCacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def build(self, source, tokenizer=None, readers=None, folder=None, **options):
    """By Beam; in process without `readers`."""
    options = {"documents_per_shard": 5, **options}
    if readers is not None:
      options["make_shards"] = functools.partial(
        beam_cache.make_shards, readers=readers
      )
    return cache_build.build_cache(
      source,
      "train",
      tokenizer or cache_test.FakeTokenizer(),
      "sentences",
      folder or self.folder / "beam",
      **options,
    )

  def alone(self, source, tokenizer=None, **options):
    folder = self.folder / "alone"
    return files_of(self.build(source, tokenizer, folder=folder, **options))

  @parameterized.parameters(1, 3, 40)
  def test_bytes_are_those_of_the_builder_in_process(self, readers):
    source = cache_test.FakeSource(corpus())
    cache = self.build(source, readers=readers, max_tokens_per_document=12)
    expected = self.alone(source, max_tokens_per_document=12)
    self.assertEqual(files_of(cache), expected)
    manifest = json.loads(expected["manifest.json"])
    for count in ("duplicates", "empty", "truncated"):
      self.assertGreater(manifest[count], 0)  # or equality would say little
    self.assertLen([n for n in expected if n.endswith("arrayrecord")], 7)

  @parameterized.parameters("wordpiece", "unigram")
  def test_bytes_of_real_sources_and_tokenizers(self, kind):
    written = cache_test.texts(40)
    path = self.folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in written))
    tokenizer = tokenizers.train_tokenizer(kind, written, vocab_size=90)
    part = {"name": "jsonl", "paths": str(path)}
    spec = {
      "name": "mixture",
      "sources": [part | {"fractions": {"train": 0.7, "test": 0.3}}, part],
      "weights": [0.6, 0.4],
    }
    source = sources.SOURCES["mixture"](**{k: v for k, v in spec.items()
                                           if k != "name"})  # fmt: skip
    cache = self.build(source, tokenizer, readers=2)
    self.assertEqual(files_of(cache), self.alone(source, tokenizer))
    self.assertGreater(cache.duplicates, 0)
    self.assertEqual(set(cache.document_sources), {0, 1})

  def test_files_are_shared_among_readers(self):
    written = [text for text in cache_test.texts(40) for _ in range(2)]
    for i in range(4):
      lines = (json.dumps({"text": t}) + "\n" for t in written[20 * i :][:20])
      (self.folder / f"{i}.jsonl").write_text("".join(lines))
    source = sources.SOURCES["jsonl"](f"{self.folder}/*.jsonl")
    with mock.patch.object(
      files, "open_binary", wraps=files.open_binary
    ) as opened:
      cache = self.build(source, readers=4)
    self.assertEqual(files_of(cache), self.alone(source))
    self.assertEqual(cache.duplicates, 40)
    # To be counted and to be read; the first by whether there is anything.
    counts = collections.Counter(call.args[0] for call in opened.mock_calls)
    self.assertEqual(
      [counts[f"{self.folder}/{i}.jsonl"] for i in range(4)], [3, 2, 2, 2]
    )

  def test_memory_is_bounded_by_a_shard(self):
    source = cache_test.FakeSource(map(str, range(100)))
    self.build(source, readers=2, folder=self.folder / "first")  # imports
    tracemalloc.start()
    try:
      cache = self.build(source, LongTokenizer(), readers=2)
      _, peak = tracemalloc.get_traced_memory()
    finally:
      tracemalloc.stop()
    self.assertEqual(cache.num_tokens, 100 * 100_000)
    shard = 5 * 100_000 * np.dtype(np.int32).itemsize
    self.assertLess(peak, 6 * shard)  # of 20; each reader has two at hand

  def test_failed_pipeline_keeps_its_drafts(self):
    written = corpus()
    source = cache_test.FakeSource(written)
    with self.assertRaisesRegex(Exception, "no luck"):
      self.build(source, UnluckyTokenizer(), readers=1)
    self.assertEmpty(list((self.folder / "beam").glob("tokens-*[0-9a-f]/")))
    (drafts,) = (self.folder / "beam").glob("*.partial/drafts")
    kept = [path.name for path in sorted(drafts.glob("*.state.npz"))]
    self.assertEqual(kept, [f"shard-0000{i}.state.npz" for i in (0, 1, 2)])
    (drafts / "shard-00001.state.npz.0.tmp").touch()  # as a kill leaves it
    tokenizer = NotingTokenizer(self.folder / "notes")
    cache = self.build(source, tokenizer, readers=2)
    self.assertEqual(files_of(cache), self.alone(source))
    left = [text.removeprefix("COPY") for text in written[15:]]
    self.assertEqual(
      tokenizer.noted(), sum(len(sentences.sentences(t)) for t in left)
    )

  def test_failure_while_finishing_leaves_only_missing_shards_to_write(self):
    source = cache_test.FakeSource(corpus())
    write = cache_shards.write_shard
    written = []

    def fails_on_third(folder, shard, documents, counts):
      if folder.name != "drafts":
        if len(written) == 2:
          raise RuntimeError("no luck")
        written.append(shard)
      return write(folder, shard, documents, counts)

    with (
      mock.patch.object(cache_shards, "write_shard", fails_on_third),
      self.assertRaisesRegex(Exception, "no luck"),
    ):
      self.build(source, readers=2)
    first, tokenizer = written.copy(), NotingTokenizer(self.folder / "notes")

    def noted(folder, shard, documents, counts):
      written.append((folder.name == "drafts", shard))
      return write(folder, shard, documents, counts)

    with mock.patch.object(cache_shards, "write_shard", noted):
      cache = self.build(source, tokenizer, readers=3)
    self.assertCountEqual(
      written[2:], [(False, shard) for shard in range(7) if shard not in first]
    )
    self.assertFalse(tokenizer.notes.exists())
    self.assertEqual(files_of(cache), self.alone(source))

  def test_damaged_draft_is_made_anew(self):
    source = cache_test.FakeSource(corpus())
    with self.assertRaisesRegex(Exception, "no luck"):
      self.build(source, UnluckyTokenizer(), readers=1)
    (draft,) = (self.folder / "beam").glob("*/drafts/shard-00001.arrayrecord")
    content = bytearray(draft.read_bytes())
    content[len(content) // 2] ^= 1
    draft.write_bytes(content)
    cache = self.build(source, readers=1)
    self.assertEqual(files_of(cache), self.alone(source))

  def test_beam_goes_on_with_what_was_begun_in_process(self):
    written = corpus()
    with self.assertRaises(KeyboardInterrupt):
      self.build(cache_test.FakeSource(written, fail_after=17))
    tokenizer = NotingTokenizer(self.folder / "notes")
    source = cache_test.FakeSource(written)
    cache = self.build(source, tokenizer, readers=2)
    self.assertEqual(files_of(cache), self.alone(source))
    left = [text.removeprefix("COPY") for text in written[15:]]
    self.assertEqual(
      tokenizer.noted(), sum(len(sentences.sentences(t)) for t in left)
    )

  def test_killed_process_leaves_drafts_that_the_next_one_takes(self):
    program = textwrap.dedent("""
        import functools, sys, time
        from bertjax.data import cache_build
        from bertjax.data.beam import cache
        from tests.data import cache_test as t
        from tests.data.beam import beam_cache_test as b
        class Slow(t.FakeTokenizer):
          def encode_batch(self, texts):
            time.sleep(0.3)
            return super().encode_batch(texts)
        cache_build.build_cache(
          t.FakeSource(b.corpus()), "train", Slow(), "sentences", sys.argv[1],
          documents_per_shard=5, make_shards=cache.make_shards)
    """)
    folder = self.folder / "beam"
    process = subprocess.Popen(
      [sys.executable, "-c", program, str(folder)], cwd=_REPOSITORY
    )
    self.addCleanup(process.kill)
    while not list(folder.glob("*.partial/drafts/*00001.state.npz")):
      self.assertIsNone(process.poll())
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    kept = len(list(folder.glob("*.partial/drafts/*.state.npz")))
    self.assertBetween(kept, 2, 6)
    source = cache_test.FakeSource(corpus())
    tokenizer = NotingTokenizer(self.folder / "notes")
    cache = self.build(source, tokenizer, readers=2)
    self.assertEqual(files_of(cache), self.alone(source))
    left = [text.removeprefix("COPY") for text in corpus()[5 * kept :]]
    self.assertEqual(
      tokenizer.noted(), sum(len(sentences.sentences(t)) for t in left)
    )

  def test_lost_shard_is_not_passed_over(self):
    """As if a worker had written to a disk of its own."""
    source = cache_test.FakeSource(corpus())
    finish = beam_cache._finish

    def forgets_one(element, folder):
      if element[0] != 3:
        finish(element, folder)
      return element[0]

    with (
      mock.patch.object(beam_cache, "_finish", forgets_one),
      self.assertRaisesRegex(ValueError, "shard 3 of .* is missing"),
    ):
      self.build(source, readers=1)
    self.assertEqual(
      files_of(self.build(source, readers=1)), self.alone(source)
    )

  def test_bad_arguments(self):
    with self.assertRaisesRegex(ValueError, "readers=0 must be at least 1"):
      self.build(cache_test.FakeSource(corpus()), readers=0)
    with self.assertRaisesRegex(ValueError, "'fake' has no text"):
      self.build(cache_test.FakeSource(["", " "]), readers=2)
    with self.assertRaisesRegex(ValueError, "--direct_num_wokers is no flag"):
      pipeline_options(["--direct_num_wokers=2"])

  def test_other_runners_keep_their_flags(self):
    options = pipeline_options(["--runner=FlinkRunner", "--of_flink=2"])
    self.assertEqual(options.get_all_options()["runner"], "FlinkRunner")


if __name__ == "__main__":
  absltest.main()
