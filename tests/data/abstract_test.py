"""A config alone tells what the batches of its data will look like."""

import pathlib

from absl.testing import absltest, parameterized

from bertjax import registry
from bertjax.data.abstract import abstract_text, tokenizer_size
from bertjax.data.text import TextData
from tests import tiny


class AbstractTextTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("pairs", dict(name="nsp"), dict(rate=0.15, max_masked=7)),
    ("packed", dict(name="packed"), dict(rate=0.2)),
    ("unmasked", dict(name="single_segment"), None),
  )
  def test_equals_what_the_data_gives(self, instances, masking):
    folder = pathlib.Path(self.create_tempdir())
    tiny.write_corpus(folder)
    spec = tiny.config(folder)["data"]
    spec = spec | dict(instances=instances, masking=masking)
    real = registry.call(TextData, spec, "data", seed=0, cache_dir=folder)
    abstract = abstract_text(spec)
    self.assertEqual(
      abstract.dataset().batch_spec(6), real.dataset().batch_spec(6)
    )
    self.assertEqual(
      abstract.dataset().tokens_per_batch(6),
      real.dataset().tokens_per_batch(6),
    )
    self.assertEqual(abstract.vocab_size, real.tokenizer.vocab_size)
    self.assertEqual(
      (abstract.batch_size, abstract.seq_len), (real.batch_size, real.seq_len)
    )

  def test_a_missing_field_is_named(self):
    with self.assertRaisesRegex(ValueError, "data.seq_len is required"):
      abstract_text(dict(tokenizer={}, batch_size=2, instances={}))


class TokenizerSizeTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(name="train", kind="wordpiece", vocab_size=1000), 1000),
    (dict(name="train", kind="bpe", vocab_size=1000, pad_to_multiple=64), 1024),
    (dict(name="train", kind="bytes"), 261),  # and five special tokens
    (
      dict(
        name="extended",
        of=dict(name="train", kind="wordpiece", vocab_size=1000),
        append=["a", "b"],
        pad_to_multiple=8,
      ),
      1008,
    ),
  )
  def test_of_a_vocabulary_not_yet_trained(self, spec, size):
    self.assertEqual(tokenizer_size(spec), size)

  def test_of_a_file(self):
    path = pathlib.Path(self.create_tempdir()) / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    path.write_text("\n".join(words))
    spec = dict(name="vocab_file", path=str(path))
    self.assertEqual(tokenizer_size(spec), 7)

  def test_a_file_that_is_not_here_asks_for_the_size(self):
    spec = dict(name="vocab_file", path="nowhere/vocab.txt")
    with self.assertRaisesRegex(ValueError, "'nowhere.*--vocab_size"):
      tokenizer_size(spec)


if __name__ == "__main__":
  absltest.main()
