"""Fine-tuned models of `transformers` become ours and theirs again."""

import json
import os
import pathlib
import tempfile

from absl.testing import absltest, parameterized

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers

from bertjax import convert, interop, loading
from bertjax.interop import heads, tensors
from tests import jitted
from tests.interop import toy

ATOL = 1e-4  # float32 products in another order
LABELS = ("bad", "good", "so-so")


def their_config(family, **options):
  kind = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
  }
  return kind[family](
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=21,
    type_vocab_size=2 if family == "bert" else 1,
    layer_norm_eps=1e-12 if family == "bert" else 1e-5,
    initializer_range=0.2,  # large enough that every weight matters
    **options,
  )


def named(labels):
  return {
    "id2label": dict(enumerate(labels)),
    "label2id": {k: i for i, k in enumerate(labels)},
  }


# Class without its family, options of its config, the objective it becomes.
MODELS = {
  "classes": (
    "ForSequenceClassification",
    named(LABELS),
    dict(name="classification", num_classes=3, labels=LABELS),
  ),
  "unnamed": (
    "ForSequenceClassification",
    dict(num_labels=4, problem_type="single_label_classification"),
    dict(name="classification", num_classes=4),
  ),
  "number": (
    "ForSequenceClassification",
    dict(num_labels=1, problem_type="regression"),
    dict(name="classification", num_classes=1),
  ),
  "several_labels": (
    "ForSequenceClassification",
    dict(problem_type="multi_label_classification", **named(LABELS)),
    dict(name="classification", num_classes=3, labels=LABELS, multilabel=True),
  ),
  "tags": (
    "ForTokenClassification",
    dict(classifier_dropout=0.3, **named(("O", "B-X", "I-X"))),
    dict(
      name="token_classification", num_classes=3, labels=("O", "B-X", "I-X")
    ),
  ),
  "spans": ("ForQuestionAnswering", {}, dict(name="span_qa")),
  "choices": ("ForMultipleChoice", {}, dict(name="multiple_choice")),
}
CASES = [
  (f"{family}_{name}", family, *row)
  for family in ("bert", "roberta")
  for name, row in MODELS.items()
]


def ragged(family, *lead):
  """Rows of 15 with one to three real tokens missing or many."""
  rng = np.random.default_rng(0)
  shape = (*(lead or (4,)), 15)
  lengths = rng.integers(3, 16, (*shape[:-1], 1))
  real = np.arange(15) < lengths
  pad = 0 if family == "bert" else 1
  types = rng.integers(0, 2, shape) if family == "bert" else np.zeros(shape)
  return {
    "tokens": np.where(real, rng.integers(5, 61, shape), pad).astype(np.int32),
    "segment_ids": real.astype(np.int32),
    "type_ids": types.astype(np.int32),
  }


class HeadsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    torch.manual_seed(0)

  def published(self, family, suffix, options):
    """A random model of theirs, and its folder."""
    prefix = {"bert": "Bert", "roberta": "Roberta"}[family]
    model = getattr(transformers, prefix + suffix)(
      their_config(family, **options)
    )
    model.eval().save_pretrained(self.root / "theirs")
    return model, self.root / "theirs"

  @parameterized.named_parameters(CASES)
  def test_their_model_is_ours_and_theirs_again(
    self, family, suffix, options, objective
  ):
    theirs, folder = self.published(family, suffix, options)
    ours = loading.load_model(folder)
    kept = {k: v for k, v in ours.objective_spec.items() if k != "dropout_rate"}
    self.assertEqual(kept, objective)
    lead = (3, 2) if objective["name"] == "multiple_choice" else ()
    batch = ragged(family, *lead)
    inputs = {
      "input_ids": torch.tensor(batch["tokens"], dtype=torch.long),
      "attention_mask": torch.tensor(batch["segment_ids"]),
      "token_type_ids": torch.tensor(batch["type_ids"], dtype=torch.long),
    }
    with torch.no_grad():
      said = theirs(**inputs)
    if objective["name"] == "span_qa":
      want = torch.stack([said.start_logits, said.end_logits], -1).numpy()
    else:
      want = said.logits.numpy()
    found = np.asarray(
      jitted.apply(
        ours.objective, {"params": ours.params}, batch, method="logits"
      )
    )
    if found.ndim == 3:  # scores of padding mean nothing
      real = batch["segment_ids"] > 0
      found, want = found[real], want[real]
    np.testing.assert_allclose(found, want, atol=ATOL)
    # And back: the same tensors, labels and kind of problem.
    interop.write_huggingface(
      self.root / "back",
      ours.spec,
      ours.params,
      None,
      objective=ours.objective_spec,
    )
    wanted = tensors.read_weights(folder)
    written = tensors.read_weights(self.root / "back")
    self.assertEqual(set(wanted), set(written))
    for key in wanted:
      self.assertEqual(wanted[key].tobytes(), written[key].tobytes(), key)
    config = json.loads((self.root / "back" / "config.json").read_text())
    self.assertEqual(config["architectures"], theirs.config.architectures)
    for key in ("id2label", "label2id", "problem_type"):
      if key in config and options.get(key) is not None:
        original = json.loads((folder / "config.json").read_text())
        self.assertEqual(config[key], original[key])
    # And their own loader misses nothing.
    _, report = type(theirs).from_pretrained(
      self.root / "back", output_loading_info=True
    )
    self.assertEmpty(report["missing_keys"])
    self.assertEmpty(report["unexpected_keys"])

  def test_conversion_through_a_workdir_keeps_everything(self):
    _, folder = self.published("roberta", *MODELS["several_labels"][:2])
    convert.convert(folder, self.root / "run", format="bertjax")
    run = loading.load_model(self.root / "run")
    self.assertEqual(tuple(run.objective.labels), LABELS)
    self.assertTrue(run.objective.multilabel)
    convert.convert(self.root / "run", self.root / "back", format="huggingface")
    self.assertEqual(
      (folder / "model.safetensors").read_bytes(),
      (self.root / "back" / "model.safetensors").read_bytes(),
    )

  def test_dropout_before_the_head_is_kept(self):
    _, folder = self.published("bert", *MODELS["tags"][:2])
    model = loading.load_model(folder)
    self.assertEqual(model.objective.dropout_rate, 0.3)
    config = heads.config_from_objective(model.objective_spec, "bert")
    self.assertEqual(config["classifier_dropout"], 0.3)

  def test_the_unused_pooler_of_older_files_is_no_surprise(self):
    _, folder = self.published("bert", *MODELS["tags"][:2])
    found = tensors.read_weights(folder)
    found["bert.pooler.dense.weight"] = np.ones((24, 24), np.float32)
    found["bert.pooler.dense.bias"] = np.ones(24, np.float32)
    tensors.write_safetensors(found, folder / "model.safetensors")
    self.assertEqual(loading.load_model(folder).heads, {"classifier"})

  def test_without_its_head_a_model_is_an_encoder(self):
    _, folder = self.published("bert", *MODELS["classes"][:2])
    model = loading.load_model(folder, ignore=["^classifier"])
    self.assertEqual(model.objective_spec["name"], "masked_lm")
    self.assertEqual(model.heads, {"pooler"})

  @parameterized.parameters(
    (dict(id2label={"1": "a", "2": "b"}), r"ids \[1, 2\]; .* count from 0"),
    (dict(problem_type="ranking"), "problem_type='ranking' is unknown"),
    (
      dict(problem_type="regression", num_labels=3),
      "'regression' with 3 labels is not supported",
    ),
  )
  def test_a_head_that_is_not_ours_is_refused(self, change, message):
    config = {"architectures": ["BertForSequenceClassification"], **change}
    with self.assertRaisesRegex(ValueError, message):
      heads.objective_from_config(config, "bert", "config.json")

  def test_a_card_names_the_loader(self):
    spec = toy.spec()
    objective = dict(name="span_qa")
    shapes = interop.parameter_shapes(spec, objective)
    flat = {k: np.zeros(v, np.float32) for k, v in shapes.items()}
    params = interop.names.nest(interop.names.stacked(flat, 3))
    interop.write_huggingface(
      self.root / "card", spec, params, None, objective=objective
    )
    card = (self.root / "card" / "README.md").read_text()
    self.assertIn("AutoModelForQuestionAnswering.from_pretrained", card)
    self.assertIn("pipeline_tag: question-answering", card)


if __name__ == "__main__":
  absltest.main()
