"""Figures of tokenizers that can be counted by hand."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest, parameterized

from bertjax.analysis import __main__ as command
from bertjax.analysis import fertility
from bertjax.data.tokenizers import BERT_SPECIALS, train_tokenizer
from bertjax.data.tokenizers.words import WordTokenizer

_PIECES = (*BERT_SPECIALS.names(), "the", "cat", "play", "##ing", "##s")
_TEXTS = ["the cat playing", "the  cats cats \n xyz"]


class FertilityTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tokenizer = WordTokenizer(_PIECES)

  def test_figures_are_those_counted_by_hand(self):
    found = fertility(self.tokenizer, _TEXTS)
    # the 1, cat 1, play+ing 2, the 1, cat+s 2, cat+s 2, xyz 1 ([UNK])
    self.assertEqual(found["words"], 7)
    self.assertAlmostEqual(found["fertility"], 10 / 7)
    self.assertAlmostEqual(found["continued_share"], 3 / 7)
    self.assertAlmostEqual(found["unknown_share"], 1 / 7)
    self.assertAlmostEqual(found["characters_per_piece"], 27 / 10)

  def test_bytes_take_one_piece_a_byte_and_one_for_the_space(self):
    tokenizer = train_tokenizer("bytes", [])
    found = fertility(tokenizer, ["ab é"])
    self.assertEqual(found["fertility"], (3 + 3) / 2)

  def test_texts_go_through_the_models_functions(self):
    found = fertility(self.tokenizer, ["THE cat"], str.lower)
    self.assertEqual(found, fertility(self.tokenizer, ["the cat"]))

  def test_no_words_are_refused(self):
    with self.assertRaisesRegex(ValueError, "no words in these texts"):
      fertility(self.tokenizer, [" \n"])

  def test_the_command_measures_a_folder(self):
    root = pathlib.Path(self.create_tempdir())
    self.tokenizer.save(root / "vocab")
    (root / "a.txt").write_text("\n\n".join(_TEXTS[:1]))
    source = dict(name="text_files", paths=str(root / "a.txt"))
    found = command.measure(
      "fertility", str(root / "vocab"), source, split="train"
    )
    self.assertEqual(found, fertility(self.tokenizer, _TEXTS[:1]))
    done = subprocess.run(
      [sys.executable, "-m", "bertjax.analysis", "fertility",
       f"--model={root / 'vocab'}", f"--source={json.dumps(source)}",
       "--split=train"],
      cwd=pathlib.Path(__file__).parents[1],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn("fertility 1.33333", done.stdout)
    with self.assertRaisesRegex(ValueError, "analysis='fertlity'.*fertility"):
      command.measure("fertlity", str(root / "vocab"), source)

  def test_of_a_run_with_stages_the_last_one_counts(self):
    root = pathlib.Path(self.create_tempdir())
    last = root / "run" / "phase2"
    (last / "checkpoints").mkdir(parents=True)
    self.tokenizer.save(last / "tokenizer")
    config = dict(data=dict(preprocess=["lowercase"]))
    (last / "config.json").write_text(json.dumps(config))
    (root / "run" / "last").symlink_to("phase2")
    (root / "a.txt").write_text("THE cat")
    source = dict(name="text_files", paths=str(root / "a.txt"))
    found = command.measure("fertility", str(root / "run"), source)
    self.assertEqual(found, fertility(self.tokenizer, ["the cat"]))

  @parameterized.parameters(
    ("config.json", [], "the cat"),  # a tokenizer without weights
    ("bert_config.json", [dict(name="replace", pattern="the", by="cats")],
     "cats cat"),
  )  # fmt: skip
  def test_a_published_folder_says_what_its_texts_go_through(
    self, config, functions, read
  ):
    root = pathlib.Path(self.create_tempdir())
    self.tokenizer.save(root / "model")
    for name, content in (
      (config, {}),
      ("preprocess.json", {"preprocess": functions}),
    ):
      (root / "model" / name).write_text(json.dumps(content))
    (root / "a.txt").write_text("the cat")
    source = dict(name="text_files", paths=str(root / "a.txt"))
    found = command.measure("fertility", str(root / "model"), source)
    self.assertEqual(found, fertility(self.tokenizer, [read]))


if __name__ == "__main__":
  absltest.main()
