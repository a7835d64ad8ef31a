"""Directions of K-FAC, Eva, SNGD and HyLo against dense algebra in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.optim.preconditioning.layers import Layer
from bertjax.optim.preconditioning.sngd import Sngd
from tests.optim.one_layer import (
  IN,
  OUT,
  PATH,
  ROWS,
  assert_near,
  build,
  curvature,
  direction,
  gradients,
  homogeneous,
  matrix,
  parameters,
  samples,
  statistics,
)


class DirectionsTest(parameterized.TestCase):
  @parameterized.product(bias=(True, False), form=("eigen", "inverse"))
  def test_kfac(self, bias, form):
    damping = 0.1
    found, _ = direction(
      "kfac", bias, form=form, damping=damping, decay=0.0, rescale="none"
    )
    x, g = samples(0)
    a = homogeneous(x, bias)
    g = np.asarray(g, np.float64)
    inputs = a.T @ a / ROWS
    outputs = ROWS * g.T @ g  # of gradients where the loss is their mean
    gradient = g.T @ a
    if form == "inverse":
      expected = np.linalg.solve(
        outputs + damping * np.eye(OUT), gradient
      ) @ np.linalg.inv(inputs + damping * np.eye(len(inputs)))
    else:
      dense = np.kron(outputs, inputs)
      expected = np.linalg.solve(
        dense + damping * np.eye(len(dense)), gradient.ravel()
      ).reshape(gradient.shape)
    assert_near(found, expected)

  def test_kfac_averages_from_the_identity_and_decomposes_at_intervals(self):
    options = dict(rescale="none", decay=0.9, damping=1e-2)
    _, state = direction("kfac", steps=3, inverse_interval=2, **options)
    factors = curvature(state).factors[PATH]
    expected, decomposed = np.eye(OUT), None
    for seed in range(3):
      g = np.asarray(samples(seed)[1], np.float64)
      expected = 0.9 * expected + 0.1 * ROWS * g.T @ g
      if seed % 2 == 0:
        decomposed = expected
    assert_near(factors.output, expected)
    left = factors.left
    assert_near(
      left.vectors @ np.diag(left.values) @ left.vectors.T, decomposed
    )
    _, state = direction("kfac", steps=2, inverse_interval=2, **options)
    left = curvature(state).factors[PATH].left
    with self.assertRaises(AssertionError):
      assert_near(
        left.vectors @ np.diag(left.values) @ left.vectors.T,
        curvature(state).factors[PATH].output,
      )

  def test_exact_factors_solve_a_whitened_regression_in_one_step(self):
    rng = np.random.default_rng(0)
    n = 64
    # Inputs of any covariance; targets are a white linear map of them.
    x = rng.normal(size=(n, IN)) @ rng.normal(size=(IN, IN))
    white, _ = np.linalg.qr(x)
    target = white[:, :OUT] * n**0.5
    weights = np.zeros((IN, OUT))
    g = (x @ weights - target) / n
    transform = build(
      "kfac", bias=False, learning_rate=1.0, decay=0.0, damping=1e-7,
      rescale="none",
    )  # fmt: skip
    params = {PATH: {"kernel": jnp.asarray(weights, jnp.float32)},
              "other": jnp.zeros(4)}  # fmt: skip
    found = dict(
      token_count=np.full((1, 1), n),
      input_gram=(x.T @ x)[None],
      output_gram=(g.T @ g)[None],
    )
    found = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), found)
    grads = {PATH: {"kernel": jnp.asarray(x.T @ g, jnp.float32)},
             "other": jnp.zeros(4)}  # fmt: skip
    updates, _ = transform.update(
      grads, transform.init(params), params, statistics={PATH: found}
    )
    weights = weights + np.asarray(updates[PATH]["kernel"])
    np.testing.assert_allclose(x @ weights, target, atol=2e-3)

  @parameterized.parameters(True, False)
  def test_eva(self, bias):
    damping = 0.2
    found, _ = direction(
      "eva", bias, steps=2, damping=damping, rescale="none", decay=0.9
    )
    vectors = None
    for seed in range(2):
      x, g = samples(seed)
      new = np.asarray(g).sum(0), homogeneous(x, bias).mean(0)
      vectors = new if vectors is None else [
        0.9 * v + 0.1 * u for v, u in zip(vectors, new)
      ]  # fmt: skip
    v = np.kron(*vectors)
    gradient = matrix(gradients(*samples(1), bias))
    expected = np.linalg.solve(
      np.outer(v, v) + damping * np.eye(len(v)), gradient.ravel()
    )
    assert_near(found, expected.reshape(gradient.shape))

  def _fisher(self, x, g, bias):
    v = np.stack([
      np.kron(ROWS * row_g, row_a)
      for row_a, row_g in zip(homogeneous(x, bias), np.asarray(g, np.float64))
    ])  # fmt: skip
    return v.T @ v / ROWS

  @parameterized.product(
    bias=(True, False), reduction=("none", "interpolative")
  )
  def test_sngd_inverts_the_batch_s_fisher_matrix(self, bias, reduction):
    """All rows span themselves, so interpolation loses nothing."""
    found, _ = direction(
      "sngd", bias, rank=ROWS, reduction=reduction, damping=0.3,
      rescale="none",
    )  # fmt: skip
    x, g = samples(0)
    fisher = self._fisher(x, g, bias)
    gradient = matrix(gradients(x, g, bias))
    expected = np.linalg.solve(
      fisher + 0.3 * np.eye(len(fisher)), gradient.ravel()
    )
    assert_near(found, expected.reshape(gradient.shape), rtol=2e-3)

  def test_interpolation_needs_as_many_rows_as_there_are_directions(self):
    transform = build(
      "sngd", rank=2, reduction="interpolative", damping=0.3, rescale="none"
    )
    x, g = samples(0)
    # Rows 0 and 1, over and over, in other lengths.
    x = jnp.tile(x[:2], (3, 1))
    g = jnp.tile(g[:2], (3, 1)) * jnp.array([1, 2, -1, 3, 0.5, 4])[:, None]
    params = parameters()
    grads = gradients(x, g)
    updates, _ = transform.update(
      grads, transform.init(params), params, statistics=statistics(x, g)
    )
    fisher = self._fisher(x, g, True)
    gradient = matrix(grads)
    expected = np.linalg.solve(
      fisher + 0.3 * np.eye(len(fisher)), gradient.ravel()
    )
    assert_near(
      -matrix(updates) / 0.5, expected.reshape(gradient.shape), rtol=5e-3
    )

  def test_importance_sampling_keeps_the_mean_of_the_fisher_matrix(self):
    layer = Layer(PATH, (IN, OUT), 0, 1, bias=True)
    x, g = samples(0)
    method = Sngd(5, "importance", damping=0.1)
    found = statistics(x, g)[PATH]
    draw = jax.vmap(lambda step: method.refresh(layer, None, found, step)[:2])
    left, right = jax.device_get(jax.jit(draw)(jnp.arange(300)))
    v = np.einsum("nko,nki->nkoi", left, right).reshape(300, 5, -1)
    total = np.einsum("nkv,nkw->vw", v, v) / 300
    expected = self._fisher(x, g, True)
    # 1500 draws: some 3 % of the largest entries.
    np.testing.assert_allclose(total, expected, atol=0.1 * expected.max())

  def test_hylo_chooses_by_the_change_of_the_gradient(self):
    """Stretches of two refreshes; the norm halves after the fourth."""
    lengths = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.45, 0.45, 0.4]
    transform = build(
      "hylo", rank=2, window=2, interval=1, damping=0.3, rescale="none"
    )
    x, g = samples(0)
    state = transform.init(parameters())
    layer = Layer(PATH, (IN, OUT), 0, 1, bias=True)
    refreshes = [
      jax.jit(functools.partial(Sngd(2, name, 0.3).refresh, layer, None))
      for name in ("interpolative", "importance")
    ]
    chosen = []
    for step, length in enumerate(lengths):
      found = statistics(x, length * g)
      _, state = transform.update(
        gradients(x, g), state, parameters(), statistics=found
      )
      used = curvature(state).factors[PATH].samples
      same = []
      for refresh in refreshes:
        expected = refresh(found[PATH], jnp.int32(step))
        same.append(np.allclose(used.left, expected.left, atol=1e-6))
      self.assertEqual(sum(same), 1)
      chosen.append(same[0])
    # The first stretch, the next (0 grew to 1), the one after the drop.
    self.assertEqual(
      chosen, [True] * 4 + [False] * 2 + [True] * 2 + [False] * 3
    )

  def test_hylo_watches_the_norm_of_the_gradient(self):
    _, state = direction("hylo", rank=2, window=5, interval=1)
    trend = curvature(state).factors[PATH].trend
    gradient = matrix(gradients(*samples(0)))
    self.assertAlmostEqual(trend.total, np.linalg.norm(gradient), places=4)


if __name__ == "__main__":
  absltest.main()
