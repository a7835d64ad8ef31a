"""Fine-tuning heads compute what `transformers`' models compute."""

import os
import tempfile

from absl.testing import absltest, parameterized

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from bertjax import interop, registry
from bertjax.models import MODELS
from bertjax.objectives.base import total_loss
from bertjax.objectives.fine_tuning import FINE_TUNING
from tests import jitted

# Sums of a few dozen float32 products in another order.
ATOL = 1e-5
NUM_CLASSES = 5
ROWS, LENGTH = 4, 11


def published(theirs):
  """Their encoder (and pooler) as our spec and parameters."""
  with tempfile.TemporaryDirectory() as folder:
    theirs.bert.save_pretrained(folder)
    return interop.read_huggingface(folder)


def linear(layer):
  return {
    "kernel": layer.weight.detach().numpy().T,
    "bias": layer.bias.detach().numpy(),
  }


def random_rows(*shape):
  rng = np.random.default_rng(0)
  lengths = rng.integers(3, shape[-1] + 1, (*shape[:-1], 1))
  real = np.arange(shape[-1]) < lengths
  return {
    "tokens": np.where(real, rng.integers(5, 61, shape), 0).astype(np.int32),
    "segment_ids": real.astype(np.int32),
    "type_ids": rng.integers(0, 2, shape, np.int32),
  }


def torch_inputs(batch):
  return {
    "input_ids": torch.tensor(batch["tokens"], dtype=torch.long),
    "attention_mask": torch.tensor(batch["segment_ids"]),
    "token_type_ids": torch.tensor(batch["type_ids"], dtype=torch.long),
  }


def loss_of(objective, params, batch):
  sums, _ = jitted.apply(objective, {"params": params}, batch, train=False)
  weights = objective.weights(batch)
  return float(total_loss(sums, weights, objective.coefficients))


class ParityTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    torch.manual_seed(0)
    self.config = transformers.BertConfig(
      vocab_size=61,
      hidden_size=24,
      num_hidden_layers=2,
      num_attention_heads=3,
      intermediate_size=40,
      max_position_embeddings=19,
      initializer_range=0.2,  # large enough that every weight matters
      num_labels=NUM_CLASSES,
    )

  def ours(self, theirs, spec, head):
    found = published(theirs)
    encoder = registry.build(MODELS, found.spec, "model")
    objective = registry.build(FINE_TUNING, spec, "objective", encoder=encoder)
    return objective, jax.tree.map(jnp.asarray, {**found.params, **head})

  def compare(self, theirs, spec, head, batch, labels):
    """Logits are equal; returns both losses."""
    theirs.eval()
    objective, params = self.ours(theirs, spec, head)
    if spec["name"] in ("token_classification", "span_qa"):
      params.pop("pooler", None)
    batch = jax.tree.map(jnp.asarray, {**batch, "labels": labels})
    found = jitted.apply(objective, {"params": params}, batch, method="logits")
    # The tree has exactly the parameters that the objective makes.
    fresh = nn.meta.unbox(
      jax.eval_shape(
        lambda key: objective.init(key, batch, train=False), jax.random.key(0)
      )
    )["params"]
    self.assertEqual(
      jax.tree.map(jnp.shape, params), jax.tree.map(jnp.shape, fresh)
    )
    return np.asarray(found), loss_of(objective, params, batch)

  def test_classification_equals_transformers(self):
    theirs = transformers.BertForSequenceClassification(self.config)
    batch = random_rows(ROWS, LENGTH)
    labels = np.array([3, 0, 4, 1], np.int32)
    found, loss = self.compare(
      theirs,
      dict(name="classification", num_classes=NUM_CLASSES),
      {"classifier": linear(theirs.classifier)},
      batch,
      labels,
    )
    expected = theirs(
      **torch_inputs(batch), labels=torch.tensor(labels, dtype=torch.long)
    )
    want = expected.logits.detach().numpy()
    np.testing.assert_allclose(found, want, atol=ATOL)
    self.assertAlmostEqual(loss, expected.loss.item(), delta=ATOL)

  def test_regression_equals_transformers(self):
    self.config.num_labels = 1
    theirs = transformers.BertForSequenceClassification(self.config)
    batch = random_rows(ROWS, LENGTH)
    labels = np.array([0.5, -2.0, 3.0, 1.0], np.float32)
    found, loss = self.compare(
      theirs,
      dict(name="classification", num_classes=1),
      {"classifier": linear(theirs.classifier)},
      batch,
      labels,
    )
    expected = theirs(**torch_inputs(batch), labels=torch.tensor(labels))
    want = expected.logits.detach().numpy()
    np.testing.assert_allclose(found, want, atol=ATOL)
    # Squares of numbers near 10.
    self.assertAlmostEqual(loss, expected.loss.item(), delta=10 * ATOL)

  def test_multilabel_equals_transformers(self):
    self.config.problem_type = "multi_label_classification"
    theirs = transformers.BertForSequenceClassification(self.config)
    batch = random_rows(ROWS, LENGTH)
    labels = np.random.default_rng(1).integers(0, 2, (ROWS, NUM_CLASSES), "i4")
    _, loss = self.compare(
      theirs,
      dict(name="classification", num_classes=NUM_CLASSES, multilabel=True),
      {"classifier": linear(theirs.classifier)},
      batch,
      labels,
    )
    expected = theirs(
      **torch_inputs(batch), labels=torch.tensor(labels, dtype=torch.float)
    )
    self.assertAlmostEqual(loss, expected.loss.item(), delta=ATOL)

  def test_token_classification_equals_transformers(self):
    theirs = transformers.BertForTokenClassification(self.config)
    batch = random_rows(ROWS, LENGTH)
    rng = np.random.default_rng(1)
    labels = rng.integers(-1, NUM_CLASSES, (ROWS, LENGTH), np.int32)
    labels = np.where(batch["segment_ids"] > 0, labels, -1)
    found, loss = self.compare(
      theirs,
      dict(name="token_classification", num_classes=NUM_CLASSES),
      {"classifier": linear(theirs.classifier)},
      batch,
      labels,
    )
    ignored = np.where(labels < 0, -100, labels)  # torch's own convention
    expected = theirs(
      **torch_inputs(batch), labels=torch.tensor(ignored, dtype=torch.long)
    )
    valid = batch["segment_ids"] > 0
    want = expected.logits.detach().numpy()
    np.testing.assert_allclose(found[valid], want[valid], atol=ATOL)
    self.assertAlmostEqual(loss, expected.loss.item(), delta=ATOL)

  def test_span_qa_equals_transformers(self):
    self.config.num_labels = 2
    theirs = transformers.BertForQuestionAnswering(self.config)
    batch = random_rows(ROWS, LENGTH)
    # Their loss also counts padding, so it is compared on full rows.
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    labels = np.array([[3, 5], [0, 0], [10, 10], [1, 7]], np.int32)
    found, loss = self.compare(
      theirs,
      dict(name="span_qa"),
      {"span": linear(theirs.qa_outputs)},
      batch,
      labels,
    )
    places = torch.tensor(labels, dtype=torch.long)
    expected = theirs(
      **torch_inputs(batch),
      start_positions=places[:, 0],
      end_positions=places[:, 1],
    )
    for i, want in enumerate((expected.start_logits, expected.end_logits)):
      np.testing.assert_allclose(
        found[..., i], want.detach().numpy(), atol=ATOL
      )
    self.assertAlmostEqual(loss, expected.loss.item(), delta=ATOL)

  def test_multiple_choice_equals_transformers(self):
    theirs = transformers.BertForMultipleChoice(self.config)
    batch = random_rows(ROWS, 3, LENGTH)
    labels = np.array([2, 0, 1, 1], np.int32)
    found, loss = self.compare(
      theirs,
      dict(name="multiple_choice"),
      {"classifier": linear(theirs.classifier)},
      batch,
      labels,
    )
    expected = theirs(
      **torch_inputs(batch), labels=torch.tensor(labels, dtype=torch.long)
    )
    want = expected.logits.detach().numpy()
    np.testing.assert_allclose(found, want, atol=ATOL)
    self.assertAlmostEqual(loss, expected.loss.item(), delta=ATOL)


