"""Second-order directions against dense algebra; when and where they act."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.hardware import hlo
from bertjax.layers.statistics import NAMES
from bertjax.optim import (
  CurvatureState,
  build_optimizer,
  curvature_metrics,
  switch_now,
)
from bertjax.optim.preconditioning.layers import find_layers
from bertjax.optim.preconditioning.switch import SwitchRule
from tests.optim.workers import HIDDEN, INPUTS, OUTPUTS, Dense, batch, world

_ROWS, _IN, _OUT = 6, 5, 3
_PATH = "layer"


def _params(bias=True):
  keys = jax.random.split(jax.random.key(0))
  layer = {"kernel": jax.random.normal(keys[0], (_IN, _OUT))}
  if bias:
    layer["bias"] = jax.random.normal(keys[1], (_OUT,))
  return {_PATH: layer, "other": jnp.arange(4.0)}


def _samples(seed=1):
  """Inputs and gradients of the loss by outputs, of one token per row."""
  keys = jax.random.split(jax.random.key(seed))
  return (
    0.5 + jax.random.normal(keys[0], (_ROWS, _IN)),
    (0.2 + jax.random.normal(keys[1], (_ROWS, _OUT))) / _ROWS,
  )


def _statistics(x, g):
  found = dict(
    token_count=jnp.full((1, 1), _ROWS, jnp.float32),
    input_sum=x.sum(0)[None, None],
    output_sum=g.sum(0)[None, None],
    input_square=jnp.sum(x * x)[None, None],
    input_gram=(x.T @ x)[None],
    output_gram=(g.T @ g)[None],
    input_rows=x,
    output_rows=g,
  )
  assert set(found) == set(NAMES)
  return {_PATH: found}


def _gradients(x, g, bias=True):
  layer = {"kernel": x.T @ g}
  if bias:
    layer["bias"] = g.sum(0)
  return {_PATH: layer, "other": jnp.array([3.0, 1.0, -1.0, 2.0])}


def _build(name, bias=True, learning_rate=0.5, switch=None, **options):
  spec = dict(name=name) | options
  if switch is not None:
    spec["switch"] = switch
  return build_optimizer(
    dict(name="sgd", learning_rate=learning_rate, precondition=spec),
    total_steps=100,
    params=_params(bias),
  ).transform


def _curvature(state):
  leaves = jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, CurvatureState)
  )
  (found,) = [x for x in leaves if isinstance(x, CurvatureState)]
  return found


def _matrix(tree):
  """[W, b] of a layer's parameters, outputs by inputs."""
  layer = tree[_PATH]
  columns = [np.asarray(layer["kernel"]).T]
  if "bias" in layer:
    columns.append(np.asarray(layer["bias"])[:, None])
  return np.concatenate(columns, 1).astype(np.float64)


def _direction(name, bias=True, steps=1, rate=0.5, **options):
  """D of the last step, where every step has samples of its own."""
  transform = _build(name, bias, rate, **options)
  params = _params(bias)
  state = transform.init(params)
  update = jax.jit(transform.update)
  for seed in range(steps):
    x, g = _samples(seed)
    updates, state = update(
      _gradients(x, g, bias), state, params, statistics=_statistics(x, g)
    )
  return -_matrix(updates) / rate, state


def _homogeneous(x, bias=True):
  x = np.asarray(x, np.float64)
  return np.concatenate([x, np.ones((len(x), 1))], 1) if bias else x


