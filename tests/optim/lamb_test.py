"""LAMB, LARS and AdamW against invariants and independent implementations."""

import functools
import itertools
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from bertjax.optim import (
  adam,
  adamw,
  build_optimizer,
  clip,
  clip_by_global_norm,
  lamb,
  lars,
  layer_statistics,
  scale_by_trust_ratio,
  state_shardings,
  trust_ratio,
)

NOTHING = lambda name, leaf: False  # noqa: E731
STEPS = 10


def unstacked(seed=0):
  """Three layers of very different scale, a bias, a zero tensor."""
  keys = jax.random.split(jax.random.key(seed), 5)
  layers = {
    f"layers_{i}": {
      "kernel": scale * jax.random.normal(keys[i], (5, 7)),
      "bias": scale * jax.random.normal(keys[i + 1], (7,)),
    }
    for i, scale in enumerate((1.0, 10.0, 0.1))
  }
  return {**layers, "embedding": jax.random.normal(keys[4], (11, 5))}


def stack(tree):
  """The scanned twin of an unstacked tree."""
  layers = [tree[f"layers_{i}"] for i in range(3)]
  return {
    "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers),
    "embedding": tree["embedding"],
  }


LOGICAL = {
  "layers": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
  "embedding": ("vocab", "embed"),
}
stacked_axes = {
  "layers": {"kernel": (0,), "bias": (0,)},
  "embedding": (),
}


def gradients(params, step):
  """A fixed non-convex-looking gradient that depends on params and step."""
  return jax.tree.map(lambda p: jnp.sin(3.0 * p + step) + 0.1 * p, params)


def run(transform, params, steps=STEPS, grad_fn=gradients):
  """Parameters after every step, and the last state."""

  @jax.jit
  def one(params, state, step):
    updates, state = transform.update(grad_fn(params, step), state, params)
    return optax.apply_updates(params, updates), state

  state, path = transform.init(params), [params]
  for step in range(steps):
    params, state = one(params, state, float(step))
    path.append(params)
  return path, state


def assert_close(actual, expected, rtol, atol=0.0):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    actual,
    expected,
  )


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
    updates, _ = transform.update(
      gradients(params, 0.0), transform.init(params), params
    )
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
    big = jax.tree.map(lambda p: 8.0 * p, params)
    grads = gradients(params, 0.0)
    small_u, _ = transform.update(grads, transform.init(params), params)
    big_u, _ = transform.update(grads, transform.init(big), big)
    # A power of two: exact. Biases are not adapted, so they do not scale.
    np.testing.assert_array_equal(
      big_u["embedding"], 8.0 * small_u["embedding"]
    )
    np.testing.assert_array_equal(
      big_u["layers_1"]["bias"], small_u["layers_1"]["bias"]
    )

  def test_zero_weights_or_zero_update_have_ratio_one(self):
    params = {"a": jnp.zeros((3, 2)), "b": jnp.ones((3, 2))}
    grads = {"a": jnp.ones((3, 2)), "b": jnp.zeros((3, 2))}
    transform = lamb(0.5, weight_decay=0.0, trust_clip=(0.0, 0.1))
    updates, state = transform.update(grads, transform.init(params), params)
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
    params = {"w": 100.0 * jnp.ones((4, 3)), "v": 1e-6 * jnp.ones((4, 3))}
    transform = lamb(1.0, eps=0.0, weight_decay=0.0, **options)
    _, state = transform.update(params, transform.init(params), params)
    ratios = layer_statistics(state)
    self.assertAlmostEqual(float(ratios["w"]["ratio"]), highest, places=6)
    np.testing.assert_allclose(
      ratios["v"]["ratio"],
      max(1e-6, options["trust_clip"][0]),  # Adam's first step is 1 each
      rtol=1e-5,
    )

  def test_phi_bounds_the_weight_norm(self):
    params = {"w": 100.0 * jnp.ones((4, 3))}
    transform = lamb(1.0, weight_decay=0.0, phi_clip=(0.0, 10.0))
    updates, _ = transform.update(params, transform.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates["w"]), 10.0, rtol=1e-6)

  def test_norms_of_low_precision_weights_are_float32(self):
    transform = scale_by_trust_ratio(no_adaptation=NOTHING)
    params = {"w": jnp.full((1_000_000,), 0.01, jnp.bfloat16)}
    updates, state = transform.update(params, transform.init(params), params)
    # 0.01 in bfloat16 is 0.010009765625; float32 tree sum of a million terms.
    np.testing.assert_allclose(
      layer_statistics(state)["w"]["weight_norm"], 10.009765625, rtol=1e-5
    )
    self.assertEqual(updates["w"].dtype, jnp.bfloat16)


