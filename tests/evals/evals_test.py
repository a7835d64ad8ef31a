"""Evaluators against counts and sums done by hand."""

import math
import pathlib
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import evaluate, experiment, loading
from bertjax.config import merge, settings
from bertjax.data.text import TextData
from bertjax.data.tokenizers import train_tokenizer
from bertjax.data.unigram import unigram_baseline
from bertjax.evals import objective_eval, pseudo_perplexity
from bertjax.evals.pseudo_perplexity import one_mask_each
from bertjax.models import bert
from bertjax.objectives import masked_lm
from bertjax.parallel.mesh import make_mesh
from tests import tiny

_TOKENIZER = types.SimpleNamespace(
  mask_id=4, special_ids=np.arange(5, dtype=np.int32)
)


class _Data:
  """Three rows in batches of two; the second batch is half empty."""

  batch_size = 2
  tokenizer = _TOKENIZER

  def __init__(self):
    rng = np.random.default_rng(0)
    self.rows = dict(
      tokens=rng.integers(5, 20, (4, 7)).astype(np.int32),
      segment_ids=np.ones((4, 7), np.int32),
      masked_positions=np.tile(np.int32([1, 3]), (4, 1)),
      labels=rng.integers(5, 20, (4, 2)).astype(np.int32),
    )
    self.rows["tokens"][:, 0], self.rows["tokens"][:, -1] = 2, 3
    self.rows["labels"][0, 1] = -1
    self.rows["segment_ids"][3], self.rows["labels"][3] = 0, -1

  def dataset(self, split):
    del split
    return self

  def batch_spec(self, batch_size):
    return {k: v[:batch_size] for k, v in self.rows.items()}

  def evaluation_batches(self, batch_size, num_batches, index, count):
    del num_batches, index, count
    for start in range(0, 4, batch_size):
      yield {k: v[start : start + batch_size] for k, v in self.rows.items()}


class EvaluatorsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.objective = masked_lm(
      encoder=bert(
        vocab_size=20,
        num_layers=1,
        emb_dim=8,
        num_heads=2,
        mlp_dim=12,
        max_positions=16,
      )
    )
    cls.data = _Data()
    cls.mesh = make_mesh(devices=jax.devices()[:1])
    cls.variables = cls.objective.init(
      jax.random.key(0), cls.data.rows, train=False
    )
    # Spread out, so that rows have different losses.
    cls.variables = jax.tree.map(lambda x: 10 * x, cls.variables)

  def _log_probs(self, rows):
    hidden = self.objective.apply(self.variables, rows, method="encode")
    logits = self.objective.apply(self.variables, hidden, method="mlm_logits")
    return np.asarray(jax.nn.log_softmax(logits))

  def test_objective_weighs_every_label_once(self):
    evaluate = objective_eval(
      objective=self.objective, data=self.data, mesh=self.mesh
    )
    values = evaluate(self.variables, jax.random.key(0))
    log_probs = self._log_probs(self.data.rows)
    losses = [
      -log_probs[b, self.data.rows["masked_positions"][b, m], label]
      for b, labels in enumerate(self.data.rows["labels"])
      for m, label in enumerate(labels)
      if label >= 0
    ]
    self.assertLen(losses, 5)
    # float32 sums over a batch of another size.
    self.assertAlmostEqual(values["mlm_loss"], np.mean(losses), places=5)

  def test_a_metric_is_divided_by_its_weight_and_left_out_without_one(self):
    class Fixed:
      reads = ()

      def apply(self, variables, batch, train):
        return None, {"half": (jnp.ones(()), 0.5), "none": (jnp.zeros(()), 0)}

    evaluate = objective_eval(objective=Fixed(), data=self.data, mesh=self.mesh)
    with mock.patch.object(_Data, "evaluation_batches", return_value=[{}]):
      self.assertEqual(evaluate({}, jax.random.key(0)), {"half": 2.0})

  @parameterized.parameters(
    (objective_eval, "no row to evaluate on"),
    (pseudo_perplexity, "no token to score"),
  )
  def test_an_empty_split_has_no_value(self, evaluator, message):
    evaluate = evaluator(
      objective=self.objective, data=self.data, mesh=self.mesh
    )
    with (
      mock.patch.object(_Data, "evaluation_batches", return_value=[]),
      self.assertRaisesRegex(ValueError, f"split='validation' has {message}"),
    ):
      evaluate(self.variables, jax.random.key(0))

  @parameterized.product(option=("num_rows", "batch_size"), count=(0, -1))
  def test_pseudo_perplexity_needs_a_row(self, option, count):
    with self.assertRaisesRegex(ValueError, f"{option}={count} must be at le"):
      pseudo_perplexity(
        objective=self.objective,
        data=self.data,
        mesh=self.mesh,
        **{option: count},
      )

  def test_pseudo_perplexity_masks_each_token_in_turn(self):
    evaluate = pseudo_perplexity(
      objective=self.objective, data=self.data, mesh=self.mesh, num_rows=2
    )
    values = evaluate(self.variables, jax.random.key(0))
    rows = {k: v.copy() for k, v in self.data.rows.items()}
    for b in range(2):  # back to the text before masking
      for m, label in enumerate(rows["labels"][b]):
        if label >= 0:
          rows["tokens"][b, rows["masked_positions"][b, m]] = label
    losses = []
    for b in range(2):
      for place in range(1, 6):
        one = {k: jnp.asarray(v[b : b + 1]) for k, v in rows.items()}
        one["tokens"] = one["tokens"].at[0, place].set(_TOKENIZER.mask_id)
        losses.append(-self._log_probs(one)[0, place, rows["tokens"][b, place]])
    self.assertEqual(values["scored_tokens"], 10)
    self.assertAlmostEqual(
      values["pseudo_perplexity"] / math.exp(np.mean(losses)), 1, places=4
    )

  def test_special_tokens_and_padding_are_not_scored(self):
    row = {k: v[0] for k, v in self.data.rows.items()}
    row["segment_ids"] = np.int32([1, 1, 1, 1, 0, 0, 0])
    batch = one_mask_each(row, _TOKENIZER)
    np.testing.assert_array_equal(batch["masked_positions"][:, 0], [1, 2, 3])

  def test_unigram_baseline_by_hand(self):
    batches = [{"labels": np.array([[0, 1], [0, -1]])}]
    values = unigram_baseline(np.array([6, 1, 0]), batches)
    self.assertAlmostEqual(values["unigram_accuracy"], 2 / 3)
    expected = -(2 * math.log(7 / 10) + math.log(2 / 10)) / 3
    self.assertAlmostEqual(values["unigram_loss"], expected)

  def test_unigrams_are_of_what_is_masked(self):
    folder = pathlib.Path(self.create_tempdir())
    (folder / "a.txt").write_text("a \u4e2d b \u4e2d a \u4e2d \u4e2d\n" * 9)
    data = TextData(
      source=dict(name="text_files", paths=str(folder / "a.txt")),
      tokenizer=train_tokenizer("wordpiece", ["a b"], vocab_size=12),
      seq_len=32,
      batch_size=2,
      instances=dict(name="packed"),
      masking={},
      seed=0,
      cache_dir=folder,
    )
    a, b = data.tokenizer.encode("a b")
    counts = data.token_counts()
    np.testing.assert_array_equal(np.flatnonzero(counts), sorted([a, b]))
    self.assertEqual(counts[a], 2 * counts[b])
    labels = np.concatenate(
      [batch["labels"] for batch in data.dataset().evaluation_batches(2)]
    )
    self.assertAlmostEqual(
      data.baseline("train")["unigram_accuracy"],
      (labels == a).sum() / (labels >= 0).sum(),
    )

  def test_another_objective_is_refused(self):
    with self.assertRaisesRegex(ValueError, "needs objective.name='masked_lm'"):
      pseudo_perplexity(objective=object(), data=self.data, mesh=self.mesh)


