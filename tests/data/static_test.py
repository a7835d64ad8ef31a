"""Ready-made TFRecords train through the same loop."""

import pathlib
import tempfile
import unittest

import numpy as np
import pytest
from absl.testing import absltest

from bertjax import train
from bertjax.data import bert_instances
from bertjax.data.static import StaticData
from bertjax.data.tokenizers import train_tokenizer
from tests import tiny

try:
  import tensorflow  # noqa: F401
except ImportError:
  raise unittest.SkipTest("needs the extra [tfds]") from None

pytestmark = pytest.mark.usefixtures("unreported")


class StaticDataTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    corpus = tiny.write_corpus(cls.root)
    tokenizer = train_tokenizer(
      "wordpiece", [corpus.read_text()], vocab_size=96
    )
    tokenizer.save(cls.root / "vocab")
    documents = bert_instances.read_documents([str(corpus)], tokenizer)
    generator = bert_instances.Generator(
      tokenizer, max_seq_length=32, max_predictions_per_seq=5, dupe_factor=2
    )
    bert_instances.write_tfrecord(
      generator(documents),
      str(cls.root / "rows.tfrecord"),
      max_seq_length=32,
      max_predictions_per_seq=5,
    )

  def _spec(self, **changes):
    spec = dict(
      name="static",
      files=dict(train=str(self.root / "rows.tfrecord")),
      tokenizer=dict(name="folder", path=str(self.root / "vocab")),
      batch_size=8,
    )
    return spec | changes

  def test_a_run_reads_them(self):
    config = tiny.config(
      self.root, stop=dict(steps=3), evals=dict(heldout=dict(split="train"))
    )
    config["data"] = self._spec()
    result = train.train(config, self.root / "run")
    self.assertEqual(result.step, 3)
    self.assertTrue(np.isfinite(result.metrics["nsp_loss"]))
    self.assertGreater(result.metrics["heldout/unigram_accuracy"], 0.05)

  def test_guesses_are_of_all_that_the_original_masks(self):
    tokenizer = train_tokenizer("wordpiece", ["a b c"], vocab_size=12)
    unknown, letter = tokenizer.unk_id, tokenizer.encode("a")[0]
    generator = bert_instances.Generator(
      tokenizer, max_seq_length=16, max_predictions_per_seq=3
    )
    path = str(self.root / "unknown.tfrecord")
    documents = [[[unknown, letter, unknown]] * 6] * 2
    bert_instances.write_tfrecord(generator(documents), path, 16, 3)
    spec = self._spec(files=dict(train=path), tokenizer=tokenizer)
    del spec["name"]
    data = StaticData(**spec, seed=0, cache_dir=self.root)
    counts = data.token_counts()
    np.testing.assert_array_equal(
      np.flatnonzero(counts), sorted([unknown, letter])
    )
    (batch,) = data.dataset().evaluation_batches(64)
    masked = batch["labels"][batch["labels"] >= 0]
    self.assertAlmostEqual(
      data.baseline("train")["unigram_accuracy"], (masked == unknown).mean()
    )

  def test_ids_beyond_the_vocabulary_are_refused(self):
    small = train_tokenizer("wordpiece", ["a b c"], vocab_size=12)
    small.save(self.root / "small")
    spec = self._spec(
      tokenizer=dict(name="folder", path=str(self.root / "small"))
    )
    del spec["name"]
    with self.assertRaisesRegex(ValueError, "data.files.train holds id"):
      StaticData(**spec, seed=0, cache_dir=self.root)

  def test_files_that_are_not_there_are_named_by_their_field(self):
    spec = self._spec(files=dict(train=f"{self.root}/nope*"))
    del spec["name"]
    with self.assertRaisesRegex(ValueError, r"data.files.train=\['.*nope\*'\]"):
      StaticData(**spec, seed=0, cache_dir=self.root)

  def test_an_unknown_split_is_refused(self):
    spec = self._spec()
    del spec["name"]
    data = StaticData(**spec, seed=0, cache_dir=self.root)
    with self.assertRaisesRegex(ValueError, "data.files='test' is unknown"):
      data.dataset("test")


if __name__ == "__main__":
  absltest.main()