class FusedTest(parameterized.TestCase):
  """Query, key and value in one tensor."""

  def run_once(self, kernel, **options):
    transform = lamb(0.01, **options)
    params = {"qkv": kernel}
    return transform.update(
      gradients(params, 0.0), transform.init(params), params
    )

  @parameterized.named_parameters(
    ("own_axis", (5, 3, 2, 4), (-3, 3)),
    ("side_by_side", (5, 24), (-1, 3)),
  )
  def test_split_equals_three_tensors(self, shape, part):
    kernel = jax.random.normal(jax.random.key(0), shape)
    scale = jnp.repeat(jnp.array([1.0, 10.0, 0.1]), shape[part[0]] // 3)
    rank = [1] * len(shape)
    rank[part[0]] = shape[part[0]]
    kernel = kernel * scale.reshape(rank)
    fused, state = self.run_once(kernel, split=lambda name, leaf: part)
    parts = [
      self.run_once(piece)[0]["qkv"]
      for piece in jnp.split(kernel, 3, axis=part[0])
    ]
    # Same sums, another order.
    np.testing.assert_allclose(
      fused["qkv"], jnp.concatenate(parts, part[0]), rtol=2e-6
    )
    self.assertEqual(layer_statistics(state)["qkv"]["ratio"].shape, (3,))

  def test_split_under_a_stack(self):
    kernel = jax.random.normal(jax.random.key(1), (2, 5, 24))
    both, state = self.run_once(
      kernel, split=lambda n, x: (-1, 3), stacked_axes=lambda n, x: (0,)
    )
    self.assertEqual(layer_statistics(state)["qkv"]["ratio"].shape, (2, 3))
    for i in range(2):
      one, _ = self.run_once(kernel[i], split=lambda n, x: (-1, 3))
      np.testing.assert_allclose(both["qkv"][i], one["qkv"], rtol=2e-6)

  def test_uneven_split_is_refused(self):
    with self.assertRaisesRegex(ValueError, "qkv: axis 1 of length 24 .* 5"):
      self.run_once(jnp.ones((5, 24)), split=lambda name, leaf: (-1, 5))


class PeersTest(parameterized.TestCase):
  """Independent implementations, and limiting cases."""

  @parameterized.product(weight_decay=(0.0, 0.01), nesterov=("none", "first"))
  def test_unadapted_is_optax_adamw(self, weight_decay, nesterov):
    mine, _ = run(
      lamb(
        1e-2,
        adapt=False,
        weight_decay=weight_decay,
        nesterov=nesterov,
        no_decay=["bias"],
      ),
      unstacked(),
    )
    theirs, _ = run(
      optax.adamw(
        1e-2,
        eps=1e-6,
        weight_decay=weight_decay,
        nesterov=nesterov == "first",
        mask=lambda params: jax.tree_util.tree_map_with_path(
          lambda path, _: path[-1].key != "bias", params
        ),
      ),
      unstacked(),
    )
    # Rounding of ten steps of |w| up to 30.
    assert_close(mine[-1], theirs[-1], rtol=1e-6, atol=1e-6)

  @parameterized.parameters(0.0, 0.01)
  def test_defaults_without_exclusions_are_optax_lamb(self, weight_decay):
    mine, _ = run(
      lamb(
        1e-2,
        weight_decay=weight_decay,
        no_decay=NOTHING,
        no_adaptation=NOTHING,
      ),
      unstacked(),
    )
    theirs, _ = run(optax.lamb(1e-2, weight_decay=weight_decay), unstacked())
    assert_close(mine[-1], theirs[-1], rtol=1e-6, atol=1e-6)

  def test_adam_and_adamw_are_optax(self):
    for mine, theirs in (
      (adam(1e-2), optax.adam(1e-2)),
      (
        adamw(1e-2, eps=1e-8, no_decay=NOTHING),
        optax.adamw(1e-2, weight_decay=0.01),
      ),
    ):
      assert_close(
        run(mine, unstacked())[0][-1],
        run(theirs, unstacked())[0][-1],
        rtol=1e-6,
        atol=1e-6,
      )

  def quadratic(self):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6)).astype(np.float32)
    start = rng.normal(size=(6,)).astype(np.float32)
    return root @ root.T / 6, start

  def mine(self, transform, steps=20):
    matrix, start = self.quadratic()
    path, _ = run(
      transform,
      {"w": jnp.asarray(start)},
      steps,
      lambda p, t: {"w": jnp.asarray(matrix) @ p["w"]},
    )
    return path[-1]["w"]

  def test_lamb_is_keras_lamb(self):
    import keras

    matrix, start = self.quadratic()
    weight = keras.Variable(start)
    peer = keras.optimizers.Lamb(learning_rate=0.02, epsilon=1e-6)
    for _ in range(20):
      peer.apply([jnp.asarray(matrix) @ weight.value], [weight])
    # 20 steps of float32 rounding.
    np.testing.assert_allclose(
      self.mine(lamb(0.02, weight_decay=0.0)),
      np.asarray(weight.value),
      rtol=1e-5,
      atol=1e-6,
    )

  @parameterized.parameters(0.0, 0.1)
  def test_adamw_is_torch_adamw(self, weight_decay):
    import torch

    matrix, start = self.quadratic()
    weight = torch.tensor(start, requires_grad=True)
    peer = torch.optim.AdamW(
      [weight], lr=0.02, eps=1e-6, weight_decay=weight_decay
    )
    for _ in range(20):
      weight.grad = torch.tensor(matrix) @ weight.detach()
      peer.step()
    np.testing.assert_allclose(
      self.mine(adamw(0.02, weight_decay=weight_decay)),
      weight.detach().numpy(),
      rtol=1e-5,  # 20 steps of float32 rounding
      atol=1e-6,
    )

  def test_uncorrected_adam_has_the_closed_form(self):
    """Gradient 1: u_t = (1 - b1^t) / (sqrt(1 - b2^t) + eps)."""
    transform = adamw(1.0, bias_correction=False, weight_decay=0.0)
    params = {"w": jnp.zeros(())}
    state = transform.init(params)
    for t in range(1, 21):
      updates, state = transform.update({"w": jnp.ones(())}, state, params)
      expected = (1 - 0.9**t) / (np.sqrt(1 - 0.999**t) + 1e-6)
      # Twenty float32 roundings, of 1 - 0.999 above all (6e-5 relative ulp).
      np.testing.assert_allclose(-updates["w"], expected, rtol=1e-4)
      if t == 1:
        self.assertAlmostEqual(-float(updates["w"]), 3.1622, delta=2e-4)

  def test_grad_averaging_off_sums_gradients(self):
    """Gradient 1, no correction: m_t = (1 - b1^t) / (1 - b1)."""
    transform = lamb(
      1.0,
      adapt=False,
      weight_decay=0.0,
      bias_correction=False,
      grad_averaging=False,
    )
    params = {"w": jnp.ones(())}
    updates, _ = transform.update(
      {"w": jnp.ones(())}, transform.init(params), params
    )
    np.testing.assert_allclose(
      -updates["w"], 1.0 / (np.sqrt(0.001) + 1e-6), rtol=1e-4
    )

  def test_nn_lamb_looks_ahead_in_both_moments(self):
    """Constant gradient g: both closed forms of the appendix, at step 1."""
    transform = lamb(1.0, adapt=False, weight_decay=0.0, nesterov="both")
    params = {"w": jnp.ones(())}
    updates, _ = transform.update(
      {"w": jnp.full((), 2.0)}, transform.init(params), params
    )
    first, second = (
      0.9 * 0.1 * 2 / (1 - 0.9**2) + 0.1 * 2 / (1 - 0.9),
      0.999 * 0.001 * 4 / (1 - 0.999**2) + 0.001 * 4 / (1 - 0.999),
    )
    np.testing.assert_allclose(
      -updates["w"], first / np.sqrt(second), rtol=1e-4
    )

  def test_independent_decay_follows_the_schedule_not_the_peak(self):
    params = {"w": jnp.ones((3,))}
    moved = []
    for rate in (1e-2, 1e-3):
      spec = dict(
        name="adamw",
        learning_rate=rate,
        weight_decay=0.1,
        weight_decay_form="independent",
        schedule=dict(name="linear"),
      )
      transform = build_optimizer(spec, total_steps=4, params=params).transform
      state = transform.init(params)
      for _ in range(2):
        updates, state = transform.update({"w": jnp.zeros((3,))}, state, params)
        moved.append(float(updates["w"][0]))
    # Zero gradient: only decay, at rate / peak = 1 and 3/4.
    np.testing.assert_allclose(moved, [-0.1, -0.075] * 2, rtol=1e-6)


