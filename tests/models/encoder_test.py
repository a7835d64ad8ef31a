"""Properties of the encoder and of its masked-LM objective."""

import functools
import math
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax.models import bert, encoder, roberta
from bertjax.models.encoder import (
  REMAT,
  remat_policy,
  stack_layers,
  unstack_layers,
)
from bertjax.objectives import masked_lm
from tests import jitted

V, E, H, F, L, T = 53, 24, 3, 40, 2, 13
DIMS = dict(vocab_size=V, emb_dim=E, num_heads=H, mlp_dim=F, num_layers=L)


def build(**options):
  options = {**DIMS, "max_positions": T + 4, **options}
  return masked_lm(encoder=bert(**options), pair_task="nsp")


def example(rows=3):
  rng = np.random.default_rng(0)
  lengths = np.array([T, 9, 5])[:rows]
  segment_ids = (np.arange(T) < lengths[:, None]).astype(np.int32)
  batch = {
    "tokens": rng.integers(5, V, (rows, T), np.int32) * segment_ids,
    "segment_ids": segment_ids,
    "type_ids": rng.integers(0, 2, (rows, T), np.int32),
    "masked_positions": np.array([[1, 5], [2, 8], [3, 0]], np.int32)[:rows],
    "labels": np.array([[7, 9], [50, 6], [30, -1]], np.int32)[:rows],
    "pair_labels": np.array([0, 1, 1], np.int32)[:rows],
  }
  return jax.tree.map(jnp.asarray, batch)


def init(objective, seed=0):
  batch = example()
  variables = jax.jit(lambda k: objective.init(k, batch, train=False))(
    jax.random.key(seed)
  )
  return nn.meta.unbox(variables["params"])


def loud(params):
  """Larger weights than at the start, so that every part is felt."""
  return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, params)


def loss(objective, params, batch, key=None):
  sums, _ = objective.apply(
    {"params": params},
    batch,
    train=key is not None,
    rngs={} if key is None else {"dropout": key},
  )
  weights = objective.weights(batch)
  return sum(sums[k] / weights[k] for k in sums)


GRAD = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)


class EncoderTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.objective = build(dropout_rate=0.0)
    cls.params = loud(init(cls.objective))
    cls.encode = staticmethod(
      jax.jit(
        lambda params, batch: cls.objective.apply(
          {"params": params}, batch, method="encode"
        )
      )
    )

  @classmethod
  @functools.cache
  def plain(cls):
    return GRAD(cls.objective, cls.params, example())

  def test_appended_padding_changes_no_valid_output(self):
    batch = {k: example()[k] for k in ("tokens", "segment_ids", "type_ids")}
    padded = {k: np.pad(v, ((0, 0), (0, 4))) for k, v in batch.items()}
    padded["tokens"][:, -4:] = 17  # whatever stands there
    valid = batch["segment_ids"] > 0
    short = self.encode(self.params, batch)
    long = self.encode(self.params, padded)[:, :T]
    # float32 sums over another number of keys
    np.testing.assert_allclose(short[valid], long[valid], atol=1e-5)

  def test_what_stands_in_the_padding_changes_nothing_at_all(self):
    batch = example()
    other = dict(batch)
    other["tokens"] = np.where(batch["segment_ids"] > 0, batch["tokens"], 31)
    valid = batch["segment_ids"] > 0
    np.testing.assert_array_equal(
      self.encode(self.params, batch)[valid],
      self.encode(self.params, other)[valid],
    )

  def test_a_packed_row_equals_its_parts_in_rows_of_their_own(self):
    batch = example()
    lengths = (5, 6)
    packed = {
      "tokens": batch["tokens"][:1],
      "type_ids": batch["type_ids"][:1],
      "segment_ids": np.repeat([1, 2, 0], (*lengths, T - 11))[None],
      "positions": np.concatenate([np.arange(n) for n in (*lengths, 2)])[None],
    }
    packed = {k: v.astype(np.int32) for k, v in packed.items()}
    together = self.encode(self.params, packed)[0]
    for start, n in ((0, 5), (5, 6)):
      alone = {
        k: packed[k][:, start : start + n] for k in ("tokens", "type_ids")
      }
      np.testing.assert_allclose(
        together[start : start + n],
        self.encode(self.params, alone)[0],
        atol=1e-5,  # float32 sums over another number of keys
      )

  def test_a_row_of_padding_is_finite(self):
    batch = example()
    batch["segment_ids"] = np.zeros_like(batch["segment_ids"])
    self.assertTrue(np.isfinite(self.encode(self.params, batch)).all())

  def test_an_id_beyond_the_vocabulary_gives_nan(self):
    batch = example()
    batch["tokens"] = np.full_like(batch["tokens"], V)
    self.assertTrue(np.isnan(self.encode(self.params, batch)).all())

  @parameterized.named_parameters(
    *((f"remat_{name}", {"remat": name}) for name in REMAT if name != "none"),
    ("unroll", {"unroll": 2}),
    ("unscanned", {"scan": False}),
    ("unscanned_remat", {"scan": False, "remat": "full"}),
  )
  def test_memory_and_loop_options_change_neither_loss_nor_gradient(
    self, options
  ):
    batch = example()
    other = build(dropout_rate=0.0, **options)
    params = self.params
    if not options.get("scan", True):
      params = unstack_layers(params, L)
    value, grads = self.plain()
    other_value, other_grads = GRAD(other, params, batch)
    if not options.get("scan", True):
      other_grads = stack_layers(other_grads, L)
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    jax.tree.map(
      # XLA may fuse the same float32 sums in another order.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      grads,
      other_grads,
    )

  @parameterized.parameters(
    (dict(remat="products"), 0),
    (dict(remat="full"), 2),  # attention_norm and mlp_norm
  )
  def test_a_loop_that_keeps_products_keeps_statistics(self, options, again):
    def count(**options):
      grad = jax.grad(functools.partial(loss, build(**options)))
      return str(jax.make_jaxpr(grad)(self.params, example())).count("rsqrt")

    self.assertEqual(count(**options) - count(remat="none"), again)

  @parameterized.named_parameters(
    ("looped", {}, False),
    ("unrolled_loop", {"unroll": L}, True),
    ("unscanned", {"scan": False}, True),
  )
  def test_a_barrier_keeps_what_is_computed_again_outside_of_a_loop(
    self, options, barrier
  ):
    """There XLA would merge the second computation with the first."""
    objective = build(dropout_rate=0.0, remat="full", **options)
    params = self.params
    if not options.get("scan", True):
      params = unstack_layers(params, L)
    made = jax.make_jaxpr(functools.partial(loss, objective))(params, example())
    self.assertIn(f"prevent_cse={barrier}", str(made))
    self.assertNotIn(f"prevent_cse={not barrier}", str(made))

  def test_a_scanned_layer_is_traced_once(self):
    attend = mock.Mock(side_effect=lambda q, k, v, **_: v, layout="bthd")
    model = build(attend=attend)
    jax.make_jaxpr(functools.partial(loss, model))(self.params, example())
    self.assertEqual(attend.call_count, 1)

  def test_all_layers_share_one_relative_bias(self):
    self._assert_share_one_relative_bias({"scan": False})

  # Memory options change nothing else: see above.
  @pytest.mark.slow
  def test_layers_that_run_again_share_one_relative_bias(self):
    self._assert_share_one_relative_bias({"remat": "full"})

  def _assert_share_one_relative_bias(self, options):
    own = dict(dropout_rate=0.0, positions="relative")
    objective = build(**own)
    params = loud(init(objective))
    self.assertNotIn("position", params["encoder"]["embeddings"])
    other_params = params
    if not options.get("scan", True):
      other_params = unstack_layers(params, L)
    value, grads = GRAD(objective, params, example())
    other_value, found = GRAD(build(**own, **options), other_params, example())
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    np.testing.assert_allclose(
      found["encoder"]["relative_bias"]["embedding"],
      grads["encoder"]["relative_bias"]["embedding"],
      atol=1e-6,  # float32 sums in another order
    )
    table = params["encoder"]["relative_bias"]["embedding"]
    moved = {**params, "encoder": dict(params["encoder"])}
    moved["encoder"]["relative_bias"] = {"embedding": 3 * table}
    self.assertGreater(abs(loss(objective, moved, example()) - value), 1e-3)

  @parameterized.parameters("absolute", "relative")
  def test_only_relative_positions_do_not_see_where_a_row_begins(
    self, positions
  ):
    objective = build(dropout_rate=0.0, positions=positions)
    params = loud(init(objective))
    batch, length = example(1), T - 4
    names = ("tokens", "segment_ids", "type_ids")
    early = {n: jnp.pad(batch[n][:, :length], ((0, 0), (0, 4))) for n in names}
    late = {n: jnp.pad(batch[n][:, :length], ((0, 0), (4, 0))) for n in names}
    hidden = [
      objective.apply({"params": params}, rows, method="encode")
      for rows in (early, late)
    ]
    moved = jnp.abs(hidden[0][:, :length] - hidden[1][:, 4:]).max()
    if positions == "relative":
      self.assertLess(moved, 2e-5)  # the same float32 sums
      return
    self.assertGreater(moved, 1e-2)

  def test_remat_recomputes_the_same_dropout(self):
    grads = []
    for remat in ("none", "full"):
      objective = build(dropout_rate=0.2, remat=remat)
      key = jax.random.key(3)
      grads.append(GRAD(objective, self.params, example(), key))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      *grads,
    )

  def test_what_is_kept_is_the_platforms_choice(self):
    self.assertIs(remat_policy("auto"), REMAT["none"])
    with mock.patch.object(encoder, "platform", return_value="tpu"):
      self.assertIs(remat_policy("auto"), REMAT["products"])
      self.assertIs(remat_policy("none"), None)

  def test_dropout_differs_between_layers_of_a_scanned_stack(self):
    # Equal layers and equal inputs: only the masks can tell layers apart.
    objective = build(dropout_rate=0.3, norm="none", keep_layers=True)
    params = init(objective)
    params["encoder"]["layers"] = jax.tree.map(
      jnp.zeros_like, params["encoder"]["layers"]
    )
    params["encoder"]["layers"]["mlp"]["down"]["bias"] += 1.0
    encoded = jax.jit(
      lambda params, key: objective.apply(
        {"params": params},
        example(),
        method=lambda m, b: m.encoder(b, train=True),
        rngs={"dropout": key},
      )
    )(params, jax.random.key(0))
    steps = np.diff(np.asarray(encoded.layers), axis=0) > 0.5
    for i in range(1, L):
      self.assertGreater((steps[0] != steps[i]).mean(), 0.2)

  def test_stacking_is_the_inverse_of_unstacking(self):
    apart = unstack_layers(self.params, L)
    self.assertIn(f"layers_{L - 1}", apart["encoder"])
    again = stack_layers(apart, L)
    jax.tree.map(np.testing.assert_array_equal, self.params, again)

  def test_only_pre_norm_has_a_final_norm(self):
    shapes = {
      norm: jax.eval_shape(lambda norm=norm: init(build(norm=norm)))
      for norm in ("post", "pre", "none")
    }
    self.assertIn("final_norm", shapes["pre"]["encoder"])
    self.assertNotIn("final_norm", shapes["post"]["encoder"])
    self.assertNotIn("attention_norm", shapes["none"]["encoder"]["layers"])
    objective = build(norm="pre")
    hidden = jitted.apply(
      objective, {"params": loud(init(objective))}, example(), method="encode"
    )
    np.testing.assert_allclose(hidden.mean(-1), 0, atol=1e-5)  # float32 mean
    np.testing.assert_allclose(hidden.std(-1), 1, atol=1e-3)  # epsilon

  @parameterized.named_parameters(
    ("heads", dict(num_heads=5), "num_heads=5 does not divide .*=24"),
    ("size", dict(size="huge"), "model.size='huge' is unknown"),
    ("remat", dict(remat="some"), "model.remat='some' is unknown"),
    ("norm", dict(norm="mid"), "model.norm='mid' is unknown"),
    ("positions", dict(positions="t5"), "model.positions='t5' is unknown"),
    ("activation", dict(activation="gelo"), "Did you mean 'gelu'"),
    ("dropout", dict(dropout_rate=1.0), "dropout_rate=1.0 must lie in"),
    *(
      (f"least_{name}", {name: n}, f"model.{name}={n} must be at least {n + 1}")
      for name, n in (
        ("num_layers", 0),
        ("emb_dim", 0),
        ("num_heads", 0),
        ("mlp_dim", 0),
        ("vocab_size", 0),
        ("max_positions", 0),
        ("unroll", 0),
        ("num_types", -1),
        ("position_offset", -1),
      )
    ),
  )
  def test_bad_options_are_named(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      build(**options)

  def test_a_row_longer_than_the_positions_is_refused(self):
    with self.assertRaisesRegex(ValueError, "exceeds model.max_positions=12"):
      init(build(max_positions=12))


def shapes_of(encoder, pair_task="nsp"):
  objective = masked_lm(encoder=encoder, pair_task=pair_task)
  return nn.meta.unbox(
    jax.eval_shape(
      lambda: objective.init(jax.random.key(0), example(), train=False)
    )["params"]
  )


def count(tree):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


class ParameterCountTest(parameterized.TestCase):
  @parameterized.parameters(
    ("tiny", 4_385_920, 4_433_468),
    ("mini", 11_170_560, 11_267_900),
    ("small", 28_763_648, 29_058_876),
    ("medium", 41_373_184, 41_668_412),
    ("base", 109_482_240, 110_106_428),
    ("large", 335_141_888, 336_226_108),
  )
  def test_published_sizes_are_exact(self, size, encoder, everything):
    params = shapes_of(bert(vocab_size=30_522, size=size))
    self.assertEqual(count([params["encoder"], params["pooler"]]), encoder)
    self.assertEqual(count(params), everything)

  def test_roberta_base_has_its_published_count(self):
    params = shapes_of(roberta(vocab_size=50_265), pair_task=None)
    self.assertEqual(count(params), 124_697_433)  # the model's card: 125M


class InitialisationTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.objective = masked_lm(
      encoder=bert(vocab_size=997, size="tiny", max_positions=64),
      pair_task="nsp",
    )
    cls.params = init(cls.objective)

  def test_matrices_are_normal_and_truncated_at_two_deviations(self):
    flat = jax.tree_util.tree_leaves_with_path(self.params)
    for path, x in flat:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if name.endswith(("kernel", "embedding")):
        self.assertLessEqual(np.abs(x).max(), 0.04, name)
        if x.size > 10_000:
          # 0.02 sqrt(1 - 4 pdf(2) / (2 cdf(2) - 1)); 3 sigma of 10,000 draws
          self.assertAlmostEqual(float(x.std()), 0.01760, delta=4e-4, msg=name)
      else:
        np.testing.assert_array_equal(x, 1.0 if name.endswith("scale") else 0.0)

  def test_the_loss_starts_at_that_of_guessing(self):
    rng = np.random.default_rng(0)
    batch = {
      "tokens": rng.integers(0, 997, (16, 32), np.int32),
      "masked_positions": np.tile(np.arange(0, 32, 4, dtype=np.int32), (16, 1)),
      "labels": rng.integers(0, 997, (16, 8), np.int32),
      "pair_labels": rng.integers(0, 2, (16,), np.int32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    sums, metrics = jax.jit(
      lambda params: self.objective.apply(
        {"params": params}, batch, train=False
      )
    )(self.params)
    # Logits have a spread of about 0.2, which adds half its square.
    self.assertAlmostEqual(float(sums["mlm"]) / 128, math.log(997), delta=0.1)
    self.assertAlmostEqual(float(sums["nsp"]) / 16, math.log(2), delta=0.1)
    self.assertEqual(float(metrics["nsp_accuracy"][1]), 16)


if __name__ == "__main__":
  absltest.main()
