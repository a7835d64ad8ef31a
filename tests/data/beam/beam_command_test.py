import json
import pathlib
import tempfile
import types
from unittest import mock

from absl.testing import absltest

from bertjax import config, experiment
from bertjax.data import cache_shards
from bertjax.data.beam import __main__ as command
from bertjax.data.beam.pipeline import pipeline_options
from tests.data import cache_test


class BeamCommandTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    written = cache_test.texts(12)
    for name, part in (("a", written[:5]), ("b", written[5:])):
      lines = (json.dumps({"text": text}) + "\n" for text in part)
      (self.folder / f"{name}.jsonl").write_text("".join(lines))
    self.words = sum(len(text.split()) for text in written)

  def settings(self, tokenizer):
    return config.settings(
      dict(
        data=dict(
          source=dict(name="jsonl", paths=dict(mine=f"{self.folder}/*.jsonl")),
          train_split="mine",
          tokenizer=tokenizer,
          preprocess=["unicode_nfkc"],
          seq_len=16,
          batch_size=2,
          instances=dict(name="packed"),
        ),
        optim=dict(name="adamw"),
        stop=dict(steps=1),
        cache_dir=f"{self.folder}/cache",
      )
    )

  def run_command(self, name, settings, **options):
    options = {
      "split": None,
      "readers": 2,
      "output": None,
      "shared": None,
      "threshold": 0.8,
      **options,
    }
    command.COMMANDS[name](
      settings, types.SimpleNamespace(**options), pipeline_options()
    )

  def test_vocabulary_then_cache_then_statistics(self):
    train = dict(name="train", kind="wordpiece", vocab_size=80)
    vocabulary = str(self.folder / "vocabulary")
    self.run_command("vocabulary", self.settings(train), output=vocabulary)
    settings = self.settings(dict(name="folder", path=vocabulary))
    self.run_command("cache", settings)
    output = self.folder / "statistics.json"
    self.run_command("statistics", settings, output=str(output))
    data = experiment.build_data(
      settings.data, seed=5, cache_dir=settings.cache_path
    )
    with mock.patch.object(cache_shards.Job, "write") as write:
      cache = data.cache("mine")  # what training opens
    write.assert_not_called()
    found = json.loads(output.read_text())
    self.assertEqual(found["tokens"], cache.num_tokens)
    self.assertEqual((found["split"], found["documents"]), ("mine", 12))
    self.assertGreater(found["tokens"], self.words)
    in_process = experiment.build_data(
      self.settings(train).data, seed=5, cache_dir=settings.cache_path
    )
    self.assertEqual(in_process.tokenizer.vocabulary, data.tokenizer.vocabulary)

  def test_vocabulary_says_what_it_needs(self):
    settings = self.settings(dict(name="folder", path="there"))
    with self.assertRaisesRegex(ValueError, "--output is required"):
      self.run_command("vocabulary", settings)
    with self.assertRaisesRegex(ValueError, "must be dict.name='train'"):
      self.run_command("vocabulary", settings, output="folder")


if __name__ == "__main__":
  absltest.main()
