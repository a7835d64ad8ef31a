"""Batching changes no guess and no vector; mistakes are explained."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import interop, loading, predict
from bertjax.data.sources import text_function
from bertjax.data.tokenizers import train_tokenizer
from bertjax.predict.__main__ import TASKS
from bertjax.predict.rows import rows_of
from tests.interop import toy

REPOSITORY = pathlib.Path(predict.__file__).parents[2]
TEXTS = (
  "the cat sat on the [MASK].",
  "[MASK] dog!",
  "a [MASK] sat on [MASK] mat, the dog sat on the cat, [MASK] cat sat",
  "the [MASK]" + " the dog sat" * 12,
)
PLAIN = ("a mat", "the cats sat on the mat", "dog" + " cat" * 40, "", "!")


class PredictTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    root = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.folder = root / "model"
    # Two rows more than pieces, as after padding a vocabulary.
    spec = toy.spec(max_positions=60, vocab_size=20)
    params = jax.tree.map(lambda x: 0.3 * x, toy.params(spec, ("mlm_head",)))
    interop.write_huggingface(cls.folder, spec, params, toy.word_tokenizer())
    cls.model = loading.load_model(cls.folder)
    cls.tokenizer = cls.model.tokenizer

  @classmethod
  @functools.cache
  def hidden(cls):
    """Hidden states of every plain text alone, without any padding."""
    found = []
    for text in PLAIN:
      ids = cls.tokenizer.encode(text)
      row = [cls.tokenizer.cls_id, *ids, cls.tokenizer.sep_id]
      batch = {"tokens": jnp.array([row], np.int32)}
      variables = {"params": cls.model.params}
      found.append(
        cls.model.objective.apply(variables, batch, method="encode")[0]
      )
    return found

  def test_probabilities_are_the_softmax_at_the_mask(self):
    [[guesses]] = predict.fill_mask(self.model, TEXTS[:1], top_k=18)
    ids = self.tokenizer.encode(TEXTS[0], parse_special=True)
    row = [self.tokenizer.cls_id, *ids, self.tokenizer.sep_id]
    variables = {"params": self.model.params}
    hidden = self.model.objective.apply(
      variables, {"tokens": jnp.array([row], np.int32)}, method="encode"
    )
    logits = self.model.objective.apply(variables, hidden, method="mlm_logits")
    place = row.index(self.tokenizer.mask_id)
    want = np.asarray(jax.nn.softmax(logits[0, place, :18]))
    self.assertAlmostEqual(sum(g.probability for g in guesses), 1, places=5)
    for guess in guesses:
      self.assertAlmostEqual(guess.probability, want[guess.token], places=5)
      self.assertEqual(guess.piece, self.tokenizer.pieces([guess.token])[0])
    chances = [g.probability for g in guesses]
    self.assertEqual(chances, sorted(chances, reverse=True))

  @parameterized.parameters(1, 3, 32)
  def test_a_batch_gives_what_each_text_gives_alone(self, batch_size):
    together = predict.fill_mask(
      self.model, TEXTS, top_k=3, batch_size=batch_size
    )
    self.assertEqual([len(masks) for masks in together], [1, 1, 3, 1])
    for text, masks in zip(TEXTS, together):
      [alone] = predict.fill_mask(self.model, [text], top_k=3)
      for a, b in zip(masks, alone):
        self.assertEqual([g.token for g in a], [g.token for g in b])
        np.testing.assert_allclose(
          [g.probability for g in a],
          [g.probability for g in b],
          atol=1e-5,  # float32 sums over rows padded to other lengths
        )

  def test_the_filled_text_holds_all_guesses_of_its_rank(self):
    [masks] = predict.fill_mask(self.model, [TEXTS[2]], top_k=2)
    for rank in range(2):
      texts = {mask[rank].text for mask in masks}
      self.assertLen(texts, 1)
      ids = self.tokenizer.encode(TEXTS[2], parse_special=True)
      ids[ids == self.tokenizer.mask_id] = [m[rank].token for m in masks]
      self.assertEqual(texts.pop(), self.tokenizer.decode(ids))

  @parameterized.parameters("THE [MASK]  sat on\n a [MASK]", "CAT[MASK]")
  def test_a_mask_is_no_text_to_preprocess(self, text):
    names = ("lowercase", "collapse_whitespace", "strip_html")
    model = dataclasses.replace(self.model, preprocess=names)
    found = predict.fill_mask(model, [text])
    clean = text.lower().replace("[mask]", "[MASK]")
    self.assertEqual(found, predict.fill_mask(self.model, [clean]))

  def test_spaces_beside_a_mask_are_not_cleaned_away(self):
    tokenizer = train_tokenizer("bytes", [])
    clean = text_function(["lowercase", "collapse_whitespace"])
    found, want = (
      rows_of([text], tokenizer, function, 99, parse_special=True)[0]
      for text, function in (("A  [MASK] B", clean), ("a  [MASK] b", str))
    )
    np.testing.assert_array_equal(found, want)

  def test_samples_pair_texts_with_their_best_guesses(self):
    pairs = predict.samples(self.model, TEXTS[:3])
    self.assertEqual([p[0] for p in pairs], list(TEXTS[:3]))
    self.assertRegex(pairs[2][1], r"^\S+ \(0\.\d\d\), \S+ \(0\.\d\d\), \S+ \(")

  @parameterized.parameters(("cls", 2), ("mean", 2), ("mean", 32), ("max", 3))
  def test_embeddings_pool_valid_tokens_only(self, pooling, batch_size):
    found = predict.embed(self.model, PLAIN, pooling, batch_size)
    self.assertEqual((found.shape, found.dtype), ((5, 12), np.float32))
    pool = {"cls": lambda h: h[0], "mean": lambda h: h.mean(0),
            "max": lambda h: h.max(0)}[pooling]  # fmt: skip
    for hidden, vector in zip(self.hidden(), found):
      # float32 sums over another number of keys
      np.testing.assert_allclose(vector, pool(hidden), atol=1e-5)

  def test_normalized_vectors_have_length_one(self):
    vectors = predict.embed(self.model, PLAIN, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)

  def test_texts_may_be_an_array(self):
    np.testing.assert_array_equal(
      predict.embed(self.model, np.array(PLAIN)),
      predict.embed(self.model, PLAIN),
    )

  def test_text_that_spells_a_special_token_is_mere_text_for_embed(self):
    with mock.patch.object(
      type(self.tokenizer), "encode_batch", autospec=True,
      side_effect=type(self.tokenizer).encode_batch,
    ) as encode:  # fmt: skip
      predict.embed(self.model, ["the [MASK]"])
    self.assertFalse(encode.call_args.kwargs["parse_special"])

  def test_lengths_share_few_compiled_programs(self):
    chex.clear_trace_counter()
    pool = chex.assert_max_traces(lambda h, s: h[:, 0], n=2)
    with mock.patch.dict(predict.POOLING, counted=pool):
      for n in range(1, 58):  # rows of 3 to 59 tokens: paddings to 32 and 60
        predict.embed(self.model, [" ".join(["cat"] * n)], "counted")

  def test_bfloat16_stays_close(self):
    half = loading.load_model(self.folder, dtype=jnp.bfloat16)
    a = predict.embed(self.model, PLAIN, normalize=True)
    b = predict.embed(half, PLAIN, normalize=True)
    self.assertEqual(b.dtype, np.float32)
    # 8 bits through 3 layers: directions to about a per cent
    np.testing.assert_allclose((a * b).sum(1), 1.0, atol=1e-2)

  @parameterized.named_parameters(
    ("no_mask", ["the cat"], {}, r"Text 0 \('the cat'\) has no \[MASK\]"),
    ("no_text", [], {}, "There is no text"),
    ("no_text_in_an_array", np.array([], str), {}, "There is no text"),
    ("string", "a [MASK]", {}, "pass a list"),
    ("no_batch", ["[MASK]"], {"batch_size": 0}, "batch_size=0 must be at"),
    ("too_many", ["[MASK]"], {"top_k": 19}, "between 1 and .* 18"),
    ("long", ["[MASK]" + " cat" * 70], {}, "Text 0 has 73 tokens .* most 60"),
    (
      "mask_cut_off",
      ["cat " * 70 + "[MASK]"],
      {"truncate": True},
      "left after truncation",
    ),
  )
  def test_fill_mask_says_what_it_cannot_fill(self, texts, options, message):
    with self.assertRaisesRegex(ValueError, message):
      predict.fill_mask(self.model, texts, **options)

  def test_embed_refuses_or_cuts_long_texts_as_asked(self):
    long = "cat " * 70
    with self.assertRaisesRegex(ValueError, "72 tokens.*--truncate"):
      predict.embed(self.model, [long])
    with self.assertRaisesRegex(ValueError, "max_length=61 must lie"):
      predict.embed(self.model, [long], max_length=61)
    with self.assertRaisesRegex(ValueError, "pooling='sum' is unknown"):
      predict.embed(self.model, [long], "sum")
    cut = predict.embed(self.model, [long], max_length=7, truncate=True)
    want = predict.embed(self.model, ["cat " * 5])
    np.testing.assert_allclose(cut, want, atol=1e-6)  # the same row

  def test_a_model_without_the_head_cannot_fill(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    spec = toy.spec()
    interop.write_huggingface(
      folder, spec, toy.params(spec, ()), toy.word_tokenizer()
    )
    with self.assertRaisesRegex(ValueError, "no mlm_head, which fill_mask"):
      predict.fill_mask(loading.load_model(folder), ["[MASK]"])

  def run_command(self, *args, stdin=None):
    return subprocess.run(
      [sys.executable, "-m", "bertjax.predict", *args],
      capture_output=True,
      text=True,
      input=stdin,
      env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
    )

  def test_the_command_prints_json_lines(self):
    done = self.run_command(
      "fill_mask", f"--model={self.folder}", f"--text={TEXTS[0]}",
      f"--text={TEXTS[2]}", "--top_k=2", "--format=json",
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    self.assertEqual([len(x["masks"]) for x in lines], [1, 3])
    want = predict.fill_mask(self.model, TEXTS[:1], top_k=2)[0][0][0]
    found = lines[0]["masks"][0][0]
    self.assertEqual(found["token"], want.token)
    self.assertAlmostEqual(found["probability"], want.probability, places=5)

  def test_the_command_writes_vectors_of_standard_input(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    done = self.run_command(
      "embed", f"--model={self.folder}", "--pooling=max",
      f"--output={folder / 'v.npy'}", stdin="a mat\nthe cats\n",
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    want = predict.embed(self.model, ["a mat", "the cats"], "max")
    np.testing.assert_allclose(
      np.load(folder / "v.npy"),
      want,
      atol=1e-6,  # the same program
    )

  def test_the_command_knows_an_ending_in_capitals(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    given = types.SimpleNamespace(
      output=str(folder / "v.NPY"), pooling="max", batch_size=2,
      max_length=None, normalize=False, truncate=False,
    )  # fmt: skip
    _, _, command = TASKS["embed"]
    command(self.model, [{"text": text} for text in PLAIN], given)
    np.testing.assert_array_equal(
      np.load(given.output), predict.embed(self.model, PLAIN, "max", 2)
    )

  def test_the_command_names_its_tasks(self):
    done = self.run_command("fill", f"--model={self.folder}", "--text=x")
    self.assertEqual(done.returncode, 1)
    self.assertIn("Did you mean 'fill_mask'?", done.stderr)
    self.assertNotIn("Traceback", done.stderr)


if __name__ == "__main__":
  absltest.main()
