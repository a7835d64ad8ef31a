"""LAMB and LARS: invariants, fused tensors, switches, convergence."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from bertjax.optim import lamb, lars, layer_statistics, scale_by_trust_ratio
from tests.optim.toy import (
  NOTHING,
  assert_close,
  first_update,
  gradients,
  run,
  stack,
  unstacked,
)

stacked_axes = {
  "layers": {"kernel": (0,), "bias": (0,)},
  "embedding": (),
}


class InvariantsTest(parameterized.TestCase):
  @parameterized.product(
    rule=(lamb, lars), schedule=(0.01, optax.constant_schedule(0.02))
  )
  def test_every_adapted_slice_moves_by_the_rate(self, rule, schedule):
    rate = schedule if isinstance(schedule, float) else 0.02
    path, _ = run(rule(schedule, stacked_axes=stacked_axes), stack(unstacked()))
    for before, after in itertools.pairwise(path):
      for pick in (lambda t: t["layers"]["kernel"], lambda t: t["embedding"]):
        w, new = (np.asarray(pick(t), np.float64) for t in (before, after))
        axes = tuple(range(w.ndim - 2, w.ndim))
        moved = np.sqrt(np.square(new - w).sum(axes))
        length = np.sqrt(np.square(w).sum(axes))
        # w - lr u is rounded in float32: eps |w| against lr |w| is 6e-6 per
        # coordinate and averages out over 35 of them.
        np.testing.assert_allclose(moved, rate * length, rtol=4e-6)

  def test_update_norm_is_exact_before_it_is_added(self):
    params = stack(unstacked())
    transform = lamb(0.01, stacked_axes=stacked_axes)
    updates, _ = first_update(transform, params)
    w, u = (
      np.asarray(t["layers"]["kernel"], np.float64) for t in (params, updates)
    )
    # 1e-6 is the sheet's bound; float32 sums of 35 squares stay below it.
    np.testing.assert_allclose(
      np.sqrt(np.square(u).sum((1, 2))),
      0.01 * np.sqrt(np.square(w).sum((1, 2))),
      rtol=1e-6,
    )

  @parameterized.named_parameters(
    ("lamb", functools.partial(lamb, 0.01)),
    ("lamb_clipped", functools.partial(lamb, 0.01, trust_clip=(0.01, 0.3))),
    ("lamb_phi", functools.partial(lamb, 0.01, phi_clip=(0.0, 10.0))),
    ("nn_lamb", functools.partial(lamb, 0.01, nesterov="both")),
    ("lars", functools.partial(lars, 0.01)),
  )
  def test_stacked_equals_unstacked(self, make):
    alone, state = run(make(), unstacked())
    scanned, scanned_state = run(
      make(stacked_axes=stacked_axes), stack(unstacked())
    )
    # Same arithmetic, other summation order.
    assert_close(scanned[-1], stack(alone[-1]), rtol=1e-6, atol=1e-6)
    ratios = layer_statistics(scanned_state)["layers/kernel"]["ratio"]
    self.assertEqual(ratios.shape, (3,))
    one_by_one = layer_statistics(state)
    np.testing.assert_allclose(
      ratios,
      [one_by_one[f"layers_{i}/kernel"]["ratio"] for i in range(3)],
      rtol=2e-6,
    )

  def test_without_metadata_a_stack_is_one_layer(self):
    _, state = run(lamb(0.01), stack(unstacked()), steps=1)
    self.assertEqual(
      layer_statistics(state)["layers/kernel"]["ratio"].shape, ()
    )

  def test_gradient_scale_is_irrelevant_without_eps(self):
    make = functools.partial(lamb, 0.01, eps=0.0)
    plain, _ = run(make(), unstacked())
    scaled, _ = run(
      make(),
      unstacked(),
      grad_fn=lambda p, t: jax.tree.map(lambda g: 1e3 * g, gradients(p, t)),
    )
    # 1e3 is no power of two: moments are rounded differently for ten steps.
    assert_close(scaled[-1], plain[-1], rtol=1e-5, atol=1e-6)

  def test_updates_scale_with_the_parameters(self):
    transform = lamb(0.01, weight_decay=0.0)
    params = unstacked()
    big = jax.tree.map(lambda p: np.float32(8) * np.asarray(p), params)
    grads = jax.jit(gradients)(params, 0.0)
    small_u, big_u = (
      jax.device_get(first_update(transform, p, grads)[0])
      for p in (params, big)
    )
    # A power of two: exact. Biases are not adapted, so they do not scale.
    np.testing.assert_array_equal(
      big_u["embedding"], 8.0 * small_u["embedding"]
    )
    np.testing.assert_array_equal(
      big_u["layers_1"]["bias"], small_u["layers_1"]["bias"]
    )

  def test_zero_weights_or_zero_update_have_ratio_one(self):
    zeros, ones = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)
    params, grads = {"a": zeros, "b": ones}, {"a": ones, "b": zeros}
    transform = lamb(0.5, weight_decay=0.0, trust_clip=(0.0, 0.1))
    updates, state = first_update(transform, params, grads)
    # Adam's first step is 1 per coordinate; 1 - 0.999 has 1.3e-5 in float32.
    np.testing.assert_allclose(updates["a"], -0.5, rtol=1e-5)
    np.testing.assert_array_equal(updates["b"], 0.0)
    for statistics in layer_statistics(state).values():
      self.assertEqual(statistics["ratio"], 1.0)

  @parameterized.named_parameters(
    ("trust", dict(trust_clip=(0.01, 0.3)), 0.3),
    ("lambc", dict(trust_clip=(0.0, 1.0)), 1.0),
  )
  def test_trust_ratio_is_clamped(self, options, highest):
    ones = np.ones((4, 3), np.float32)
    params = {"w": np.float32(100) * ones, "v": np.float32(1e-6) * ones}
    transform = lamb(1.0, eps=0.0, weight_decay=0.0, **options)
    _, state = first_update(transform, params, params)
    ratios = layer_statistics(state)
    self.assertAlmostEqual(float(ratios["w"]["ratio"]), highest, places=6)
    np.testing.assert_allclose(
      ratios["v"]["ratio"],
      max(1e-6, options["trust_clip"][0]),  # Adam's first step is 1 each
      rtol=1e-5,
    )

  def test_phi_bounds_the_weight_norm(self):
    params = {"w": np.full((4, 3), 100, np.float32)}
    transform = lamb(1.0, weight_decay=0.0, phi_clip=(0.0, 10.0))
    updates, _ = first_update(transform, params, params)
    np.testing.assert_allclose(np.linalg.norm(updates["w"]), 10.0, rtol=1e-6)

  def test_norms_of_low_precision_weights_are_float32(self):
    transform = scale_by_trust_ratio(no_adaptation=NOTHING)
    params = {"w": np.full((1_000_000,), 0.01, jnp.bfloat16)}
    updates, state = first_update(transform, params, params)
    # 0.01 in bfloat16 is 0.010009765625; float32 tree sum of a million terms.
    np.testing.assert_allclose(
      layer_statistics(state)["w"]["weight_norm"], 10.009765625, rtol=1e-5
    )
    self.assertEqual(updates["w"].dtype, jnp.bfloat16)


class FusedTest(parameterized.TestCase):
  """Query, key and value in one tensor."""

  def run_once(self, kernel, **options):
    return jax.device_get(first_update(lamb(0.01, **options), {"qkv": kernel}))

  @parameterized.named_parameters(
    ("own_axis", (5, 3, 2, 4), (-3, 3)),
    ("side_by_side", (5, 24), (-1, 3)),
  )
  def test_split_equals_three_tensors(self, shape, part):
    kernel = np.random.default_rng(0).normal(size=shape)
    scale = np.repeat(np.array([1.0, 10.0, 0.1]), shape[part[0]] // 3)
    rank = [1] * len(shape)
    rank[part[0]] = shape[part[0]]
    kernel = (kernel * scale.reshape(rank)).astype(np.float32)
    fused, state = self.run_once(kernel, split=lambda name, leaf: part)
    parts = [
      self.run_once(piece)[0]["qkv"]
      for piece in np.split(kernel, 3, axis=part[0])
    ]
    # Same sums, another order.
    np.testing.assert_allclose(
      fused["qkv"], np.concatenate(parts, part[0]), rtol=2e-6
    )
    self.assertEqual(layer_statistics(state)["qkv"]["ratio"].shape, (3,))

  def test_split_under_a_stack(self):
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(2, 5, 24)).astype(np.float32)
    both, state = self.run_once(
      kernel, split=lambda n, x: (-1, 3), stacked_axes=lambda n, x: (0,)
    )
    self.assertEqual(layer_statistics(state)["qkv"]["ratio"].shape, (2, 3))
    for i in range(2):
      one, _ = self.run_once(kernel[i], split=lambda n, x: (-1, 3))
      np.testing.assert_allclose(both["qkv"][i], one["qkv"], rtol=2e-6)

  def test_uneven_split_is_refused(self):
    with self.assertRaisesRegex(ValueError, "qkv: axis 1 of length 24 .* 5"):
      self.run_once(
        np.ones((5, 24), np.float32), split=lambda name, leaf: (-1, 5)
      )


class SwitchesTest(parameterized.TestCase):
  def test_rules_are_independent(self):
    params = {
      "a": {"kernel": np.ones((3, 2), np.float32)},
      "b": {"bias": np.ones(2, np.float32)},
    }
    _, state = run(
      lamb(0.01, no_decay=["kernel"], no_adaptation=["bias"]), params, 1
    )
    statistics = layer_statistics(state)
    self.assertNotEqual(statistics["a/kernel"]["ratio"], 1.0)
    self.assertEqual(statistics["b/bias"]["ratio"], 1.0)
    zero = jax.tree.map(np.zeros_like, params)
    transform = lamb(1.0, no_decay=["kernel"], no_adaptation=["bias"])
    updates, _ = first_update(transform, params, zero)
    np.testing.assert_array_equal(updates["a"]["kernel"], 0.0)
    np.testing.assert_allclose(updates["b"]["bias"], -0.01, rtol=1e-6)

  @parameterized.parameters(
    (dict(weight_decay=0.0), {"w": 1.0, "u": 1.0}),
    (dict(weight_decay=0.1, no_decay=["w"]), {"w": 1.0, "u": 3.0 / 1.3}),
  )
  def test_skip_undecayed_adapts_only_what_decays(self, options, expected):
    params = dict.fromkeys("wu", np.full(4, 3, np.float32))
    transform = lamb(1.0, skip_undecayed=True, eps=0.0, **options)
    _, state = first_update(transform, params, params)
    for name, ratio in expected.items():
      # 1 - 0.999 has 1.3e-5 in float32.
      np.testing.assert_allclose(
        layer_statistics(state)[name]["ratio"], ratio, rtol=1e-5
      )

  def test_pre_norm_divides_or_clips_the_gradient(self):
    grads = {"w": np.float32([3, 4])}
    for options, factor in (
      (dict(pre_norm="none"), 1.0),
      (dict(pre_norm="divide"), 0.2),
      (dict(pre_norm="clip"), 0.2),
      (dict(pre_norm="clip", max_grad_norm=2.0), 0.4),
    ):
      transform = lamb(1.0, **options)
      _, state = first_update(transform, grads, grads)
      adam_state = next(s for s in state if hasattr(s, "mu"))
      np.testing.assert_allclose(
        adam_state.mu["w"], 0.1 * factor * grads["w"], rtol=1e-6
      )

  @parameterized.parameters(
    (dict(nesterov="third"), "optim.nesterov='third' is unknown"),
    (dict(pre_norm="half"), "optim.pre_norm='half' is unknown"),
    (dict(max_grad_norm=2.0), "max_grad_norm=2.0 goes with optim.pre_norm='cl"),
    (dict(trust_clip=(2.0, 1.0)), r"optim.trust_clip=\(2.0, 1.0\)"),
    (dict(b1=1.0), "optim.b1=1.0 must be in"),
    (dict(mu_dtype="float16"), "optim.mu_dtype='float16' is unknown"),
    (dict(weight_decay=-1.0), "optim.weight_decay=-1.0"),
  )
  def test_bad_options_are_refused(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      lamb(0.1, **options)

  def test_a_rule_that_matches_nothing_is_refused(self):
    with self.assertRaisesRegex(ValueError, "optim.no_adaptation: pattern"):
      lamb(0.1, no_adaptation=["nowhere"]).init(unstacked())


class ConvergenceTest(parameterized.TestCase):
  @parameterized.parameters(1, 8, 64)
  def test_gradient_norm_falls_on_logistic_regression(self, batch_size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 5)).astype(np.float32)
    y = (x @ rng.normal(size=5) + rng.normal(size=64) > 0).astype(np.float32)

    def loss(params, rows):
      logits = x_all[rows] @ params["w"]
      return optax.sigmoid_binary_cross_entropy(logits, y_all[rows]).mean()

    x_all, y_all = jax.device_put((x, y))
    # LAMB grows |w| by at most exp(sum of rates): enough to reach the optimum.
    steps = 600
    rate = 0.1 * np.sqrt(batch_size / 64)
    transform = lamb(optax.linear_schedule(rate, 0.0, steps), weight_decay=0.0)

    def one(carry, rows):
      params, state = carry
      grads = jax.grad(loss)(params, rows)
      updates, state = transform.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def trained(params, rows):
      carry = params, transform.init(params)
      return jax.lax.scan(one, carry, rows)[0][0]

    def norm(params):
      grads = jax.jit(jax.grad(loss))(params, np.arange(64))
      return np.linalg.norm(grads["w"])

    params = {"w": np.full((5,), 0.1, np.float32)}
    after = trained(params, rng.integers(0, 64, size=(steps, batch_size)))
    self.assertLess(norm(after), 0.5 * norm(params))


if __name__ == "__main__":
  absltest.main()