class DirectionsTest(parameterized.TestCase):
  """Against dense matrices in float64."""

  def check(self, found, expected, rtol=2e-4):
    np.testing.assert_allclose(
      found, expected, rtol=rtol, atol=rtol * np.abs(expected).max()
    )

  @parameterized.product(bias=(True, False), rule=("exact", "reference"))
  def test_mkor(self, bias, rule):
    found, _ = _direction(
      "mkor", bias, steps=3, rule=rule, interval=1, rescale="none",
      dtype="float32", norm="spectral", threshold=1e6,
    )  # fmt: skip
    columns = _IN + int(bias)
    factors = [np.eye(_OUT), np.eye(columns)]
    for seed in range(3):
      x, g = _samples(seed)
      vectors = np.asarray(g).sum(0), _homogeneous(x, bias).mean(0)
      for i, u in enumerate(vectors):
        old = factors[i]
        if rule == "exact":
          outer = 0.95 * np.linalg.inv(old) + 0.05 * np.outer(u, u)
          factors[i] = np.linalg.inv(outer)
        else:
          drawn = np.linalg.inv(0.95 * old + 0.05 * np.eye(len(u)))
          factors[i] = np.linalg.inv(drawn + np.outer(u, u))
    gradient = _matrix(_gradients(*_samples(2), bias))
    self.check(found, factors[0] @ gradient @ factors[1])

  @parameterized.product(bias=(True, False), form=("eigen", "inverse"))
  def test_kfac(self, bias, form):
    damping = 0.1
    found, _ = _direction(
      "kfac", bias, form=form, damping=damping, decay=0.0, rescale="none"
    )
    x, g = _samples(0)
    a = _homogeneous(x, bias)
    g = np.asarray(g, np.float64)
    inputs = a.T @ a / _ROWS
    outputs = _ROWS * g.T @ g  # of gradients where the loss is their mean
    gradient = g.T @ a
    if form == "inverse":
      expected = np.linalg.solve(
        outputs + damping * np.eye(_OUT), gradient
      ) @ np.linalg.inv(inputs + damping * np.eye(len(inputs)))
    else:
      dense = np.kron(outputs, inputs)
      expected = np.linalg.solve(
        dense + damping * np.eye(len(dense)), gradient.ravel()
      ).reshape(gradient.shape)
    self.check(found, expected)

  def test_kfac_averages_from_the_identity_and_decomposes_at_intervals(self):
    options = dict(rescale="none", decay=0.9, damping=1e-2)
    _, state = _direction("kfac", steps=3, inverse_interval=2, **options)
    factors = _curvature(state).factors[_PATH]
    expected, decomposed = np.eye(_OUT), None
    for seed in range(3):
      g = np.asarray(_samples(seed)[1], np.float64)
      expected = 0.9 * expected + 0.1 * _ROWS * g.T @ g
      if seed % 2 == 0:
        decomposed = expected
    self.check(factors.output, expected)
    left = factors.left
    self.check(left.vectors @ np.diag(left.values) @ left.vectors.T, decomposed)
    _, state = _direction("kfac", steps=2, inverse_interval=2, **options)
    left = _curvature(state).factors[_PATH].left
    with self.assertRaises(AssertionError):
      self.check(
        left.vectors @ np.diag(left.values) @ left.vectors.T,
        _curvature(state).factors[_PATH].output,
      )

  def test_exact_factors_solve_a_whitened_regression_in_one_step(self):
    rng = np.random.default_rng(0)
    n = 64
    # Inputs of any covariance; targets are a white linear map of them.
    x = rng.normal(size=(n, _IN)) @ rng.normal(size=(_IN, _IN))
    white, _ = np.linalg.qr(x)
    target = white[:, :_OUT] * n**0.5
    weights = np.zeros((_IN, _OUT))
    g = (x @ weights - target) / n
    transform = _build(
      "kfac", bias=False, learning_rate=1.0, decay=0.0, damping=1e-7,
      rescale="none",
    )  # fmt: skip
    params = {_PATH: {"kernel": jnp.asarray(weights, jnp.float32)},
              "other": jnp.zeros(4)}  # fmt: skip
    found = dict(
      token_count=np.full((1, 1), n),
      input_gram=(x.T @ x)[None],
      output_gram=(g.T @ g)[None],
    )
    found = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), found)
    grads = {_PATH: {"kernel": jnp.asarray(x.T @ g, jnp.float32)},
             "other": jnp.zeros(4)}  # fmt: skip
    updates, _ = transform.update(
      grads, transform.init(params), params, statistics={_PATH: found}
    )
    weights = weights + np.asarray(updates[_PATH]["kernel"])
    np.testing.assert_allclose(x @ weights, target, atol=2e-3)

  @parameterized.parameters(True, False)
  def test_eva(self, bias):
    damping = 0.2
    found, _ = _direction(
      "eva", bias, steps=2, damping=damping, rescale="none", decay=0.9
    )
    vectors = None
    for seed in range(2):
      x, g = _samples(seed)
      new = np.asarray(g).sum(0), _homogeneous(x, bias).mean(0)
      vectors = new if vectors is None else [
        0.9 * v + 0.1 * u for v, u in zip(vectors, new)
      ]  # fmt: skip
    v = np.kron(*vectors)
    gradient = _matrix(_gradients(*_samples(1), bias))
    expected = np.linalg.solve(
      np.outer(v, v) + damping * np.eye(len(v)), gradient.ravel()
    )
    self.check(found, expected.reshape(gradient.shape))

  def _fisher(self, x, g, bias):
    v = np.stack([
      np.kron(_ROWS * row_g, row_a)
      for row_a, row_g in zip(_homogeneous(x, bias), np.asarray(g, np.float64))
    ])  # fmt: skip
    return v.T @ v / _ROWS

  @parameterized.product(
    bias=(True, False), reduction=("none", "interpolative")
  )
  def test_sngd_inverts_the_batch_s_fisher_matrix(self, bias, reduction):
    """All rows span themselves, so interpolation loses nothing."""
    found, _ = _direction(
      "sngd", bias, rank=_ROWS, reduction=reduction, damping=0.3,
      rescale="none",
    )  # fmt: skip
    x, g = _samples(0)
    fisher = self._fisher(x, g, bias)
    gradient = _matrix(_gradients(x, g, bias))
    expected = np.linalg.solve(
      fisher + 0.3 * np.eye(len(fisher)), gradient.ravel()
    )
    self.check(found, expected.reshape(gradient.shape), rtol=2e-3)

  def test_interpolation_needs_as_many_rows_as_there_are_directions(self):
    transform = _build(
      "sngd", rank=2, reduction="interpolative", damping=0.3, rescale="none"
    )
    x, g = _samples(0)
    # Rows 0 and 1, over and over, in other lengths.
    x = jnp.tile(x[:2], (3, 1))
    g = jnp.tile(g[:2], (3, 1)) * jnp.array([1, 2, -1, 3, 0.5, 4])[:, None]
    params = _params()
    grads = _gradients(x, g)
    updates, _ = transform.update(
      grads, transform.init(params), params, statistics=_statistics(x, g)
    )
    fisher = self._fisher(x, g, True)
    gradient = _matrix(grads)
    expected = np.linalg.solve(
      fisher + 0.3 * np.eye(len(fisher)), gradient.ravel()
    )
    self.check(
      -_matrix(updates) / 0.5, expected.reshape(gradient.shape), rtol=5e-3
    )

  def test_importance_sampling_keeps_the_mean_of_the_fisher_matrix(self):
    x, g = _samples(0)
    transform = _build("sngd", rank=5, reduction="importance", interval=1)
    params = _params()
    state = transform.init(params)
    update = jax.jit(transform.update)
    total = np.zeros(())
    draws = 300
    for _ in range(draws):
      _, state = update(
        _gradients(x, g), state, params, statistics=_statistics(x, g)
      )
      factors = _curvature(state).factors[_PATH]
      v = np.stack([np.kron(*p) for p in zip(factors.left, factors.right)])
      total = total + v.T @ v / draws
    expected = self._fisher(x, g, True)
    # 1500 draws: some 3 % of the largest entries.
    np.testing.assert_allclose(total, expected, atol=0.1 * expected.max())


