"""When and on what a second-order method acts, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from bertjax.optim import build_optimizer, curvature_metrics
from bertjax.optim.preconditioning.layers import find_layers
from tests.optim.one_layer import (
  IN,
  PATH,
  build,
  curvature,
  direction,
  gradients,
  matrix,
  parameters,
  samples,
  statistics,
)


def _two_layers(name, **options):
  """SGD at rate 1 behind a method, parameters, gradients and statistics."""
  layer = parameters()[PATH]
  params = {"a": layer, "b": layer}
  spec = dict(name=name) | options
  transform = build_optimizer(
    dict(name="sgd", learning_rate=1.0, precondition=spec),
    total_steps=9,
    params=params,
  ).transform
  transform = transform._replace(update=jax.jit(transform.update))
  grads = {k: gradients(*samples(i))[PATH] for i, k in enumerate(params)}
  found = {k: statistics(*samples(i))[PATH] for i, k in enumerate(params)}
  return transform, params, grads, found


class ActingTest(parameterized.TestCase):
  def test_other_parameters_pass(self):
    x, g = samples()
    transform = build("mkor")
    params = parameters()
    updates, _ = transform.update(
      gradients(x, g), transform.init(params), params,
      statistics=statistics(x, g),
    )  # fmt: skip
    np.testing.assert_allclose(
      updates["other"], -0.5 * gradients(x, g)["other"]
    )

  @parameterized.parameters("exact", "reference")
  def test_joint_rescaling_keeps_the_length(self, rule):
    found, _ = direction("mkor", rule=rule, rescale="joint", interval=1)
    gradient = matrix(gradients(*samples(0)))
    self.assertAlmostEqual(
      np.linalg.norm(found), np.linalg.norm(gradient), places=5
    )
    self.assertGreater(np.abs(found - gradient).max(), 1e-2)

  def test_sum_rescaling_adds_the_norms_of_weight_and_bias(self):
    found, _ = direction("mkor", rescale="sum")
    plain, _ = direction("mkor", rescale="none")
    gradient = matrix(gradients(*samples(0)))

    def norm(matrix):
      return np.linalg.norm(matrix[:, :-1]) + np.linalg.norm(matrix[:, -1])

    np.testing.assert_allclose(
      found, plain * norm(gradient) / norm(plain), rtol=1e-5, atol=1e-7
    )

  @parameterized.parameters(1e-9, 1e9)
  def test_kl_clip_bounds_the_step(self, kl_clip):
    plain, _ = direction("eva", rescale="none")
    found, _ = direction("eva", rescale="kl", kl_clip=kl_clip)
    gradient = matrix(gradients(*samples(0)))
    divergence = 0.5**2 * np.sum(plain * gradient)
    factor = min(1.0, (kl_clip / divergence) ** 0.5)
    np.testing.assert_allclose(found, factor * plain, rtol=1e-4, atol=1e-9)

  def test_factors_change_when_a_refresh_is_due(self):
    transform = build("mkor", interval=4, warmup_steps=2)
    params, changed = parameters(), []
    state = transform.init(params)
    for step in range(10):
      x, g = samples(step)
      before = jax.device_get(curvature(state).factors)
      _, state = transform.update(
        gradients(x, g), state, params, statistics=statistics(x, g)
      )
      after = jax.device_get(curvature(state).factors)
      if any(jax.tree.leaves(jax.tree.map(
        lambda a, b: bool(np.any(a != b)), before, after
      ))):  # fmt: skip
        changed.append(step)
    self.assertEqual(changed, [0, 1, 4, 8])

  @parameterized.parameters((dict(max_width=1), 0), (dict(interval=None), 2))
  def test_identity_factors_are_the_optimizer_alone(self, options, stored):
    """No side is narrow enough, or nothing is ever refreshed."""
    inner = dict(name="lamb", learning_rate=0.1)
    params = parameters()
    paths = []
    for spec in (inner, inner | dict(precondition=dict(
      name="mkor", **options
    ))):  # fmt: skip
      transform = build_optimizer(spec, total_steps=9, params=params).transform
      state, now = transform.init(params), params
      for step in range(3):
        x, g = samples(step)
        updates, state = transform.update(
          gradients(x, g), state, now, statistics=statistics(x, g)
        )
        now = optax.apply_updates(now, updates)
      paths.append(now)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *paths
    )
    self.assertLen(jax.tree.leaves(curvature(state).factors), stored)

  def test_a_direction_that_is_not_finite_falls_back_and_is_counted(self):
    transform = build("mkor", rule="exact", rescale="joint")
    params = parameters()
    state = transform.init(params)
    x, g = samples()
    found, grads = statistics(x, g), gradients(x, g)
    _, after = transform.update(grads, state, params, statistics=found)
    self.assertEqual(curvature_metrics(after)["curvature_fallbacks"], 0)
    # Factors that have collapsed: 0 / 0.
    collapsed = jax.tree.map(
      lambda leaf: jnp.zeros_like(leaf) if leaf.ndim else leaf, state
    )
    updates, after = transform.update(
      grads, collapsed, params, statistics=found
    )
    self.assertEqual(curvature_metrics(after)["curvature_fallbacks"], 1)
    np.testing.assert_allclose(matrix(updates), -0.5 * matrix(grads))

  @parameterized.parameters(np.nan, np.inf)
  def test_one_layer_that_fails_leaves_the_others_their_clip(self, bad):
    """The factor of all is that of what is moved along."""
    transform, params, grads, found = _two_layers("eva", kl_clip=1e-3)
    state = transform.init(params)
    _, state = transform.update(grads, state, params, statistics=found)
    broken = jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.full_like(x, bad) if "'b'" in str(path) else x, state
    )
    updates, after = transform.update(grads, broken, params, statistics=found)
    self.assertEqual(curvature_metrics(after)["curvature_fallbacks"], 1)
    self.assertTrue(np.isfinite(updates["a"]["kernel"]).all())
    # lr^2 sum D.G is the bound, with the gradient for the broken direction.
    moved = sum(
      -np.sum(updates[layer][name] * grads[layer][name])
      for layer in grads for name in grads[layer]
    )  # fmt: skip
    factor = -updates["b"]["kernel"][0, 0] / grads["b"]["kernel"][0, 0]
    self.assertLess(factor, 1)
    self.assertAlmostEqual(moved * factor, 1e-3, places=6)

  @parameterized.parameters("kfac", "eva", "mkor")
  def test_a_layer_that_the_loss_does_not_reach_stays_and_is_not_asked(
    self, name
  ):
    transform, params, grads, found = _two_layers(name)
    grads["b"] = jax.tree.map(jnp.zeros_like, grads["b"])
    found["b"] = jax.tree.map(jnp.zeros_like, found["b"])
    state = transform.init(params)
    updates, after = transform.update(grads, state, params, statistics=found)
    before, factors = (curvature(s).factors["b"] for s in (state, after))
    if name == "kfac":  # its decompositions round
      before, factors = ((x.output, x.input) for x in (before, factors))
    jax.tree.map(np.testing.assert_array_equal, factors, before)
    self.assertFalse(np.any(updates["b"]["kernel"]))
    alone, params, grads, found = _two_layers(name, first_order=["b/"])
    found.pop("b")
    grads["b"] = jax.tree.map(jnp.zeros_like, grads["b"])
    expected, _ = alone.update(
      grads, alone.init(params), params, statistics=found
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
      updates["a"],
      expected["a"],
    )

  def test_frozen_layers_are_not_asked_for_statistics(self):
    layer = parameters()[PATH]
    for first_order in ([], ["a/"]):  # a rule may name what freezes
      built = build_optimizer(
        dict(name="sgd", learning_rate=0.1, freeze=["a/"],
             precondition=dict(name="kfac", first_order=first_order)),
        total_steps=9,
        params={"a": layer, "b": layer},
      )  # fmt: skip
      self.assertEqual(set(built.statistics.names), {"b"})
    with self.assertRaisesRegex(ValueError, "and optim.freeze leave"):
      build_optimizer(
        dict(name="sgd", learning_rate=0.1, freeze=["layer"],
             precondition=dict(name="kfac")),
        total_steps=9,
        params=parameters(),
      )  # fmt: skip

  def test_no_gradient_is_no_failure(self):
    transform = build("mkor")
    params = parameters()
    x, g = samples()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = transform.update(
      zeros, transform.init(params), params,
      statistics=statistics(x, jnp.zeros_like(g)),
    )  # fmt: skip
    self.assertEqual(curvature_metrics(state)["curvature_fallbacks"], 0)
    self.assertFalse(any(np.any(u) for u in jax.tree.leaves(updates)))

  def test_captured_is_the_share_of_the_mean_in_the_inputs(self):
    transform = build("eva", measure_captured=True, interval=2)
    params = parameters()
    state = transform.init(params)
    for seed in range(2):  # the second step is not due
      x, g = samples(seed)
      _, state = transform.update(
        gradients(x, g), state, params, statistics=statistics(x, g)
      )
    x = np.asarray(samples(0)[0])
    share = np.sum(x.mean(0) ** 2) / np.mean(np.sum(x * x, 1))
    self.assertAlmostEqual(
      curvature_metrics(state)["captured"], share, places=5
    )

  @parameterized.parameters(
    (dict(name="mkr"), "optim.precondition.name='mkr' is unknown.*'mkor'"),
    (dict(name="mkor", rule="printed"), "precondition.rule='printed'"),
    (dict(name="mkor", norm="l2"), "precondition.norm='l2' is unknown"),
    (dict(name="mkor", dtype="int8"), "precondition.dtype='int8' is unknown"),
    (dict(name="mkor", interval=0), "interval=0 must be an int of at least 1"),
    (dict(name="mkor", decay=1.0), "precondition.decay=1.0 must be between"),
    (dict(name="mkor", rescale="l1"), "precondition.rescale='l1' is unknown"),
    (dict(name="mkor", rule="paper", rank=2), "rank=2 needs rule='exact'"),
    (dict(name="mkor", first_order=["nowhere"]), "pattern 'nowhere' matches"),
    (dict(name="mkor", first_order=["layer"]), "no linear layer to act on"),
    (dict(name="mkor", switch=dict(windw=2)), "switch.windw is not an option"),
    (dict(name="mkor", switch=dict(patience=0)), "switch.patience=0 must be"),
    (dict(name="eva", damping=0.0), "precondition.damping=0.0 must be a pos"),
    (dict(name="kfac", inverse_interval=3, interval=2), "a multiple of"),
    (dict(name="sngd"), "optim.precondition.rank is required"),
    (dict(name="hylo", rank=2, window=0), "window=0 must be a positive int"),
    (dict(name="mkor", sides="top"), "precondition.sides='top' is unknown"),
    (dict(name="mkor", block_width=0), "block_width=0 must be a positive int"),
    (dict(name="mkor", rank="2"), "precondition.rank='2' must be a positive"),
    (dict(name="kfac", inverse_interval=None), "inverse_interval=None must be"),
    (dict(name="eva", decay=None), "precondition.decay=None must be a non-neg"),
    (dict(name="mkor", rank=3, svd_groups=3), "svd_groups=3 must exceed rank"),
    (dict(name="kfac", grad_worker_fraction=2.0), "fraction=2.0 must be in"),
  )
  def test_bad_options_are_refused(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      build_optimizer(
        dict(name="lamb", learning_rate=0.1, precondition=spec),
        total_steps=9,
        params=parameters(),
      )

  @parameterized.parameters(
    dict(name="onebit_adam", freeze_step=2),
    dict(name="adamw", clip_scope="per_shard", clip_norm=1.0),
  )
  def test_local_gradients_are_refused(self, **spec):
    with self.assertRaisesRegex(ValueError, "needs the gradient of the batch"):
      build_optimizer(
        spec | dict(learning_rate=0.1, precondition=dict(name="mkor")),
        total_steps=9,
        params=parameters(),
      )

  def test_missing_statistics_are_named(self):
    transform = build("kfac")
    params = parameters()
    state = transform.init(params)
    with self.assertRaisesRegex(ValueError, "statistics is required"):
      transform.update(params, state, params)
    with self.assertRaisesRegex(ValueError, "lack 'token_count' of .*'layer'"):
      transform.update(params, state, params, statistics={})

  def test_a_frozen_bias_leaves_a_layer_without_one(self):
    transform = build_optimizer(
      dict(name="lamb", learning_rate=0.1, precondition=dict(name="mkor"),
           freeze=["bias"]),
      total_steps=9,
      params=parameters(),
    ).transform  # fmt: skip
    state = transform.init(parameters())
    x, g = samples()
    updates, state = transform.update(
      gradients(x, g), state, parameters(), statistics=statistics(x, g)
    )
    self.assertFalse(np.any(updates[PATH]["bias"]))
    shapes = [factor.shape for factor in jax.tree.leaves(curvature(state))]
    self.assertIn((IN, IN), shapes)

  def test_axes_of_a_layer_without_bias_must_be_told(self):
    params = {"query": {"kernel": jnp.zeros((2, 3, 4))}}
    with self.assertRaisesRegex(ValueError, "no bias that tells inputs"):
      find_layers(params, lambda name, leaf: ())
    (layer,) = find_layers(params, lambda name, leaf: (), {"query": 2})
    self.assertEqual(layer.size, ((), 6, 4))
    self.assertEmpty(find_layers(params, lambda name, leaf: (), {}))


if __name__ == "__main__":
  absltest.main()