class SwitchesTest(parameterized.TestCase):
  def test_rules_are_independent(self):
    params = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"bias": jnp.ones(2)}}
    _, state = run(
      lamb(0.01, no_decay=["kernel"], no_adaptation=["bias"]), params, 1
    )
    statistics = layer_statistics(state)
    self.assertNotEqual(statistics["a/kernel"]["ratio"], 1.0)
    self.assertEqual(statistics["b/bias"]["ratio"], 1.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    transform = lamb(1.0, no_decay=["kernel"], no_adaptation=["bias"])
    updates, _ = transform.update(zero, transform.init(params), params)
    np.testing.assert_array_equal(updates["a"]["kernel"], 0.0)
    np.testing.assert_allclose(updates["b"]["bias"], -0.01, rtol=1e-6)

  @parameterized.parameters(
    (dict(weight_decay=0.0), {"w": 1.0, "u": 1.0}),
    (dict(weight_decay=0.1, no_decay=["w"]), {"w": 1.0, "u": 3.0 / 1.3}),
  )
  def test_skip_undecayed_adapts_only_what_decays(self, options, expected):
    params = {"w": jnp.full((4,), 3.0), "u": jnp.full((4,), 3.0)}
    transform = lamb(1.0, skip_undecayed=True, eps=0.0, **options)
    _, state = transform.update(params, transform.init(params), params)
    for name, ratio in expected.items():
      # 1 - 0.999 has 1.3e-5 in float32.
      np.testing.assert_allclose(
        layer_statistics(state)[name]["ratio"], ratio, rtol=1e-5
      )

  def test_pre_norm_divides_or_clips_the_gradient(self):
    grads = {"w": jnp.array([3.0, 4.0])}
    for pre_norm, factor in (("none", 1.0), ("divide", 0.2), ("clip", 0.4)):
      transform = lamb(1.0, pre_norm=pre_norm, max_grad_norm=2.0)
      _, state = transform.update(grads, transform.init(grads), grads)
      adam_state = next(s for s in state if hasattr(s, "mu"))
      np.testing.assert_allclose(
        adam_state.mu["w"], 0.1 * factor * grads["w"], rtol=1e-6
      )

  def test_clip_is_exact_below_and_reports_above(self):
    transform = clip_by_global_norm(5.5)
    grads = {"a": jnp.array([3.1, 4.1]), "b": jnp.zeros((2, 0))}
    same, state = transform.update(grads, transform.init(grads))
    np.testing.assert_array_equal(same["a"], grads["a"])
    np.testing.assert_allclose(state.norm, np.hypot(3.1, 4.1), rtol=1e-6)
    double = jax.tree.map(lambda g: 2 * g, grads)
    clipped, state = transform.update(double, state)
    np.testing.assert_allclose(np.linalg.norm(clipped["a"]), 5.5, rtol=1e-6)
    np.testing.assert_allclose(state.norm, 2 * np.hypot(3.1, 4.1), rtol=1e-6)

  def test_clip_per_shard_clips_each_and_averages(self):
    # Gradients (3, 4), (0, 1), (0.6, 0) and (0, 0) of the shards' own means.
    own = np.array([[3.0, 4.0], [0.0, 1.0], [0.6, 0.0], [0.0, 0.0]])
    mesh = jax.make_mesh(
      (4,),
      ("data",),
      devices=jax.devices()[:4],
      axis_types=(jax.sharding.AxisType.Auto,),
    )
    transform = clip.clip_per_shard(2.0)
    spec = jax.sharding.PartitionSpec

    def update(part):
      grads = {"w": part[0]}
      found, state = transform.update(grads, transform.init(grads))
      return found["w"], state.norm

    found, norm = jax.shard_map(
      update, mesh=mesh, in_specs=spec("data"), out_specs=spec()
    )(jnp.asarray(own / 4, jnp.float32))
    expected = (np.array([[1.2, 1.6], *own[1:]])).mean(0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(norm, (5 + 1 + 0.6 + 0) / 4, rtol=1e-6)

  @parameterized.parameters(
    (dict(clip_scope="core"), "optim.clip_scope='core' is unknown"),
    (dict(clip_scope="per_shard"), "'per_shard' needs optim.clip_norm"),
  )
  def test_bad_clipping_is_refused(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      build_optimizer(
        dict(name="lamb", learning_rate=0.1, **options),
        total_steps=9,
        params=unstacked(),
      )

  @parameterized.parameters(
    (dict(nesterov="third"), "optim.nesterov='third' is unknown"),
    (dict(pre_norm="half"), "optim.pre_norm='half' is unknown"),
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

    x_all, y_all = jnp.asarray(x), jnp.asarray(y)
    # LAMB grows |w| by at most exp(sum of rates): enough to reach the optimum.
    steps = 600
    rate = 0.1 * np.sqrt(batch_size / 64)
    transform = lamb(optax.linear_schedule(rate, 0.0, steps), weight_decay=0.0)

    @jax.jit
    def one(carry, rows):
      params, state = carry
      grads = jax.grad(loss)(params, rows)
      updates, state = transform.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    params = {"w": jnp.full((5,), 0.1)}
    rows = rng.integers(0, 64, size=(steps, batch_size))
    (after, _), _ = jax.lax.scan(
      one, (params, transform.init(params)), jnp.asarray(rows)
    )
    norm = lambda p: float(  # noqa: E731
      jnp.linalg.norm(jax.grad(loss)(p, jnp.arange(64))["w"])
    )
    self.assertLess(norm(after), 0.5 * norm(params))


class ShardedTest(parameterized.TestCase):
  """Eight devices, fsdp x model, against one device."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.mesh = jax.make_mesh(
      (4, 2),
      ("fsdp", "model"),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    key = jax.random.key(0)
    cls.params = {
      "layers": {
        "kernel": jax.random.normal(key, (3, 8, 6)),
        "bias": jax.random.normal(key, (3, 6)),
      },
      "embedding": 5.0 * jax.random.normal(key, (16, 8)),
    }
    spec = jax.sharding.PartitionSpec
    cls.specs = {
      "layers": {
        "kernel": spec(None, "fsdp", "model"),
        "bias": spec(None, "model"),
      },
      "embedding": spec(("fsdp", "model")),
    }
    cls.config = dict(
      name="lamb", learning_rate=0.01, clip_norm=1.0, pre_norm="divide"
    )
    cls.expected = run(cls.optimizer().transform, cls.params)

  @classmethod
  def optimizer(cls, **options):
    return build_optimizer(
      cls.config,
      total_steps=STEPS,
      params=cls.params,
      logical_axes=LOGICAL,
      **options,
    )

  def check(self, params, state):
    # Ten steps of sums in another order.
    assert_close(params, self.expected[0][-1], rtol=1e-5, atol=1e-5)
    assert_close(
      layer_statistics(state),
      layer_statistics(self.expected[1]),
      rtol=1e-5,
    )

  def shard(self, tree):
    return jax.tree.map(
      lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(self.mesh, s)),
      tree,
      self.specs,
    )

  def test_jit(self):
    path, state = run(self.optimizer().transform, self.shard(self.params))
    self.check(path[-1], state)
    adam_state = state[2][1]
    for moment in (adam_state.mu, adam_state.nu):
      self.assertEqual(
        moment["layers"]["kernel"].sharding.spec,
        self.specs["layers"]["kernel"],
      )

  def test_shard_map(self):
    transform = self.optimizer(param_specs=self.specs).transform
    state = self.optimizer().transform.init(self.params)
    replicated = jax.sharding.PartitionSpec()
    state_specs = state_shardings(state, self.params, self.specs, replicated)
    self.assertEqual(state_specs[2][1].mu["embedding"], self.specs["embedding"])

    @jax.jit
    @functools.partial(
      jax.shard_map,
      mesh=self.mesh,
      in_specs=(self.specs, state_specs, replicated),
      out_specs=(self.specs, state_specs),
    )
    def one(params, state, step):
      updates, state = transform.update(gradients(params, step), state, params)
      return optax.apply_updates(params, updates), state

    params = self.shard(self.params)
    for step in range(STEPS):
      params, state = one(params, state, jnp.float32(step))
    self.check(params, state)

  def test_a_sharded_stack_axis_holds_other_layers(self):
    spec = jax.sharding.PartitionSpec
    norm_axes = trust_ratio.norm_axes_from_specs(
      {"w": spec("fsdp", ("model", "seq"))}, lambda name, leaf: (0,)
    )
    self.assertEqual(norm_axes("w", jnp.ones((4, 2))), ("model", "seq"))


if __name__ == "__main__":
  absltest.main()
