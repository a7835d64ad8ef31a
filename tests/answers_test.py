"""Fine-tuned models answer alone as in batches, and say what they cannot."""

import dataclasses
import functools
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import interop, loading, predict
from bertjax.interop import names
from tests.interop import toy

OBJECTIVES = {
  "classes": dict(
    name="classification", num_classes=3, labels=("no", "so", "yes")
  ),
  "number": dict(name="classification", num_classes=1),
  "several": dict(
    name="classification", num_classes=2, labels=("a", "b"), multilabel=True
  ),
  "one": dict(name="classification", num_classes=1, multilabel=True),
  "tags": dict(
    name="token_classification", num_classes=3, labels=("O", "B-X", "I-X")
  ),
  "spans": dict(name="span_qa"),
  "choices": dict(name="multiple_choice"),
}
TEXTS = ("the cat sat", "a dog!", "the cats sat on the mat . a dog sat")


class AnswersTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )

  @classmethod
  @functools.cache
  def model(cls, name):
    """A published model with random weights."""
    spec, objective = toy.spec(max_positions=40, num_layers=1), OBJECTIVES[name]
    rng = np.random.default_rng(0)
    flat = {
      k: rng.normal(size=shape).astype("f4") / 3
      for k, shape in interop.parameter_shapes(spec, objective).items()
    }
    params = names.nest(names.stacked(flat, spec["num_layers"]))
    interop.write_huggingface(
      cls.root / name, spec, params, toy.word_tokenizer(), objective=objective
    )
    return loading.load_model(cls.root / name)

  def logits(self, name, text, pair=None):
    """Of one row without padding, put together by hand."""
    model = self.model(name)
    t = model.tokenizer
    ids = [t.cls_id, *t.encode(text), t.sep_id]
    types = [0] * len(ids)
    if pair is not None:
      second = [*t.encode(pair), t.sep_id]
      ids, types = ids + second, types + [1] * len(second)
    batch = {"tokens": jnp.array([ids]), "type_ids": jnp.array([types])}
    return np.asarray(
      model.objective.apply({"params": model.params}, batch, method="logits")
    )[0]

  @parameterized.parameters((None, 1), (None, 32), (TEXTS[::-1], 2))
  def test_probabilities_are_the_softmax_of_each_row_alone(self, pairs, size):
    said = predict.classify(
      self.model("classes"), TEXTS, pairs, batch_size=size
    )
    for text, pair, one in zip(TEXTS, pairs or [None] * 3, said):
      powers = np.exp(self.logits("classes", text, pair).astype(np.float64))
      want = dict(zip(("no", "so", "yes"), powers / powers.sum()))
      for label, chance in one["probabilities"].items():
        self.assertAlmostEqual(chance, want[label], places=5)
      self.assertEqual(one["label"], max(want, key=want.get))

  def test_a_number_and_several_labels(self):
    for text, one in zip(TEXTS, predict.classify(self.model("number"), TEXTS)):
      want = self.logits("number", text)[0]
      self.assertAlmostEqual(one["value"], want, places=4)
    for name, labels in (("several", ("a", "b")), ("one", ("LABEL_0",))):
      said = predict.classify(self.model(name), TEXTS)
      for text, one in zip(TEXTS, said):
        logits = self.logits(name, text)
        want = [label for label, x in zip(labels, logits) if x > 0]
        self.assertEqual(one["labels"], want)

  def test_labels_may_have_been_numbers(self):
    model = self.model("several")
    spec = model.objective_spec | {"labels": [0, 1]}
    model = dataclasses.replace(model, objective_spec=spec)
    [one] = predict.classify(model, TEXTS[:1])
    self.assertEqual(list(one["probabilities"]), ["0", "1"])

  def test_every_word_has_the_label_of_its_first_piece(self):
    said = predict.tag(self.model("tags"), TEXTS, batch_size=2)
    for text, one in zip(TEXTS, said):
      words, place, want = text.split(), 1, []
      scores = self.logits("tags", text).argmax(-1)
      for word in words:
        want.append(("O", "B-X", "I-X")[scores[place]])
        place += len(self.model("tags").tokenizer.encode(word))
      self.assertEqual(one["words"], words)
      self.assertEqual(one["labels"], want)
      for entity in one["entities"]:
        self.assertEqual(
          entity["text"], " ".join(words[entity["first"] : entity["last"] + 1])
        )

  def test_answers_are_cut_out_of_their_context(self):
    long = " ".join(["the cat sat on the mat ."] * 12)  # several windows
    model = self.model("spans")
    said = predict.answer(model, ["the dog", "a cat"], [long, "dog"])
    for one, context in zip(said, (long, "dog")):
      self.assertIn(one["answer"], context)
    logits = self.logits("spans", "a cat", "dog")
    self.assertEqual(said[1]["answer"], "dog")
    # [CLS] a cat [SEP] dog [SEP]
    self.assertAlmostEqual(said[1]["score"], logits[4].sum(), places=4)
    self.assertAlmostEqual(said[1]["null_score"], logits[0].sum(), places=4)
    [one] = predict.answer(model, ["a cat"], ["dog"], null=True)
    self.assertEqual(
      one["answer"], "" if logits[0].sum() > logits[4].sum() else "dog"
    )

  def test_questions_are_asked_as_they_were_trained(self):
    task = dict(
      name="questions",
      source=dict(name="jsonl", paths="not read"),
      question="q",
      context="c",
      answers="a",
      null=True,
      max_answer_tokens=1,
      max_question_tokens=3,
    )
    model = self.model("spans")
    model = dataclasses.replace(
      model, config=dict(data=dict(name="task", task=task, seq_len=24))
    )
    text = "the cat sat on the mat"
    [one] = predict.answer(model, ["a cat"], [text], null=False)
    self.assertIn(one["answer"], text.split())
    [other] = predict.answer(self.model("spans"), ["a cat"], [text])
    self.assertGreater(len(other["answer"].split()), 1)
    [one] = predict.answer(model, ["a cat"], [text])
    null = one["null_score"] > one["score"]
    self.assertEqual(one["answer"] == "", null)
    # The first context is read through several windows.
    with self.assertRaisesRegex(
      ValueError, "1 of 2 rows, .* row 1, need more than 3 tokens of question"
    ):
      predict.answer(model, ["a cat", "a cat a cat"], [6 * text, text])

  def test_choices_follow_their_endings(self):
    model = self.model("choices")
    endings = [["a mat", "the dog", "a cat"]]
    [one] = predict.choose(model, TEXTS[:1], endings)
    [other] = predict.choose(model, TEXTS[:1], [endings[0][::-1]])
    np.testing.assert_allclose(
      one["probabilities"], other["probabilities"][::-1], rtol=1e-5
    )
    self.assertEqual(one["choice"], 2 - other["choice"])
    arrays = np.array(TEXTS[:1]), np.array(endings)
    self.assertEqual(predict.choose(model, *arrays), [one])

  def test_what_cannot_be_answered_is_said(self):
    long = ["cat " * 60]
    with self.assertRaisesRegex(ValueError, "'classification'; .*'span_qa'"):
      predict.answer(self.model("classes"), ["a"], ["b"])
    with self.assertRaisesRegex(ValueError, "1 texts but 2 second texts"):
      predict.classify(self.model("classes"), ["a"], ["b", "c"])
    with self.assertRaisesRegex(ValueError, "pass a list of texts"):
      predict.classify(self.model("classes"), "a cat")
    with self.assertRaisesRegex(ValueError, "more than 40 tokens.*--truncate"):
      predict.classify(self.model("classes"), long)
    with self.assertRaisesRegex(ValueError, "1 texts and 0 lists of endings"):
      predict.choose(self.model("choices"), ["a"], [])
    with self.assertRaisesRegex(ValueError, "batch_size=0 must be at least 1"):
      predict.classify(self.model("classes"), ["a"], batch_size=0)
    cut = predict.classify(self.model("classes"), long, truncate=True)
    want = predict.classify(self.model("classes"), ["cat " * 38])
    np.testing.assert_allclose(
      cut[0]["probability"], want[0]["probability"], rtol=1e-5
    )


if __name__ == "__main__":
  absltest.main()