class PairTaskTest(tiny.CorpusTestCase):
  """A model that has learned pairs, on rows of none."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = tiny.config(
      cls.root, model=dict(num_layers=1, scan=False), evals=dict(heldout={})
    )
    cls.enterClassContext(
      mock.patch.object(jax, "devices", return_value=jax.devices()[:1])
    )

  def _build(self, **evals):
    return experiment.build(settings(merge(self.config, dict(evals=evals))))

  def test_rows_without_pairs_are_refused_before_training(self):
    packed = dict(instances=dict(name="packed"))
    built = self._build(x=dict(name="objective", data=packed))
    with self.assertRaisesRegex(
      ValueError, "evals: MaskedLM reads pair_labels, which .* hold tokens, "
    ):
      built.evaluators()
    alone = self._build(x=dict(name="pseudo_perplexity", data=packed))
    self.assertIn("x", alone.evaluators())

  def test_a_published_model_reads_the_pairs_that_it_learned(self):
    built = self._build()
    published = loading.LoadedModel(
      objective=built.objective,
      params=built.init().params,
      tokenizer=built.data.tokenizer,
      spec=dict(self.config["model"]),
      objective_spec=dict(self.config["objective"]),
      origin=loading.HUGGINGFACE,
      config=None,
      path="bert",
    )
    asked = dict(
      split="train",
      source=self.config["data"]["source"],
      num_batches=1,
      num_rows=1,
    )
    sizes = dict(seq_len=32, batch_size=8)
    with (
      mock.patch.object(evaluate, "load_model", return_value=published),
      mock.patch.object(evaluate.hosts, "say") as say,
    ):
      values = evaluate.evaluate("bert", data=sizes, **asked)
      self.assertIn("nsp_accuracy", values)
      self.assertRegex(
        say.call_args.args[0],
        r"\d rows of seq_len=32, of which objective reads 8, pseudo_perplexity"
        r" reads 1\.$",
      )
      packed = sizes | dict(instances=dict(name="packed"))
      with self.assertRaisesRegex(ValueError, "MaskedLM reads pair_labels"):
        evaluate.evaluate("bert", data=packed, **asked)
      values = evaluate.evaluate(
        "bert", data=packed, evaluators=["pseudo_perplexity"], **asked
      )
      self.assertIn("pseudo_perplexity", values)

  def test_another_tokenizer_than_the_models_is_refused(self):
    data = dict(tokenizer=dict(name="bytes"))
    with self.assertRaisesRegex(ValueError, "data.tokenizer=.*; leave it out"):
      evaluate.evaluate("nowhere", data=data)


class BatchTest(parameterized.TestCase):
  @parameterized.parameters(
    (12, 16, "evals.x.batch_size=12 does not divide over 8 batch .* of 8"),
    (None, 12, "^data.batch_size=12 does not divide over 8 batch shards"),
    (24, 12, None),
  )
  def test_a_batch_divides_over_the_mesh(self, own, read, message):
    data = _Data()
    data.batch_size = read
    parts = types.SimpleNamespace(
      objective=types.SimpleNamespace(reads=("tokens", "labels")),
      data=data,
      mesh=make_mesh(data=4, fsdp=2),
    )
    spec = dict(name="objective", batch_size=own)
    if message is None:
      self.assertTrue(experiment.build_evaluator(parts, spec, "evals.x"))
      return
    with self.assertRaisesRegex(ValueError, message):
      experiment.build_evaluator(parts, spec, "evals.x")


if __name__ == "__main__":
  absltest.main()