def tiny_encoder():
  return registry.build(
    MODELS,
    dict(name="bert", vocab_size=61, num_layers=1, emb_dim=8, num_heads=2,
         max_positions=LENGTH),
    "model",
  )  # fmt: skip


NO_LABEL = {
  "classification": (dict(num_classes=3), np.int32(-1), ()),
  "regression": (dict(num_classes=1), np.float32("nan"), ()),
  "multilabel": (dict(num_classes=3, multilabel=True), np.int32(-1), (3,)),
  "token_classification": (dict(num_classes=3), np.int32(-1), (LENGTH,)),
  "span_qa": ({}, np.int32(-1), (2,)),
  "multiple_choice": ({}, np.int32(-1), ()),
}


class WeightTest(parameterized.TestCase):
  @parameterized.parameters(*NO_LABEL)
  def test_rows_without_label_and_padding_count_nothing(self, name):
    options, missing, shape = NO_LABEL[name]
    head = "classification" if name in ("regression", "multilabel") else name
    objective = FINE_TUNING[head](encoder=tiny_encoder(), **options)
    rows = random_rows(*((3, 2) if head == "multiple_choice" else (3,)), LENGTH)
    real = rows["segment_ids"] > 0
    self.assertFalse(real.all())
    labels = np.ones((3, *shape), missing.dtype)
    if head == "token_classification":
      labels[~real] = -1
    abstract = nn.meta.unbox(
      jax.eval_shape(
        lambda key: objective.init(
          key,
          jax.tree.map(jnp.asarray, {**rows, "labels": labels}),
          train=False,
        ),
        jax.random.key(0),
      )
    )["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda x: jnp.float32(rng.normal(size=x.shape) / 2), abstract
    )

    @jax.jit
    def loss_and_grads(batch):
      weights = objective.weights(batch)

      def loss(params):
        sums, _ = objective.apply({"params": params}, batch, train=False)
        return total_loss(sums, weights, objective.coefficients)

      (weight,) = weights.values()
      return *jax.value_and_grad(loss)(params), weight

    def only(*kept):
      """All rows but these lack a label and are nothing but padding."""
      gone = [i for i in range(3) if i not in kept]
      batch = {k: v.copy() for k, v in rows.items()}
      batch["segment_ids"][gone] = 0
      batch["labels"] = labels.copy()
      batch["labels"][gone] = missing
      return batch

    first, second, both = map(loss_and_grads, (only(0), only(2), only(0, 2)))
    total = first[2] + second[2]
    self.assertGreater(float(both[0]), 0.0)
    self.assertEqual(float(both[2]), float(total))
    jax.tree.map(
      # Float32 sums in another order; gradients reach a few tens.
      lambda a, b, c: np.testing.assert_allclose(
        (first[2] * a + second[2] * b) / total, c, rtol=1e-4, atol=1e-5
      ),
      first[:2],
      second[:2],
      both[:2],
    )
    noisy = only(0, 2)
    noisy["tokens"] = np.where(real, noisy["tokens"], 17)
    self.assertAlmostEqual(
      float(loss_and_grads(noisy)[0]), float(both[0]), delta=1e-6
    )

  @parameterized.parameters(
    ("classification", dict(num_classes=0), "num_classes=0"),
    ("classification", dict(num_classes=2, dropout_rate=1.0), "dropout_rate"),
    ("token_classification", dict(num_classes=1), "num_classes=1"),
  )
  def test_bad_options_are_refused(self, name, options, message):
    with self.assertRaisesRegex(ValueError, message):
      FINE_TUNING[name](encoder=tiny_encoder(), **options)


if __name__ == "__main__":
  absltest.main()