class ActingTest(parameterized.TestCase):
  def test_other_parameters_pass(self):
    x, g = _samples()
    transform = _build("mkor")
    params = _params()
    updates, _ = transform.update(
      _gradients(x, g), transform.init(params), params,
      statistics=_statistics(x, g),
    )  # fmt: skip
    np.testing.assert_allclose(
      updates["other"], -0.5 * _gradients(x, g)["other"]
    )

  @parameterized.parameters("exact", "reference")
  def test_joint_rescaling_keeps_the_length(self, rule):
    found, _ = _direction("mkor", rule=rule, rescale="joint", interval=1)
    gradient = _matrix(_gradients(*_samples(0)))
    self.assertAlmostEqual(
      np.linalg.norm(found), np.linalg.norm(gradient), places=5
    )
    self.assertGreater(np.abs(found - gradient).max(), 1e-2)

  def test_sum_rescaling_adds_the_norms_of_weight_and_bias(self):
    found, _ = _direction("mkor", rescale="sum")
    plain, _ = _direction("mkor", rescale="none")
    gradient = _matrix(_gradients(*_samples(0)))

    def norm(matrix):
      return np.linalg.norm(matrix[:, :-1]) + np.linalg.norm(matrix[:, -1])

    np.testing.assert_allclose(
      found, plain * norm(gradient) / norm(plain), rtol=1e-5, atol=1e-7
    )

  @parameterized.parameters(1e-9, 1e9)
  def test_kl_clip_bounds_the_step(self, kl_clip):
    plain, _ = _direction("eva", rescale="none")
    found, _ = _direction("eva", rescale="kl", kl_clip=kl_clip)
    gradient = _matrix(_gradients(*_samples(0)))
    divergence = 0.5**2 * np.sum(plain * gradient)
    factor = min(1.0, (kl_clip / divergence) ** 0.5)
    np.testing.assert_allclose(found, factor * plain, rtol=1e-4, atol=1e-9)

  def test_factors_change_when_a_refresh_is_due(self):
    transform = _build("mkor", interval=4, warmup_steps=2)
    params, changed = _params(), []
    state = transform.init(params)
    update = jax.jit(transform.update)
    for step in range(10):
      x, g = _samples(step)
      before = jax.device_get(_curvature(state).factors)
      _, state = update(
        _gradients(x, g), state, params, statistics=_statistics(x, g)
      )
      after = jax.device_get(_curvature(state).factors)
      if any(jax.tree.leaves(jax.tree.map(
        lambda a, b: bool(np.any(a != b)), before, after
      ))):  # fmt: skip
        changed.append(step)
    self.assertEqual(changed, [0, 1, 4, 8])

  def test_identity_factors_are_the_optimizer_alone(self):
    """No side is narrow enough: nothing is stored, nothing changes."""
    inner = dict(name="lamb", learning_rate=0.1)
    params = _params()
    paths = []
    for spec in (inner, inner | dict(precondition=dict(
      name="mkor", max_width=1
    ))):  # fmt: skip
      transform = build_optimizer(spec, total_steps=9, params=params).transform
      state, now = transform.init(params), params
      for step in range(3):
        x, g = _samples(step)
        updates, state = transform.update(
          _gradients(x, g), state, now, statistics=_statistics(x, g)
        )
        now = optax.apply_updates(now, updates)
      paths.append(now)
    jax.tree.map(np.testing.assert_array_equal, *paths)
    self.assertEmpty(jax.tree.leaves(_curvature(state).factors))

  def test_one_side_alone(self):
    found, state = _direction("mkor", max_width=_OUT, rescale="none")
    factors = _curvature(state).factors[_PATH]
    self.assertIsNone(factors.right)
    gradient = _matrix(_gradients(*_samples(0)))
    left = np.asarray(factors.left, np.float64)
    np.testing.assert_allclose(found, left @ gradient, rtol=1e-4, atol=1e-6)

  def test_a_direction_that_is_not_finite_falls_back_and_is_counted(self):
    transform = _build("mkor", rule="exact", rescale="joint")
    params = _params()
    state = transform.init(params)
    x, g = _samples()
    found, grads = _statistics(x, g), _gradients(x, g)
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
    np.testing.assert_allclose(_matrix(updates), -0.5 * _matrix(grads))

  def test_no_gradient_is_no_failure(self):
    transform = _build("mkor")
    params = _params()
    x, g = _samples()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = transform.update(
      zeros, transform.init(params), params,
      statistics=_statistics(x, jnp.zeros_like(g)),
    )  # fmt: skip
    self.assertEqual(curvature_metrics(state)["curvature_fallbacks"], 0)
    self.assertFalse(any(np.any(u) for u in jax.tree.leaves(updates)))

  def _stabilised(self, rule, start, **options):
    """Both factors after a refresh from 3 I left and I right."""
    transform = _build("mkor", rule=rule, dtype="float32", **options)
    params = _params()
    state = transform.init(params)
    index = next(
      i for i, x in enumerate(state) if isinstance(x, CurvatureState)
    )
    factors = state[index].factors[_PATH]
    factors = factors._replace(left=start * factors.left)
    state = (
      *state[:index],
      state[index]._replace(factors={_PATH: factors}),
      *state[index + 1 :],
    )
    x, g = _samples()
    _, state = transform.update(
      _gradients(x, g), state, params, statistics=_statistics(x, g)
    )
    found = _curvature(state).factors[_PATH]
    return found, np.asarray(g).sum(0)

  def test_reference_resets_both_factors_instead_of_refreshing(self):
    found, _ = self._stabilised("reference", 3.0)
    np.testing.assert_allclose(found.left, 2.8 * np.eye(_OUT), rtol=1e-6)
    np.testing.assert_allclose(found.right, np.eye(_IN + 1), rtol=1e-6)
    found, _ = self._stabilised("reference", 1.9)
    self.assertGreater(np.abs(found.right - np.eye(_IN + 1)).max(), 0.1)

  def test_exact_blends_each_factor_before_its_refresh(self):
    found, u = self._stabilised("exact", 3.0, keep=0.5)
    expected = np.linalg.inv(0.95 / 2.0 * np.eye(_OUT) + 0.05 * np.outer(u, u))
    np.testing.assert_allclose(found.left, expected, rtol=1e-5, atol=1e-6)
    other, _ = self._stabilised("exact", 1.0, keep=0.5)
    np.testing.assert_allclose(found.right, other.right)

  def test_vectors_are_clipped_by_element(self):
    _, state = _direction("mkor", clip=0.1, dtype="float32", bias=False)
    x, _ = _samples(0)
    u = np.clip(np.asarray(x).mean(0), -0.1, 0.1)
    expected = np.linalg.inv(np.eye(_IN) + np.outer(u, u))
    right = _curvature(state).factors[_PATH].right
    np.testing.assert_allclose(right, expected, rtol=1e-5, atol=1e-6)

  def test_groups_of_tokens_are_vectors_of_their_own(self):
    transform = _build("mkor", rule="exact", rank=2, dtype="float32")
    params = _params()
    x, g = _samples()
    split = lambda v: jnp.stack(jnp.split(v, 2)).sum(1)[None]  # noqa: E731
    found = _statistics(x, g)[_PATH] | dict(
      token_count=jnp.full((1, 2), _ROWS / 2),
      input_sum=split(x),
      output_sum=split(g),
    )
    _, state = transform.update(
      _gradients(x, g), transform.init(params), params,
      statistics={_PATH: found},
    )  # fmt: skip
    factors = _curvature(state).factors[_PATH]
    # Means of the gradients that tokens have where the loss is their mean.
    gradients = _ROWS * np.asarray(g, np.float64).reshape(2, -1, _OUT).mean(1)
    inputs = _homogeneous(x).reshape(2, -1, _IN + 1).mean(1)
    for factor, u in ((factors.left, gradients), (factors.right, inputs)):
      mean = 0.95 * np.eye(u.shape[1]) + 0.05 * u.T @ u / 2
      np.testing.assert_allclose(factor, np.linalg.inv(mean), rtol=1e-4,
                                 atol=1e-6)  # fmt: skip

  def test_captured_is_the_share_of_the_mean_in_the_inputs(self):
    transform = _build("eva", measure_captured=True, interval=2)
    params = _params()
    state = transform.init(params)
    for seed in range(2):  # the second step is not due
      x, g = _samples(seed)
      _, state = transform.update(
        _gradients(x, g), state, params, statistics=_statistics(x, g)
      )
    x = np.asarray(_samples(0)[0])
    share = np.sum(x.mean(0) ** 2) / np.mean(np.sum(x * x, 1))
    self.assertAlmostEqual(
      curvature_metrics(state)["captured"], share, places=5
    )

  def test_half_precision_is_storage_only(self):
    """One refresh from the identity rounds once."""
    (_, low), (_, full) = (
      _direction("mkor", rule="exact", dtype=dtype)
      for dtype in ("bfloat16", "float32")
    )
    low, full = (_curvature(s).factors[_PATH] for s in (low, full))
    self.assertEqual(low.left.dtype, jnp.bfloat16)
    for a, b in zip(low, full):
      np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
      np.testing.assert_array_equal(a, a.T)

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
    (dict(name="eva", damping=0.0), "precondition.damping=0.0 must be pos"),
    (dict(name="kfac", inverse_interval=3, interval=2), "a multiple of"),
    (dict(name="sngd"), "optim.precondition.rank is required"),
  )
  def test_bad_options_are_refused(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      build_optimizer(
        dict(name="lamb", learning_rate=0.1, precondition=spec),
        total_steps=9,
        params=_params(),
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
        params=_params(),
      )

  def test_missing_statistics_are_named(self):
    transform = _build("kfac")
    params = _params()
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
      params=_params(),
    ).transform  # fmt: skip
    state = transform.init(_params())
    x, g = _samples()
    updates, state = transform.update(
      _gradients(x, g), state, _params(), statistics=_statistics(x, g)
    )
    self.assertFalse(np.any(updates[_PATH]["bias"]))
    shapes = [factor.shape for factor in jax.tree.leaves(_curvature(state))]
    self.assertIn((_IN, _IN), shapes)

  def test_axes_of_a_layer_without_bias_must_be_told(self):
    params = {"query": {"kernel": jnp.zeros((2, 3, 4))}}
    with self.assertRaisesRegex(ValueError, "no bias that tells inputs"):
      find_layers(params, lambda name, leaf: ())
    (layer,) = find_layers(params, lambda name, leaf: (), {"query": 2})
    self.assertEqual(layer.size, ((), 6, 4))
    self.assertEmpty(find_layers(params, lambda name, leaf: (), {}))


