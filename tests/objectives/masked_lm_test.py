"""Terms, weights and metrics of the masked-LM objective."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from bertjax.models import bert
from bertjax.objectives import masked_lm
from bertjax.objectives.base import total_loss
from bertjax.objectives.masked_lm import cross_entropy, gather_positions

V = 31


def objective(pair_task=None):
  encoder = bert(
    vocab_size=V, num_layers=2, emb_dim=12, num_heads=3, max_positions=9
  )
  return masked_lm(encoder=encoder, pair_task=pair_task)


def example():
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(0, V, (4, 7), np.int32),
    "masked_positions": np.array(
      [[0, 3, 5], [2, 0, 0], [0, 0, 0], [1, 6, 0]], np.int32
    ),
    "labels": np.array(
      [[3, 30, 7], [9, -1, -1], [-1, -1, -1], [0, 5, -1]], np.int32
    ),
    "pair_labels": np.array([0, 1, -1, 1], np.int32),
  }
  return jax.tree.map(jnp.asarray, batch)


class CrossEntropyTest(absltest.TestCase):
  def test_equals_the_formula_over_valid_labels_only(self):
    logits = np.random.default_rng(0).normal(size=(3, 4, V)).astype("f4")
    labels = np.array([[1, -1, 2, 0], [-1] * 4, [30, 30, -1, 4]])
    loss, correct, count = cross_entropy(
      jnp.asarray(logits), jnp.asarray(labels)
    )
    log_p = special.log_softmax(logits.astype("f8"), -1)
    valid = labels >= 0
    want = -np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)
    np.testing.assert_allclose(loss, want[..., 0][valid].sum(), rtol=1e-5)
    self.assertEqual(count, 6)
    self.assertEqual(correct, (logits.argmax(-1) == labels)[valid].sum())

  def test_gather_takes_each_rows_own_positions(self):
    hidden = np.arange(2 * 5 * 3, dtype="f4").reshape(2, 5, 3)
    found = gather_positions(jnp.asarray(hidden), jnp.array([[4, 0], [1, 1]]))
    np.testing.assert_array_equal(
      found, np.stack([hidden[0, [4, 0]], hidden[1, [1, 1]]])
    )


class MaskedLMTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.objective = objective("nsp")
    variables = jax.jit(
      lambda k: cls.objective.init(k, example(), train=False)
    )(jax.random.key(0))
    cls.variables = jax.tree.map(lambda x: 4 * x, nn.meta.unbox(variables))
    cls.apply = staticmethod(
      jax.jit(lambda v, b: cls.objective.apply(v, b, train=False))
    )

  def test_weights_come_from_the_labels_alone(self):
    weights = self.objective.weights(example())
    self.assertEqual(weights, {"mlm": 6.0, "nsp": 3.0})
    _, metrics = self.apply(self.variables, example())
    self.assertEqual(metrics["mlm_loss"][1], weights["mlm"])
    self.assertEqual(metrics["nsp_loss"][1], weights["nsp"])

  def test_unused_slots_do_not_reach_the_loss(self):
    batch = example()
    moved = dict(batch)
    unused = batch["labels"] < 0
    moved["masked_positions"] = np.where(unused, 6, batch["masked_positions"])
    for a, b in zip(
      *(self.apply(self.variables, x)[0].values() for x in (batch, moved))
    ):
      np.testing.assert_array_equal(a, b)

  def test_sums_of_parts_add_up_to_the_whole(self):
    batch = example()
    whole, _ = self.apply(self.variables, batch)
    parts = [
      self.apply(self.variables, {k: v[rows] for k, v in batch.items()})[0]
      for rows in (slice(0, 1), slice(1, 4))
    ]
    for name in whole:
      np.testing.assert_allclose(
        whole[name],
        parts[0][name] + parts[1][name],
        rtol=1e-5,  # float32
      )
    weights = self.objective.weights(batch)
    total = total_loss(whole, weights, self.objective.coefficients)
    np.testing.assert_allclose(
      total, whole["mlm"] / 6 + whole["nsp"] / 3, rtol=1e-6
    )

  def test_a_batch_without_labels_has_no_loss(self):
    batch = example()
    batch["labels"] = jnp.full_like(batch["labels"], -1)
    batch["pair_labels"] = jnp.full_like(batch["pair_labels"], -1)
    sums, _ = self.apply(self.variables, batch)
    total = total_loss(
      sums, self.objective.weights(batch), self.objective.coefficients
    )
    self.assertEqual(total, 0.0)

  def test_the_decoder_is_the_token_table(self):
    def total(variables):
      return self.objective.apply(variables, example(), train=False)[0]["mlm"]

    params = self.variables["params"]
    table = jax.jit(jax.grad(total))(self.variables)["params"]["encoder"][
      "embeddings"
    ]["token"]["embedding"]
    unseen = np.setdiff1d(np.arange(V), example()["tokens"])
    # Rows that no input reads get gradient through the output.
    self.assertTrue((np.abs(table[unseen]).max(-1) > 0).all())
    self.assertNotIn("decoder", params["mlm_head"])

  @parameterized.parameters(None, "sop")
  def test_the_pair_task_decides_about_its_head(self, task):
    shapes = jax.eval_shape(
      lambda: objective(task).init(jax.random.key(0), example(), train=False)
    )["params"]
    self.assertEqual("pair_head" in shapes, task is not None)
    self.assertEqual("pooler" in shapes, task is not None)

  @parameterized.parameters(None, "sop")
  def test_it_needs_no_more_than_it_says_that_it_reads(self, task):
    found = objective(task)
    batch = {name: example()[name] for name in found.reads}
    jax.eval_shape(lambda: found.init(jax.random.key(0), batch, train=False))
    self.assertEqual("pair_labels" in batch, task is not None)

  def test_an_unknown_pair_task_is_refused(self):
    with self.assertRaisesRegex(ValueError, "pair_task='nps' is unknown.*nsp"):
      objective("nps")


if __name__ == "__main__":
  absltest.main()
