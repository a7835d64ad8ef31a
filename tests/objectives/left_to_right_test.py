"""The next-token objective reads masked batches and never looks ahead."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from bertjax.models import bert, left_to_right_bert
from bertjax.objectives import (
  LeftToRightLM,
  left_to_right,
  left_to_right_lm,
)
from tests import jitted

V, B, T, M = 31, 3, 9, 5
_SIZES = dict(
  vocab_size=V, num_layers=2, emb_dim=12, num_heads=3, max_positions=T
)


def tokens():
  return np.random.default_rng(0).integers(5, V, (B, T), np.int32)


def masked(original, positions, labelled=None):
  """The batch of rows whose `positions` [b, m] are replaced by token 4."""
  positions = np.asarray(positions, np.int32)
  labels = np.take_along_axis(original, positions, 1)
  shown = original.copy()
  np.put_along_axis(shown, positions, 4, 1)
  if labelled is not None:
    labels = np.where(labelled, labels, -1)
    shown = np.where(shown == 4, original, shown)
  segments = np.ones((B, T), np.int32)
  segments[1, 5:] = 2  # two segments in one row
  segments[2, 6:] = 0  # padding
  return jax.tree.map(
    jnp.asarray,
    {
      "tokens": shown,
      "segment_ids": segments,
      "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
      "masked_positions": positions,
      "labels": labels.astype(np.int32),
    },
  )


class LeftToRightLMTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.objective = left_to_right_lm(encoder=left_to_right_bert(**_SIZES))
    cls.plain = LeftToRightLM(bert(attend="reference", **_SIZES))
    batch = masked(tokens(), np.tile(np.arange(1, 6), (B, 1)))
    variables = jax.jit(lambda k: cls.objective.init(k, batch, train=False))(
      jax.random.key(0)
    )
    # Larger weights, so that attention is far from uniform.
    cls.variables = jax.tree.map(lambda x: 6 * x, nn.meta.unbox(variables))

  def apply(self, batch, objective=None):
    objective = objective or self.objective
    return jitted.apply(objective, self.variables, batch, train=False)

  def test_an_encoder_that_looks_ahead_is_refused(self):
    with self.assertRaisesRegex(ValueError, "model.name='left_to_right_bert'"):
      left_to_right_lm(encoder=bert(**_SIZES))

  def test_it_needs_no_more_than_it_says_that_it_reads(self):
    whole = masked(tokens(), np.ones((B, 1), int))
    batch = {name: whole[name] for name in self.objective.reads}
    jax.eval_shape(
      lambda: self.objective.init(jax.random.key(0), batch, train=False)
    )

  def test_unmasked_restores_the_tokens_and_ignores_empty_slots(self):
    original = tokens()
    labelled = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0]], bool)
    positions = np.array([[3, 0, 5], [0, 0, 0], [8, 1, 0]])
    batch = masked(original, positions, labelled)
    shown = np.asarray(batch["tokens"]).copy()
    shown[0, 3] = shown[2, 1] = 4
    restored = left_to_right.unmasked(batch | {"tokens": jnp.asarray(shown)})
    np.testing.assert_array_equal(restored, original)

  def test_loss_does_not_depend_on_what_is_masked(self):
    original = tokens()
    some = masked(original, np.tile([1, 2, 3], (B, 1)))
    others = masked(original, np.tile([4, 5, 8], (B, 1)))
    a, b = self.apply(some)[0], self.apply(others)[0]
    np.testing.assert_allclose(a["lm"], b["lm"], rtol=1e-6)

  def test_weights_count_successors_within_a_segment(self):
    batch = masked(tokens(), np.ones((B, 1), int))
    # Rows of 9; of 5 and 4; of 6 and padding.
    weight = 8 + (4 + 3) + 5
    self.assertEqual(self.objective.weights(batch), {"lm": float(weight)})
    self.assertEqual(self.apply(batch)[1]["lm_loss"][1], weight)

  def test_scores_at_masked_positions_add_up_to_the_whole(self):
    original = tokens()
    positions = np.tile(np.arange(1, T), (B, 1))
    labelled = np.ones((B, T - 1), bool)
    labelled[1, 4] = False  # position 5 opens a segment: nothing before it
    labelled[2, 5:] = False  # padding
    _, metrics = self.apply(masked(original, positions, labelled))
    for name in ("loss", "accuracy"):
      np.testing.assert_allclose(
        np.array(metrics[f"mlm_{name}"]),
        np.array(metrics[f"lm_{name}"]),
        rtol=1e-5,
      )

  def test_no_later_token_matters_unless_attention_is_bidirectional(self):
    original, changed = tokens(), tokens()
    changed[0, 6] = (changed[0, 6] + 3) % V
    positions = np.tile([2, 4, 6], (B, 1))
    labelled = np.tile([[True, True, False]], (B, 1))
    losses = {}
    for name, objective in (("causal", None), ("full", self.plain)):
      losses[name] = [
        float(self.apply(masked(t, positions, labelled), objective)[1][
          "mlm_loss"
        ][0])
        for t in (original, changed)
      ]  # fmt: skip
    np.testing.assert_allclose(*losses["causal"], rtol=1e-6)
    self.assertGreater(abs(np.subtract(*losses["full"])), 1e-3)


if __name__ == "__main__":
  absltest.main()
