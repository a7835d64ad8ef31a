"""Heads of run_classifier.py and run_squad.py, through TensorFlow itself."""

import json
import pathlib
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import convert, interop, loading
from bertjax.interop import names, tf1
from tests.interop import toy

_CLASSES = dict(
  name="classification",
  num_classes=3,
  labels=["bad", "good", "so"],
  dropout_rate=0.3,
)
_SPANS = dict(name="span_qa")


def _params(spec, objective):
  rng = np.random.default_rng(1)
  flat = {
    name: rng.normal(size=shape).astype("f4")
    for name, shape in interop.parameter_shapes(spec, objective).items()
  }
  return names.nest(names.stacked(flat, spec["num_layers"]))


class Tf1HeadsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.spec = toy.spec(activation="gelu_tanh")

  def write(self, objective, folder="m"):
    params = _params(self.spec, objective)
    interop.write_tf1(
      self.root / folder,
      self.spec,
      params,
      toy.word_tokenizer(),
      objective=objective,
    )
    return params, self.root / folder

  @parameterized.named_parameters(("classes", _CLASSES), ("spans", _SPANS))
  def test_write_and_read_keep_every_bit(self, objective):
    params, folder = self.write(objective)
    found = interop.read_tf1(folder)
    toy.assert_same_trees(params, found.params)
    self.assertEqual(found.objective, objective)
    back = self.root / "workdir"
    done = convert.convert(folder, back, format="bertjax")
    self.assertEqual(done.origin, "tf1")
    convert.convert(back, self.root / "again", format="tf1")
    one, two = (tf1.read_checkpoint(f) for f in (folder, self.root / "again"))
    jax.tree.map(np.testing.assert_array_equal, one, two)

  def test_variables_are_named_and_laid_out_as_in_the_original(self):
    params, folder = self.write(_CLASSES)
    arrays = tf1.read_checkpoint(folder)
    np.testing.assert_array_equal(
      arrays["output_weights"], params["classifier"]["kernel"].T
    )
    np.testing.assert_array_equal(
      arrays["output_bias"], params["classifier"]["bias"]
    )
    self.assertEqual(arrays["output_weights"].shape, (3, 12))
    self.assertIn("bert/pooler/dense/kernel", arrays)
    self.assertFalse([n for n in arrays if n.startswith("cls/")])
    params, folder = self.write(_SPANS, "spans")
    arrays = tf1.read_checkpoint(folder)
    np.testing.assert_array_equal(
      arrays["cls/squad/output_weights"], params["span"]["kernel"].T
    )
    self.assertEqual(arrays["cls/squad/output_bias"].shape, (2,))
    # The original graph restores a pooler, though nothing reads it.
    self.assertEqual(arrays["bert/pooler/dense/kernel"].shape, (12, 12))

  @parameterized.named_parameters(
    ("classes", _CLASSES, "output_weights", "classification"),
    ("spans", _SPANS, "cls/squad/output_weights", "span_qa"),
  )
  def test_a_checkpoint_of_the_original_code_is_known_by_its_head(
    self, objective, weights, name
  ):
    params, folder = self.write(objective)
    arrays = tf1.read_checkpoint(folder)
    # What its optimizer leaves beside, and a config that knows nothing of us.
    slots = {f"{weights}/adam_{s}": arrays[weights] for s in "mv"}
    for file in folder.glob("*.ckpt*"):
      file.unlink()
    step = {"global_step": np.int64(7)}
    tf1.write_checkpoint(arrays | slots | step, folder)
    path = folder / tf1.CONFIG
    config = json.loads(path.read_text())
    del config["bertjax_objective"]
    path.write_text(json.dumps(config))
    model = loading.load_model(folder)
    self.assertEqual(model.objective_spec["name"], name)
    toy.assert_same_trees(params, jax.device_get(model.params))
    logits = model.objective.apply(
      {"params": model.params},
      {"tokens": np.array([[2, 5, 6, 3]], np.int32),
       "segment_ids": np.ones((1, 4), np.int32)},
      method="logits",
    )  # fmt: skip
    self.assertEqual(np.size(logits), {"classification": 3, "span_qa": 8}[name])

  @parameterized.named_parameters(
    ("tags", dict(name="token_classification", num_classes=3)),
    ("choices", dict(name="multiple_choice")),
    ("number", dict(name="classification", num_classes=1)),
    ("several", dict(name="classification", num_classes=3, multilabel=True)),
  )
  def test_heads_that_the_original_code_lacks_are_refused(self, objective):
    with self.assertRaisesRegex(
      ValueError, "the original code has classification .*huggingface"
    ):
      self.write(objective)


if __name__ == "__main__":
  absltest.main()
