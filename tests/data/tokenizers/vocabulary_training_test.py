"""Training repeats bit for bit, in bounded memory, and is never redone."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

import hypothesis
import hypothesis.strategies as st
from absl.testing import absltest, parameterized

from bertjax.data import tokenizers
from bertjax.data.tokenizers import sampling

# Three-letter words over nine letters: nearly every count is tied.
_TRAIN = """
import random, sys
from bertjax.data import tokenizers
rng = random.Random(0)
words = ["".join(rng.choices("abcdefgh\\u00e9", k=3)) for _ in range(2000)]
texts = [" ".join(words[i:i + 40]) for i in range(0, 2000, 40)] * 2
kind, folder = sys.argv[1:]
options = {"vocab_size": 420}
options["max_bytes"] = 12_000
tokenizers.train_tokenizer(kind, texts, **options).save(folder)
"""
_ROOT = pathlib.Path(__file__).parents[3]
_TEXTS = ["some words and more words", "others, wordless"] * 4


class ReproducibleTest(parameterized.TestCase):
  @parameterized.parameters("wordpiece", "bpe", "byte_bpe", "unigram")
  def test_two_processes_write_the_same_bytes(self, kind):
    written = []
    with tempfile.TemporaryDirectory() as root:
      for threads in ("1", "2", "3"):
        folder = pathlib.Path(root) / threads
        environment = {
          **os.environ,
          "PYTHONPATH": str(_ROOT),
          "PYTHONHASHSEED": threads,
          "RAYON_NUM_THREADS": threads,
          "TOKENIZERS_PARALLELISM": "false" if threads == "1" else "true",
        }
        command = [sys.executable, "-c", _TRAIN, kind, str(folder)]
        subprocess.run(command, check=True, env=environment)
        written.append({p.name: p.read_bytes() for p in folder.iterdir()})
    self.assertEqual(written[0], written[1])
    self.assertEqual(written[0], written[2])
    self.assertIn("manifest.json", written[0])

  def test_frequent_words_become_pieces(self):
    tokenizer = tokenizers.train_tokenizer(
      "wordpiece", ["needle " * 50 + "hay stack"], vocab_size=45
    )
    self.assertEqual(tokenizer.pieces(tokenizer.encode("needle")), ["needle"])
    self.assertEqual(tokenizer.vocabulary[0], "[PAD]")
    self.assertLessEqual(tokenizer.vocab_size, 45)


class SampleTest(absltest.TestCase):
  @hypothesis.settings(deadline=None)
  @hypothesis.given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=50)),
    st.integers(1, 300),
    st.integers(0, 5),
  )
  def test_bound_holds_and_nothing_is_lost_below_it(self, texts, bound, seed):
    sample, facts = sampling.sample_texts(iter(texts), bound, seed)
    size = sum(len(part.encode()) for part in sample)
    total = sum(len(text.encode()) for text in texts)
    self.assertLessEqual(size, bound)
    self.assertEqual(facts["bytes_used"], size)
    self.assertEqual(facts["bytes_read"], total)
    self.assertEqual(facts["documents_read"], len(texts))
    if total <= bound:
      self.assertEqual("".join(sample), "".join(texts))
    again, _ = sampling.sample_texts(iter(texts), bound, seed)
    self.assertEqual(sample, again)

  def test_sample_spreads_over_the_whole_stream(self):
    texts = [f"{i:06d}" for i in range(10_000)]
    sample, _ = sampling.sample_texts(texts, 6_000, seed=0)
    numbers = [int(text) for text in sample]
    self.assertEqual(numbers, sorted(numbers))
    self.assertGreater(len(numbers), 900)
    # Each quarter should give 250; 5 standard deviations are 70.
    for quarter in range(4):
      part = [n for n in numbers if n // 2_500 == quarter]
      self.assertBetween(len(part), 180, 320)
    other, _ = sampling.sample_texts(texts, 6_000, seed=1)
    self.assertNotEqual(sample, other)

  def test_one_giant_document_gives_a_part_of_itself(self):
    rng = random.Random(0)
    text = " ".join(str(rng.random()) for _ in range(50_000))
    sample, _ = sampling.sample_texts([text], 10_000, seed=0)
    self.assertGreater(sum(map(len, sample)), 8_000)

  def test_manifest_says_how_much_was_seen(self):
    tokenizer = tokenizers.train_tokenizer(
      "wordpiece", ["word " * 100] * 50, vocab_size=60, max_bytes=4_000
    )
    self.assertEqual(tokenizer.training["bytes_read"], 25_000)
    self.assertEqual(tokenizer.training["documents_read"], 50)
    self.assertBetween(tokenizer.training["bytes_used"], 3_000, 4_000)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ("wordpeice", {}, "Did you mean 'wordpiece'"),
    ("wordpiece", {}, "vocab_size is required"),
    ("unigram", {"vocab_size": 50, "min_frequency": 2}, "min_frequency is not"),
    ("bytes", {"vocab_size": 50}, "vocab_size is not an option"),
    ("wordpiece", {"vocab_size": 9}, "vocab_size=9 is too small"),
    ("unigram", {"vocab_size": 9}, "vocab_size=9 does not suit"),
    ("bpe", {"vocab_size": 99, "max_bytes": 0}, "max_bytes=0 must be"),
    ("bytes", {"pad_to_multiple": 0}, "pad_to_multiple=0 must be"),
    ("bytes", {"specials": {"pad": "PAD"}}, "'PAD' could be a word"),
    ("bytes", {"specials": {"bos": "[B]"}}, "takes pad, unk, cls"),
    ("bytes", {"specials": {"pad": "[UNK]"}}, "repeats a name"),
  )
  def test_bad_options_are_named(self, kind, options, message):
    with self.assertRaisesRegex(ValueError, message):
      tokenizers.train_tokenizer(kind, _TEXTS, **options)

  @parameterized.parameters(([],), (["", " \n"],))
  def test_no_text_is_refused(self, texts):
    with self.assertRaisesRegex(ValueError, "No text to train"):
      tokenizers.train_tokenizer("wordpiece", texts, vocab_size=99)


class StoredTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.folder = self.root / "vocab"
    tokenizers.train_tokenizer("wordpiece", _TEXTS, vocab_size=60).save(
      self.folder
    )

  def _edit(self, **fields):
    path = self.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  def test_a_missing_file_is_named(self):
    (self.folder / "vocab.txt").unlink()
    with self.assertRaisesRegex(ValueError, "vocab.txt is missing"):
      tokenizers.load_tokenizer(self.folder)

  def test_a_changed_file_is_named(self):
    with open(self.folder / "vocab.txt", "a") as file:
      file.write("more\n")
    with self.assertRaisesRegex(ValueError, "vocab.txt is not the file that"):
      tokenizers.load_tokenizer(self.folder)

  @parameterized.parameters(
    ("{", "manifest.json is damaged"),
    ("[]", "not a JSON object"),
    ("{}", "manifest.json has no 'format'"),
  )
  def test_a_damaged_manifest_is_named(self, content, message):
    (self.folder / "manifest.json").write_text(content)
    with self.assertRaisesRegex(ValueError, message):
      tokenizers.load_tokenizer(self.folder)

  @parameterized.parameters(
    ({"format": 99}, "format=99"),
    ({"backend": "word"}, "Did you mean 'words'"),
    ({"vocab_size": 7}, "vocab_size=7 contradicts"),
    ({"options": {"upper": 1}}, "does not describe a words tokenizer"),
  )
  def test_an_edited_manifest_is_refused(self, fields, message):
    self._edit(**fields)
    with self.assertRaisesRegex(ValueError, message):
      tokenizers.load_tokenizer(self.folder)

  def test_foreign_folders_are_not_overwritten(self):
    tokenizer = tokenizers.load_tokenizer(self.folder)
    (self.root / "model").mkdir()
    (self.root / "model" / "weights").write_text("precious")
    with self.assertRaisesRegex(ValueError, "holds other files"):
      tokenizer.save(self.root / "model")

  def test_unreadable_published_folders_are_named(self):
    empty = self.root / "empty"
    empty.mkdir()
    with self.assertRaisesRegex(ValueError, "holds no tokenizer; it needs"):
      tokenizers.load_tokenizer(empty)
    with self.assertRaisesRegex(ValueError, "is not a folder"):
      tokenizers.load_tokenizer(self.root / "nowhere")
    for name, message in (
      ("spiece.model", "not a SentencePiece model"),
      ("vocab.json", "merges.txt is missing"),
      ("vocab.txt", "has no pad token"),
      ("tokenizer.json", "not a tokenizer that"),
    ):
      (empty / name).write_text("x")
      with self.assertRaisesRegex(ValueError, message):
        tokenizers.load_tokenizer(empty)


class BuildTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.cache = self.enterContext(tempfile.TemporaryDirectory())
    self.reads = 0

  def _texts(self):
    self.reads += 1
    return iter(_TEXTS)

  def _build(self, source="s1", **options):
    if "source_" in options:
      options["source"] = options.pop("source_")
    spec = dict(name="train", kind="wordpiece", vocab_size=60) | options
    return tokenizers.build_tokenizer(spec, self._texts, self.cache, source)

  def test_a_second_run_reads_instead_of_training(self):
    first, second = self._build(), self._build()
    self.assertEqual(self.reads, 1)
    self.assertEqual(first.fingerprint(), second.fingerprint())
    self._build(min_frequency=2)  # the default, spelled out
    self.assertEqual(self.reads, 1)

  def test_other_options_or_sources_train_again(self):
    self._build()
    self._build(source="s2")
    self._build(lowercase=False)
    self._build(specials=dict(mask="<mask>"))
    self.assertEqual(self.reads, 4)

  def test_a_source_of_its_own_replaces_the_datas(self):
    path = pathlib.Path(self.create_tempdir()) / "a.txt"
    path.write_text("zebra zebra zebras quagga quagga")
    source = dict(name="text_files", paths=str(path))
    own = self._build(source_=source)
    self.assertEqual(self.reads, 0)
    self.assertIn("zebra", own.vocabulary)
    # The data no longer matter, the vocabulary's source does.
    again = self._build(source="s2", source_=source)
    self.assertEqual(own.fingerprint(), again.fingerprint())
    path.write_text("gnu gnu gnu gnus okapi okapi")
    self.assertNotIn("zebra", self._build(source_=source).vocabulary)
    with self.assertRaisesRegex(ValueError, "data.tokenizer.source.name='tex'"):
      self._build(source_=dict(name="tex"))

  def test_a_damaged_folder_is_made_again_and_kept_aside(self):
    first = self._build()
    (folder,) = pathlib.Path(self.cache).iterdir()
    (folder / "vocab.txt").write_text("broken")
    with self.assertLogs(level="WARNING") as logs:
      second = self._build()
    self.assertIn("vocab.txt is not the file", logs.output[0])
    self.assertEqual(first.fingerprint(), second.fingerprint())
    self.assertTrue(folder.with_name(folder.name + ".damaged-0").exists())

  def test_rows_that_read_files(self):
    trained = self._build()
    (folder,) = pathlib.Path(self.cache).iterdir()
    for spec in (
      dict(name="folder", path=str(folder)),
      dict(name="vocab_file", path=str(folder / "vocab.txt")),
    ):
      built = tokenizers.build_tokenizer(spec, self._texts, self.cache, "s")
      self.assertEqual(built.vocabulary, trained.vocabulary)
    self.assertEqual(self.reads, 1)
    shutil.rmtree(folder)
    with self.assertRaisesRegex(ValueError, "path=.*is not a file"):
      tokenizers.build_tokenizer(spec, self._texts, self.cache, "s")

  def test_extended_row_keeps_old_ids_and_adds_in_order(self):
    trained = self._build()
    of = dict(name="train", kind="wordpiece", vocab_size=60)

    def extended(**options):
      return tokenizers.build_tokenizer(
        dict(name="extended", of=of, **options), self._texts, self.cache, "s1"
      )

    size = trained.vocab_size
    padded = extended(pad_to_multiple=64)
    self.assertEqual(padded.vocab_size, 64)
    self.assertEqual(padded.vocabulary[:size], trained.vocabulary)
    both = extended(append=["zzyx", "##qq"], pad_to_multiple=64)
    self.assertEqual(both.vocabulary[size : size + 2], ("zzyx", "##qq"))
    self.assertEqual(both.encode("zzyx").tolist(), [size])
    self.assertEqual(both.vocab_size, 64)
    self.assertEqual(self.reads, 1)  # the one below is trained once
    again = tokenizers.reuse_unused(both, ["covid"])
    self.assertEqual(again.piece_id("covid"), size + 2)
    with self.assertRaisesRegex(ValueError, "1 new pieces do not fit into the"):
      extended(reuse=["covid"])
    with self.assertRaisesRegex(ValueError, "data.tokenizer.of.name='trian'"):
      tokenizers.build_tokenizer(
        dict(name="extended", of=dict(name="trian")), self._texts,
        self.cache, "s1",
      )  # fmt: skip

  def test_unknown_rows_and_options_are_named(self):
    with self.assertRaisesRegex(ValueError, "data.tokenizer.name='trian'"):
      self._build(name="trian")
    with self.assertRaisesRegex(ValueError, "data.tokenizer.vocabsize is not"):
      self._build(vocabsize=3)


if __name__ == "__main__":
  absltest.main()
