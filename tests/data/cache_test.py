import hashlib
import json
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import weakref
from concurrent import futures
from unittest import mock

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bertjax import registry
from bertjax.data import cache as cache_lib
from bertjax.data import cache_build, cache_shards, sentences
from bertjax.data.text import TextData
from tests import tiny

_REPOSITORY = pathlib.Path(__file__).parents[2]


class FakeTokenizer:
  """One token a word: its hash, below `vocab_size`."""

  def __init__(self, vocab_size=1000):
    self.vocab_size = vocab_size
    self.texts = 0

  def encode_batch(self, texts):
    self.texts += len(texts)
    return [
      np.array(
        [
          int.from_bytes(hashlib.md5(w.encode()).digest()[:4], "big")
          % self.vocab_size
          for w in text.split()
        ],
        np.int32,
      )
      for text in texts
    ]

  def fingerprint(self):
    return f"fake-{self.vocab_size}"


class FakeSource:
  name, licence, splits = "fake", "none", ("train", "test")

  def __init__(self, texts, fail_after=None, version=""):
    self.texts, self.fail_after, self.version = list(texts), fail_after, version

  def fingerprint(self):
    # A failing source is the same source: only the machine was unlucky.
    return hashlib.sha256(repr((self.texts, self.version)).encode()).hexdigest()

  def examples(self, split):
    for i, text in enumerate(self.texts):
      if i == self.fail_after:
        raise KeyboardInterrupt
      copy = int(text.startswith("COPY"))
      text = text.removeprefix("COPY")
      yield {"id": str(i), "text": text, "copy": copy, "component": i % 3}


def texts(count=23):
  """Documents of 1..7 sentences of 1..5 words."""
  rng = np.random.default_rng(7)
  return [
    " ".join(
      " ".join(f"W{rng.integers(500)}" for _ in range(rng.integers(1, 6))) + "."
      for _ in range(rng.integers(1, 8))
    )
    for _ in range(count)
  ]


def files_of(cache):
  return {p.name: p.read_bytes() for p in sorted(cache.path.iterdir())}


class RecordTest(parameterized.TestCase):
  @hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
  @hypothesis.given(
    tokens=hnp.arrays(
      np.int32,
      st.integers(0, 50),
      elements=st.integers(0, 2**31 - 1) | st.integers(0, 70_000),
    ),
    cuts=st.sets(st.integers(1, 49)),
  )
  def test_round_trip(self, tokens, cuts):
    ends = sorted({c for c in cuts if c < len(tokens)} | {len(tokens)} - {0})
    document = cache_lib.TokenizedDocument(tokens, np.array(ends, np.int32))
    found = cache_lib.unpack_record(cache_lib.pack_record(document))
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_array_equal(found.sentence_ends, ends)
    self.assertEqual((found.tokens.dtype, found.sentence_ends.dtype),
                     (np.int32, np.int32))  # fmt: skip

  @parameterized.parameters((65_535, 2), (65_536, 4))
  def test_small_ids_take_two_bytes(self, largest, width):
    document = cache_lib.TokenizedDocument(
      np.array([1, largest, 3], np.int32), np.array([3], np.int32)
    )
    self.assertLen(cache_lib.pack_record(document), 8 + 4 + 3 * width)

  @parameterized.parameters(
    (4, [3, 4]),  # inside the second sentence
    (3, [3]),  # at its beginning
    (5, [3, 5]),
    (9, [3, 5, 6]),
  )
  def test_truncation_cuts_the_last_sentence(self, limit, ends):
    document = cache_lib.TokenizedDocument(
      np.arange(6, dtype=np.int32), np.array([3, 5, 6], np.int32)
    )
    cut = cache_lib.truncate(document, limit)
    np.testing.assert_array_equal(cut.tokens, np.arange(min(limit, 6)))
    np.testing.assert_array_equal(cut.sentence_ends, ends)

  def test_a_document_alone_equals_the_document_in_a_batch(self):
    batch = cache_lib.tokenize_documents(
      ["A b. C d e.", "", "F."], FakeTokenizer(), sentences.sentences
    )
    for text, together in zip(["A b. C d e.", "", "F."], batch):
      alone = cache_lib.tokenize_document(
        text, FakeTokenizer(), sentences.sentences
      )
      np.testing.assert_array_equal(alone.tokens, together.tokens)
      np.testing.assert_array_equal(alone.sentence_ends, together.sentence_ends)
    np.testing.assert_array_equal(batch[0].sentence_ends, [2, 5])


class TokenCacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def build(self, source, folder=None, tokenizer=None, **options):
    options = {"documents_per_shard": 5, **options}
    return cache_build.build_cache(
      source,
      "train",
      tokenizer or FakeTokenizer(),
      "sentences",
      folder or self.folder,
      **options,
    )

  def test_documents_and_index_agree_with_the_texts(self):
    written = texts()
    cache = self.build(FakeSource(written))
    expected = [
      cache_lib.tokenize_document(t, FakeTokenizer(), sentences.sentences)
      for t in written
    ]
    order = np.random.default_rng(0).permutation(len(written))
    for i, document in zip(order, cache.documents(order)):
      np.testing.assert_array_equal(document.tokens, expected[i].tokens)
      np.testing.assert_array_equal(
        document.sentence_ends, expected[i].sentence_ends
      )
      first, last = cache.sentence_offsets[i : i + 2]
      np.testing.assert_array_equal(
        np.cumsum(cache.sentence_lengths[first:last]), document.sentence_ends
      )
      self.assertEqual(cache.document_lengths[i], len(document.tokens))
    self.assertEqual(cache.num_documents, len(written))
    self.assertEqual(cache.num_tokens, sum(len(t.split()) for t in written))
    self.assertEqual(cache.manifest["sentences"], len(cache.sentence_lengths))
    self.assertLen(list(cache.path.glob("*.arrayrecord")), 5)  # 23 / 5

  @parameterized.parameters(-1, 23)
  def test_index_outside_is_refused(self, index):
    cache = self.build(FakeSource(texts()))
    with self.assertRaisesRegex(IndexError, r"0\.\.22"):
      cache.document(index)

  def test_duplicates_and_empty_documents_are_dropped_and_counted(self):
    a, b, c = texts(3)
    cache = self.build(FakeSource([a, " ", b, a, b, c, "\n", a]))
    self.assertEqual(
      (cache.num_documents, cache.duplicates, cache.manifest["empty"]),
      (3, 3, 2),
    )
    np.testing.assert_array_equal(
      cache.document_lengths, [len(t.split()) for t in (a, b, c)]
    )

  def test_sources_of_documents_survive_what_is_dropped(self):
    written = [*texts(6), "", *texts(9)[6:]]  # 9 documents, the 7th empty
    cache = self.build(FakeSource([*written, written[0]]))
    kept = [i % 3 for i in (0, 1, 2, 3, 4, 5, 7, 8, 9)]
    np.testing.assert_array_equal(cache.document_sources, kept)
    self.assertEqual(cache.document_sources.dtype, np.uint16)

  def test_a_shard_may_lose_all_its_documents(self):
    a, b = texts(2)
    cache = self.build(FakeSource([a, a, a, a, b]), documents_per_shard=2)
    self.assertLen(list(cache.path.glob("*.arrayrecord")), 3)
    self.assertLen(cache.document(1).tokens, len(b.split()))

  def test_deliberate_copies_stay(self):
    (a,) = texts(1)
    cache = self.build(FakeSource([a, "COPY" + a, a]))
    self.assertEqual((cache.num_documents, cache.duplicates), (2, 1))

  def test_long_documents_are_cut_and_counted(self):
    written = ["A b c. D e f.", "A b c. D.", "G h."]
    cache = self.build(FakeSource(written), max_tokens_per_document=4)
    np.testing.assert_array_equal(cache.document_lengths, [4, 4, 2])
    self.assertEqual(cache.manifest["truncated"], 1)
    np.testing.assert_array_equal(cache.document(0).sentence_ends, [3, 4])

  def test_second_call_opens_and_does_not_tokenise(self):
    first, again = FakeTokenizer(), FakeTokenizer()
    source = FakeSource(texts())
    self.build(source, tokenizer=first)
    self.build(source, tokenizer=again)
    self.assertGreater(first.texts, 0)
    self.assertEqual(again.texts, 0)

  def test_everything_that_decides_the_content_decides_the_name(self):
    source = FakeSource(texts())
    paths = [
      self.build(source),
      self.build(FakeSource(texts(), version="2")),
      self.build(source, tokenizer=FakeTokenizer(999)),
      self.build(source, max_tokens_per_document=5),
      self.build(source, documents_per_shard=7),
      cache_build.build_cache(
        source, "test", FakeTokenizer(), "sentences", self.folder
      ),
      cache_build.build_cache(
        source, "train", FakeTokenizer(), "lines", self.folder
      ),
    ]
    self.assertLen({cache.path for cache in paths}, len(paths))

  def test_bytes_do_not_depend_on_batches_or_folder(self):
    source = FakeSource(texts())
    one = self.build(source)
    with mock.patch.object(cache_shards, "_BATCH", 3):
      other = self.build(source, self.folder / "elsewhere")
    self.assertEqual(files_of(one), files_of(other))

  def test_pickled_cache_reads_the_same_without_carrying_data(self):
    cache = self.build(FakeSource(texts()))
    before = cache.document(11)  # a reader is open now
    packed = pickle.dumps(cache)
    self.assertLess(len(packed), 1000)
    np.testing.assert_array_equal(
      pickle.loads(packed).document(11).tokens, before.tokens
    )

  def test_forked_child_reads_while_the_parent_reads(self):
    cache = self.build(FakeSource(texts()))
    expected = cache.document(3).tokens.tolist()
    context = multiprocessing.get_context("fork")
    with context.Pool(2, initializer=_remember, initargs=(cache,)) as pool:
      results = pool.map_async(_tokens_of, [3] * 20)
      for _ in range(200):
        self.assertEqual(cache.document(3).tokens.tolist(), expected)
      self.assertEqual(results.get(timeout=30), [expected] * 20)

  def test_few_shards_are_open_at_a_time_also_for_many_threads(self):
    class Reader:
      alive = weakref.WeakSet()

      def __init__(self, path):
        self._reader = open_shard(path)
        self.alive.add(self)

      def read(self, records):
        return self._reader.read(records)

    open_shard = cache_lib.open_shard
    written = texts()
    with (
      mock.patch.object(cache_lib, "open_shard", Reader),
      mock.patch.object(cache_lib, "OPEN_SHARDS", 2),
      futures.ThreadPoolExecutor(4) as pool,
    ):
      cache = self.build(FakeSource(written), documents_per_shard=2)
      expected = [d.tokens.tolist() for d in cache.documents(range(12))]
      self.assertLen(Reader.alive, 2)
      tasks = list(range(12)) * 20
      read = pool.map(lambda i: cache.document(i).tokens.tolist(), tasks)
      self.assertEqual(list(read), expected * 20)
    self.assertLen(Reader.alive, 2)

  @parameterized.product(
    name=["manifest.json", "index.npz", "shard-00002.arrayrecord"],
    damage=["flip", "cut", "remove"],
  )
  def test_damaged_file_is_named_and_rebuilt(self, name, damage):
    source = FakeSource(texts())
    cache = self.build(source)
    whole = files_of(cache)
    self.assertIn(name, whole)
    _DAMAGE[damage](cache.path / name)
    with self.assertLogs(level="WARNING") as logs:
      rebuilt = self.build(source)
    self.assertLen(logs.output, 1)
    self.assertIn(str(cache.path / name), logs.output[0])
    self.assertEqual(files_of(rebuilt), whole)

  def test_sizes_only_still_finds_cut_shards_and_damaged_indices(self):
    source = FakeSource(texts())
    cache = self.build(source)
    _flip(cache.path / "shard-00001.arrayrecord")
    cache_lib.TokenCache(cache.path, verify="sizes")
    with self.assertRaisesRegex(cache_lib.CorruptCacheError, "shard-00001"):
      cache_lib.TokenCache(cache.path)
    _cut(cache.path / "shard-00000.arrayrecord")
    with self.assertRaisesRegex(cache_lib.CorruptCacheError, "shard-00000"):
      cache_lib.TokenCache(cache.path, verify="sizes")

  def test_data_may_leave_the_contents_unread(self):
    folder = pathlib.Path(self.create_tempdir())
    tiny.write_corpus(folder)

    def read(**options):
      spec = tiny.config(folder)["data"] | options
      context = dict(seed=0, cache_dir=folder / "cache")
      return registry.call(TextData, spec, "data", **context).cache("train")

    cache = read()
    _flip(cache.path / "shard-00000.arrayrecord")
    with self.assertNoLogs(level="WARNING"):
      read(verify="sizes")
    with self.assertLogs(level="WARNING") as logs:
      read()
    self.assertIn("Rebuilding", logs.output[0])
    with self.assertRaisesRegex(ValueError, "data.verify='size' .* 'sizes'?"):
      read(verify="size")

  def test_record_damaged_after_opening_is_an_error_not_other_tokens(self):
    cache = self.build(FakeSource(texts()), documents_per_shard=100)
    path = cache.path / "shard-00000.arrayrecord"
    whole = path.read_bytes()
    record = cache_lib.pack_record(cache.document(20))
    place = whole.index(record) + len(record) - 1
    path.write_bytes(
      whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    )
    reopened = cache_lib.TokenCache(cache.path, verify="sizes")
    with self.assertRaisesRegex(cache_lib.CorruptCacheError, str(path)):
      reopened.document(20)

  def test_interrupted_build_goes_on_after_its_last_whole_shard(self):
    written = texts()
    expected = files_of(self.build(FakeSource(written), self.folder / "whole"))
    with self.assertRaises(KeyboardInterrupt):
      self.build(FakeSource(written, fail_after=17))
    self.assertEmpty([p for p in self.folder.iterdir() if _is_final(p)])
    tokenizer = FakeTokenizer()
    cache = self.build(FakeSource(written), tokenizer=tokenizer)
    self.assertEqual(files_of(cache), expected)
    left = sum(len(sentences.sentences(t)) for t in written[15:])
    self.assertEqual(tokenizer.texts, left)  # shards 0-2 were whole

  def test_damaged_shard_of_an_interrupted_build_is_written_again(self):
    written = texts()
    expected = files_of(self.build(FakeSource(written), self.folder / "whole"))
    with self.assertRaises(KeyboardInterrupt):
      self.build(FakeSource(written, fail_after=17))
    (shard,) = self.folder.glob("*.partial/shard-00001.arrayrecord")
    _flip(shard)
    self.assertEqual(files_of(self.build(FakeSource(written))), expected)

  def test_two_builders_at_once_both_end_well(self):
    self._run_builders(kill_first=False)

  def test_killed_builder_leaves_no_half_cache_and_no_lock(self):
    self._run_builders(kill_first=True)

  def _run_builders(self, kill_first):
    program = textwrap.dedent("""
        import pathlib, sys, time
        sys.path.insert(0, sys.argv[1])
        from tests.data import cache_test as t
        class Held(t.FakeSource):
          def examples(self, split):
            for number, example in enumerate(super().examples(split)):
              while number == 12 and not pathlib.Path(sys.argv[3]).exists():
                time.sleep(0.01)
              yield example
        source = Held(t.texts())
        print("ready", flush=True)
        cache = t.cache_build.build_cache(
          source, "train", t.FakeTokenizer(), "sentences", sys.argv[2],
          documents_per_shard=5)
        print(cache.num_documents, flush=True)
    """)
    more = pathlib.Path(self.create_tempdir()) / "more"  # documents are there
    command = [
      *(sys.executable, "-c", program),
      *map(str, (_REPOSITORY, self.folder, more)),
    ]
    builders = [
      subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
      for _ in range(2)
    ]
    for builder in builders:
      self.addCleanup(builder.stdout.close)
      self.addCleanup(builder.kill)
      self.assertEqual(builder.stdout.readline(), "ready\n")
    while not list(self.folder.glob("*.partial/*.state.npz")):
      self.assertIsNone(builders[0].poll())
      time.sleep(0.01)
    if kill_first:
      builders[0].send_signal(signal.SIGKILL)
      builders[0].wait(30)
      builders.pop(0)
    more.touch()
    for builder in builders:
      self.assertEqual(builder.stdout.readline(), "23\n")
      self.assertEqual(builder.wait(30), 0)
    expected = files_of(self.build(FakeSource(texts()), self.folder / "alone"))
    (found,) = [p for p in self.folder.iterdir() if _is_final(p)]
    self.assertEqual(files_of(cache_lib.TokenCache(found)), expected)
    self.assertEmpty(list(self.folder.glob("*.partial*")))

  def test_bad_arguments(self):
    source = FakeSource(texts())
    with self.assertRaisesRegex(ValueError, "split='dev'.*train, test"):
      cache_build.build_cache(
        source, "dev", FakeTokenizer(), "sentences", self.folder
      )
    with self.assertRaisesRegex(ValueError, "data.splitter='word'.*paragraphs"):
      cache_build.build_cache(
        source, "train", FakeTokenizer(), "word", self.folder
      )
    with self.assertRaisesRegex(ValueError, "max_tokens_per_document=0"):
      self.build(source, max_tokens_per_document=0)
    with self.assertRaisesRegex(ValueError, "verify='all'"):
      self.build(source, verify="all")

  @parameterized.parameters(([],), (["", "  \n"],))
  def test_empty_corpus_names_source_and_split(self, nothing):
    with self.assertRaisesRegex(ValueError, "'fake' has no text.*'train'"):
      self.build(FakeSource(nothing))
    self.assertEmpty([p for p in self.folder.iterdir() if p.is_dir()])

  def test_manifest_says_what_the_cache_was_made_from(self):
    cache = self.build(FakeSource(texts()))
    manifest = json.loads((cache.path / "manifest.json").read_text())
    for field, value in dict(
      source="fake", split="train", tokenizer="fake-1000", documents=23
    ).items():
      self.assertEqual(manifest[field], value)


_CACHE = None


def _remember(cache):
  global _CACHE
  _CACHE = cache


def _tokens_of(index):
  return _CACHE.document(index).tokens.tolist()


def _is_final(path):
  return path.is_dir() and path.name.startswith("tokens-") and not path.suffix


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def _cut(path):
  os.truncate(path, path.stat().st_size - 3)


_DAMAGE = {"flip": _flip, "cut": _cut, "remove": lambda path: path.unlink()}


if __name__ == "__main__":
  absltest.main()