class SwitchTest(parameterized.TestCase):
  _RULE = dict(threshold=0.01, window=10, patience=2, earliest=25, decay=0.5)

  def _steps_on(self, rule, losses):
    """Steps after which the switch is on."""
    state = rule.init()
    advance = jax.jit(rule.advance)
    found = []
    for step, loss in enumerate(losses, 1):
      state = advance(state, jnp.float32(loss))
      if state.on:
        found.append(step)
    return found

  def _curve(self, until):
    """Halves every 20 steps `until`, then rests."""
    return [4.0 * 0.5 ** (min(step, until) / 20) for step in range(120)]

  def test_it_fires_at_the_predicted_step_and_stays(self):
    """Resting from 42 on; windows that end at 60 and 70 see no progress.

    The one that ends at 50 still does: at step 40 the average lagged.
    """
    found = self._steps_on(SwitchRule(**self._RULE), self._curve(42))
    self.assertEqual(found, list(range(70, 121)))

  def test_progress_between_slow_windows_begins_the_count_anew(self):
    losses = self._curve(42)
    losses[60:] = [0.5 * loss for loss in losses[60:]]
    found = self._steps_on(SwitchRule(**self._RULE), losses)
    self.assertEqual(found[0], 90)

  def test_nothing_counts_early(self):
    rule = SwitchRule(**self._RULE | dict(patience=1, earliest=100))
    self.assertEqual(self._steps_on(rule, [1.0] * 120)[0], 110)

  def test_a_falling_loss_never_throws_it(self):
    self.assertEmpty(self._steps_on(SwitchRule(**self._RULE), self._curve(120)))

  def test_by_step(self):
    rule = SwitchRule(step=7)
    self.assertEqual(self._steps_on(rule, [1.0] * 9), [7, 8, 9])

  def test_afterwards_the_optimizer_is_alone_and_its_moments_go_on(self):
    transform = _build("mkor", switch=dict(step=2), interval=1, rescale="none")
    params = _params()
    state = transform.init(params)
    ratios = []
    for step in range(4):
      x, g = _samples(step)
      grads = _gradients(x, g)
      before = jax.device_get(_curvature(state).factors)
      updates, state = transform.update(
        grads, state, params, statistics=_statistics(x, g), value=1.0
      )
      ratios.append(np.abs(_matrix(updates) + 0.5 * _matrix(grads)).max())
    self.assertGreater(min(ratios[:2]), 1e-3)
    self.assertLess(max(ratios[2:]), 1e-6)
    jax.tree.map(
      np.testing.assert_array_equal, before, _curvature(state).factors
    )
    self.assertEqual(curvature_metrics(state)["second_order"], 0.0)

  def test_by_hand(self):
    transform = _build("mkor", switch=dict(threshold=None))
    state = transform.init(_params())
    self.assertFalse(_curvature(state).switch.on)
    self.assertTrue(_curvature(switch_now(state)).switch.on)
    with self.assertRaisesRegex(ValueError, "has no switch"):
      switch_now(_build("mkor").init(_params()))

  def test_it_needs_the_loss(self):
    transform = _build("mkor", switch=dict())
    x, g = _samples()
    with self.assertRaisesRegex(ValueError, "value is required"):
      transform.update(
        _gradients(x, g), transform.init(_params()), _params(),
        statistics=_statistics(x, g),
      )  # fmt: skip


