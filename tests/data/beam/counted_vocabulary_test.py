import pathlib
import random
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax.data import tokenizers
from bertjax.data.beam import vocabulary
from tests.data import cache_test


def texts():
  """Three-letter words over nine letters: nearly every count is tied."""
  rng = random.Random(0)
  words = ["".join(rng.choices("abcdefgh\u00c9", k=3)) for _ in range(2000)]
  plain = [" ".join(words[i : i + 40]) for i in range(0, 2000, 40)]
  # Byte words hold their spaces; user tokens are cut out; cuts at 64 KiB.
  return [*plain, "two  spaces\n\tand don't <x>abc", "long " * 20_000, "", " "]


def options(kind):
  return dict(
    vocab_size=420 if kind == "byte_bpe" else 150,
    user_tokens=["<x>"],
    pad_to_multiple=8,
  )


class CountedVocabularyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.source = cache_test.FakeSource(texts())

  def train(self, kind, **options):
    return vocabulary.train_vocabulary(
      kind, self.source, "train", str(self.folder), readers=3, **options
    )

  @parameterized.parameters("wordpiece", "bpe", "byte_bpe")
  def test_equals_training_in_process(self, kind):
    with (
      mock.patch.object(vocabulary, "_BLOCK", 7),
      mock.patch.object(vocabulary, "_WORDS", 100),
    ):
      counted = self.train(kind, **options(kind))
    sampled = tokenizers.train_tokenizer(kind, texts(), **options(kind))
    self.assertEqual(counted.files(), sampled.files())
    self.assertGreater(counted.vocab_size, 140)
    for fact in ("documents_read", "bytes_read"):
      self.assertEqual(counted.training[fact], sampled.training[fact])

  @parameterized.parameters("unigram", "bytes")
  def test_refuses_kinds_that_need_more_than_counts(self, kind):
    size = {} if kind == "bytes" else {"vocab_size": 300}
    with self.assertRaisesRegex(ValueError, f"'{kind}' cannot.*bpe, byte_bpe"):
      self.train(kind, **size)

  def test_refuses_options_of_a_sample_and_empty_text(self):
    with self.assertRaisesRegex(ValueError, "max_bytes=1000 is about a sample"):
      self.train("bpe", vocab_size=300, max_bytes=1000)
    self.source = cache_test.FakeSource([" ", ""])
    with self.assertRaisesRegex(ValueError, "No word to train"):
      self.train("bpe", vocab_size=300)


if __name__ == "__main__":
  absltest.main()
