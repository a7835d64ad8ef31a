"""A config alone tells what the batches of its data will look like."""

import pathlib

from absl.testing import absltest, parameterized

from bertjax import registry
from bertjax.data.abstract import abstract_text, tokenizer_size
from bertjax.data.text import TextData
from bertjax.tasks.abstract import abstract_task
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
    spec = dict(source={}, tokenizer={}, batch_size=2, instances={})
    with self.assertRaisesRegex(ValueError, "data.seq_len is required"):
      abstract_text(spec)

  @parameterized.parameters(
    (dict(seq_lenn=1), "data.seq_lenn is not an option.*'seq_len'"),
    (dict(splitter="lins"), "data.splitter='lins' is unknown.*'lines'"),
    (dict(seq_len=2), "data.seq_len=2 is too short for"),
    (dict(seed=1), "data.seed is set by the library"),
  )
  def test_what_training_refuses_is_refused(self, changes, message):
    spec = tiny.config(pathlib.Path("nowhere"))["data"] | changes
    with self.assertRaisesRegex(ValueError, message):
      abstract_text(spec, vocab_size=96)

  def test_a_tokenizer_that_is_left_to_another_folder_asks_for_the_size(self):
    spec = tiny.config(pathlib.Path("nowhere"))["data"]
    del spec["tokenizer"]
    self.assertEqual(abstract_text(spec, vocab_size=96).vocab_size, 96)
    task = dict(
      task=dict(name="regression", source=dict(name="jsonl", paths="a")),
      seq_len=16,
      batch_size=2,
    )
    for make, given in ((abstract_text, spec), (abstract_task, task)):
      with self.assertRaisesRegex(
        ValueError, r"\Adata.tokenizer is not given, .*--vocab_size.*\Z"
      ):
        make(given)

  @parameterized.parameters(
    (dict(pair_stile="bert"), "data.pair_stile is not an option"),
    (dict(seq_len=4), "data.seq_len=4 must be at least 8"),
  )
  def test_so_it_is_of_a_task(self, changes, message):
    task = dict(name="regression", source=dict(name="jsonl", paths="a"))
    spec = dict(task=task, seq_len=16, batch_size=2)
    self.assertEqual(abstract_task(spec, vocab_size=96).seq_len, 16)
    with self.assertRaisesRegex(ValueError, message):
      abstract_task(spec | changes, vocab_size=96)


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