_DENSE = Dense()
_SPECS = {
  "mkor": (("name", "mkor"), ("rule", "exact"), ("interval", 2),
           ("wire_dtype", "float32"), ("dtype", "float32")),
  "kfac": (("name", "kfac"), ("inverse_interval", 2)),
  "eva": (("name", "eva"),),
  "sngd": (("name", "sngd"), ("rank", 16), ("interval", 2)),
}  # fmt: skip


def _world(name, **options):
  spec = _SPECS.get(name, name)
  return world(
    objective=_DENSE, name="sgd", learning_rate=0.02, precondition=spec,
    **options,
  )  # fmt: skip


@functools.cache
def _path(name, **options):
  w = _world(name, **options)
  state, losses = w.run(w.init(), 0, 4, lambda step, rows: batch(0))
  return jax.device_get(state.params), losses


class TrainStepTest(parameterized.TestCase):
  """Through the one train step."""

  def _assert_same(self, a, b):
    np.testing.assert_allclose(a[1], b[1], rtol=2e-5)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
      a[0],
      b[0],
    )

  @parameterized.parameters("mkor", "kfac", "eva", "sngd")
  def test_devices_and_microbatches_change_nothing(self, name):
    one = _path(name, axes=(("data", 1),))
    self._assert_same(one, _path(name, axes=(("data", 4),)))
    self._assert_same(one, _path(name, axes=(("data", 2),), microbatches=4))
    self.assertLess(one[1][-1], one[1][0])

  def test_a_preconditioner_asks_only_for_what_it_uses(self):
    found = {name: _world(name).optimizer.statistics.names for name in _SPECS}
    self.assertEqual(
      found["mkor"],
      {"up": ("token_count", "input_sum"),
       "down": ("token_count", "input_sum", "output_sum")},
    )  # fmt: skip

  @parameterized.parameters(("bfloat16", 2), ("float32", 4))
  def test_a_refresh_sends_one_vector_per_side(self, wire_dtype, size):
    """Inputs of both layers, and the gradient that no bias has."""
    spec = tuple(dict(_SPECS["mkor"], wire_dtype=wire_dtype).items())
    w = _world(spec, axes=(("data", 8),))
    with jax.set_mesh(w.mesh):
      lowered = w.lower()
    module = hlo.Module(lowered.compile().as_text())
    found = hardware.read_collectives(module)
    refresh = [c for c in found if len(c.branch)]
    self.assertEqual([c.kind for c in refresh], ["all-reduce"])
    numbers = INPUTS + HIDDEN + OUTPUTS
    # XLA's CPU backend adds up in no less than float32.
    self.assertIn(refresh[0].operand_bytes, (numbers * size, numbers * 4))
    kind = {"bfloat16": "bf16", "float32": "f32"}[wire_dtype]
    self.assertTrue(f"tensor<8x{numbers}x{kind}>" in lowered.as_text())


if __name__ == "__main__":
  absltest.main()
