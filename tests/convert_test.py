"""Conversions are exact, checked, and need no torch."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import sentencepiece
from absl.testing import absltest, parameterized

from bertjax import convert, interop, loading
from bertjax.data.tokenizers import Specials, train_tokenizer
from bertjax.data.tokenizers.unigram import SentencePieceTokenizer
from bertjax.interop import published, tensors
from tests.interop import toy

REPOSITORY = pathlib.Path(convert.__file__).parent.parent

# Runs the command line with the peers made impossible to import.
WITHOUT_PEERS = """
import sys

class Refuse:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("torch", "transformers"):
      raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
import jax
jax.config.update("jax_platforms", "cpu")
from absl import app
from bertjax import convert
convert._define_flags()
app.run(convert.main)
"""


class ConvertTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def source(self, name="bert", heads=("mlm_head",), **options):
    spec = toy.spec(name, **options)
    tokenizer = toy.word_tokenizer() if name == "bert" else toy.byte_tokenizer()
    interop.write_huggingface(
      self.root / "source", spec, toy.params(spec, heads), tokenizer
    )
    return self.root / "source"

  @parameterized.parameters(
    ("bert", ("mlm_head", "pooler", "pair_head")),
    ("bert", ("pooler",)),
    ("roberta", ("mlm_head",)),
  )
  def test_there_and_back_is_the_same_file(self, name, heads):
    source = self.source(name, heads)
    done = convert.convert(source, self.root / "run", format="bertjax")
    self.assertEqual(done.heads, tuple(sorted(heads)))
    self.assertEqual(
      done.num_parameters, toy.count(toy.params(toy.spec(name), heads))
    )
    self.assertLen(done.logits, 4)
    back = self.root / "back"
    convert.convert(self.root / "run", back, format="huggingface")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
      self.assertEqual((source / file).read_bytes(), (back / file).read_bytes())

  def test_an_unscanned_run_stays_unscanned_and_exports_the_same(self):
    source = self.source()
    model = loading.load_model(source, scan=False)
    convert.write_workdir(model, self.root / "run", "float32")
    self.assertFalse(loading.load_model(self.root / "run").spec["scan"])
    convert.convert(self.root / "run", self.root / "back", format="huggingface")
    self.assertEqual(
      (source / "model.safetensors").read_bytes(),
      (self.root / "back" / "model.safetensors").read_bytes(),
    )

  @parameterized.parameters(0o022, 0o007)
  def test_weights_are_for_whom_the_umask_lets_read_them(self, umask):
    self.addCleanup(os.umask, os.umask(umask))
    path = self.root / "model.safetensors"
    tensors.write_safetensors({"x": np.ones(2, np.float32)}, path)
    self.assertEqual(path.stat().st_mode & 0o777, 0o666 & ~umask)

  def test_sixteen_bits_halve_the_file(self):
    source = self.source()
    convert.convert(
      source, self.root / "half", format="huggingface", dtype="bfloat16"
    )
    sizes = [
      (folder / "model.safetensors").stat().st_size
      for folder in (source, self.root / "half")
    ]
    self.assertLess(sizes[1], 0.7 * sizes[0])  # the header stays
    with self.assertRaisesRegex(ValueError, "a workdir holds float32"):
      convert.convert(
        source, self.root / "run", format="bertjax", dtype="bfloat16"
      )

  def test_a_damaged_write_is_never_reported_as_success(self):
    source = self.source()
    write = published.tensors.write_safetensors

    def careless(tensors, path):
      key = "bert.embeddings.LayerNorm.bias"
      write(tensors | {key: np.nextafter(tensors[key], np.float32(9))}, path)

    with (
      mock.patch.object(published.tensors, "write_safetensors", careless),
      self.assertRaisesRegex(ValueError, "differently: .*embeddings/norm/bias"),
    ):
      convert.convert(source, self.root / "out", format="huggingface")

  def test_a_configuration_that_says_something_else_is_noticed(self):
    source = self.source()
    config_from_spec = published.model_spec.config_from_spec

    def careless(*args):
      return config_from_spec(*args) | {"layer_norm_eps": 0.1}

    with (
      mock.patch.object(published.model_spec, "config_from_spec", careless),
      self.assertRaisesRegex(ValueError, "hidden differ by up to"),
    ):
      convert.convert(source, self.root / "out", format="huggingface")

  def test_bad_requests_are_refused_before_anything_is_written(self):
    source = self.source()
    with self.assertRaisesRegex(ValueError, "format='onnx' is unknown"):
      convert.convert(source, self.root / "out", format="onnx")
    with self.assertRaisesRegex(ValueError, "source is not empty"):
      convert.convert(source, source, format="huggingface")
    self.assertFalse((self.root / "out").exists())

  @parameterized.parameters("unigram", "bytes")
  def test_tokenizers_that_the_peers_lack_come_back_with_their_ids(self, kind):
    texts = ["The quick brown fox, 12.5% café.", "don't 東京 jump"] * 9
    options = {"vocab_size": 70} if kind == "unigram" else {}
    tokenizer = train_tokenizer(kind, texts, **options)
    spec = toy.spec(vocab_size=tokenizer.vocab_size)
    params = toy.params(spec, ("mlm_head",))
    interop.write_huggingface(self.root / "a", spec, params, tokenizer)
    convert.convert(self.root / "a", self.root / "b", format="bertjax")
    convert.convert(self.root / "b", self.root / "c", format="huggingface")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(self.root / "c"))
    for text in texts[:2]:
      ids = tokenizer.encode(text).tolist()
      self.assertEqual(
        theirs(text)["input_ids"], [tokenizer.cls_id, *ids, tokenizer.sep_id]
      )

  def test_a_sentencepiece_bpe_has_no_published_form(self):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["the quick brown fox"] * 9), model_writer=model,
      model_type="bpe", vocab_size=30, pad_id=3, minloglevel=2,
    )  # fmt: skip
    specials = Specials("<pad>", "<unk>", "<s>", "</s>", "[MASK]")
    tokenizer = SentencePieceTokenizer(
      model.getvalue(), specials, tail=["[MASK]"]
    )
    spec = toy.spec(vocab_size=tokenizer.vocab_size)
    with self.assertRaisesRegex(
      ValueError, "no tokenizer.json.*not of type unigram.*ship spiece.model"
    ):
      interop.write_huggingface(
        self.root / "out", spec, toy.params(spec, ("mlm_head",)), tokenizer
      )
    self.assertFalse((self.root / "out").exists())

  def test_the_command_needs_neither_torch_nor_transformers(self):
    source = self.source()
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for origin, target, layout in (
      (source, self.root / "run", "bertjax"),
      (self.root / "run", self.root / "back", "huggingface"),
    ):
      done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEERS, f"--from={origin}",
         f"--to={target}", f"--format={layout}"],
        capture_output=True, text=True, env=env,
      )  # fmt: skip
      self.assertEqual(done.returncode, 0, done.stderr)
      self.assertIn("equal bit for bit", done.stdout)
      count = toy.count(toy.params(toy.spec(), ("mlm_head",)))
      self.assertIn(f"{count:,} parameters, heads: mlm_head", done.stdout)
    self.assertTrue((self.root / "run" / "config.json").exists())
    config = json.loads((self.root / "back" / "config.json").read_text())
    self.assertEqual(config["architectures"], ["BertForMaskedLM"])

  def test_the_command_ends_with_one_line_on_a_mistake(self):
    done = subprocess.run(
      [sys.executable, "-c", WITHOUT_PEERS, f"--from={self.root}/no",
       f"--to={self.root}/out", "--format=bertjax"],
      capture_output=True, text=True,
      env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, r"Error: .*/no is not a folder")
    self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
  absltest.main()
