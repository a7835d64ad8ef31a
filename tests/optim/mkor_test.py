"""MKOR: its direction, stabiliser, vectors and memory options."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.layers.statistics import LayerSize, Wanted
from bertjax.optim.preconditioning import wire
from bertjax.optim.preconditioning.blocks import Blocks
from bertjax.optim.preconditioning.layers import Layer
from bertjax.optim.preconditioning.mkor import InverseFactors
from bertjax.optim.preconditioning.vectors import (
  clipped_vectors,
  leading_vectors,
)
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


class MkorTest(parameterized.TestCase):
  @parameterized.product(bias=(True, False), rule=("exact", "reference"))
  def test_mkor(self, bias, rule):
    found, _ = direction(
      "mkor", bias, steps=3, rule=rule, interval=1, rescale="none",
      dtype="float32", norm="spectral", threshold=1e6,
    )  # fmt: skip
    columns = IN + int(bias)
    factors = [np.eye(OUT), np.eye(columns)]
    for seed in range(3):
      x, g = samples(seed)
      vectors = np.asarray(g).sum(0), homogeneous(x, bias).mean(0)
      for i, u in enumerate(vectors):
        old = factors[i]
        if rule == "exact":
          outer = 0.95 * np.linalg.inv(old) + 0.05 * np.outer(u, u)
          factors[i] = np.linalg.inv(outer)
        else:
          drawn = np.linalg.inv(0.95 * old + 0.05 * np.eye(len(u)))
          factors[i] = np.linalg.inv(drawn + np.outer(u, u))
    gradient = matrix(gradients(*samples(2), bias))
    assert_near(found, factors[0] @ gradient @ factors[1])

  def _stabilised(self, rule, start, **options):
    """Both factors after a refresh from 3 I left and I right."""
    transform = build("mkor", rule=rule, dtype="float32", **options)
    params = parameters()
    state = transform.init(params)
    state = jax.tree.map(
      lambda node: (
        node._replace(left=start * node.left)
        if isinstance(node, InverseFactors)
        else node
      ),
      state,
      is_leaf=lambda node: isinstance(node, InverseFactors),
    )
    x, g = samples()
    _, state = transform.update(
      gradients(x, g), state, params, statistics=statistics(x, g)
    )
    found = curvature(state).factors[PATH]
    return found, np.asarray(g).sum(0)

  def test_reference_resets_both_factors_instead_of_refreshing(self):
    found, _ = self._stabilised("reference", 3.0)
    np.testing.assert_allclose(found.left, 2.8 * np.eye(OUT), rtol=1e-6)
    np.testing.assert_allclose(found.right, np.eye(IN + 1), rtol=1e-6)
    found, _ = self._stabilised("reference", 1.9)
    self.assertGreater(np.abs(found.right - np.eye(IN + 1)).max(), 0.1)

  def test_exact_blends_each_factor_before_its_refresh(self):
    found, u = self._stabilised("exact", 3.0, keep=0.5)
    expected = np.linalg.inv(0.95 / 2.0 * np.eye(OUT) + 0.05 * np.outer(u, u))
    np.testing.assert_allclose(found.left, expected, rtol=1e-5, atol=1e-6)
    other, _ = self._stabilised("exact", 1.0, keep=0.5)
    np.testing.assert_allclose(found.right, other.right)

  def test_vectors_are_clipped_by_element(self):
    _, state = direction("mkor", clip=0.1, dtype="float32", bias=False)
    x, _ = samples(0)
    u = np.clip(np.asarray(x).mean(0), -0.1, 0.1)
    expected = np.linalg.inv(np.eye(IN) + np.outer(u, u))
    right = curvature(state).factors[PATH].right
    np.testing.assert_allclose(right, expected, rtol=1e-5, atol=1e-6)

  def test_groups_of_tokens_are_vectors_of_their_own(self):
    transform = build("mkor", rule="exact", rank=2, dtype="float32")
    params = parameters()
    x, g = samples()
    split = lambda v: jnp.stack(jnp.split(v, 2)).sum(1)[None]  # noqa: E731
    found = statistics(x, g)[PATH] | dict(
      token_count=jnp.full((1, 2), ROWS / 2),
      input_sum=split(x),
      output_sum=split(g),
    )
    _, state = transform.update(
      gradients(x, g), transform.init(params), params,
      statistics={PATH: found},
    )  # fmt: skip
    factors = curvature(state).factors[PATH]
    # Means of the gradients that tokens have where the loss is their mean.
    slopes = ROWS * np.asarray(g, np.float64).reshape(2, -1, OUT).mean(1)
    inputs = homogeneous(x).reshape(2, -1, IN + 1).mean(1)
    for factor, u in ((factors.left, slopes), (factors.right, inputs)):
      mean = 0.95 * np.eye(u.shape[1]) + 0.05 * u.T @ u / 2
      np.testing.assert_allclose(factor, np.linalg.inv(mean), rtol=1e-4,
                                 atol=1e-6)  # fmt: skip

  def test_groups_of_unequally_many_tokens_have_means_of_their_own(self):
    """Of a batch with padding; the last group has nothing else."""
    tokens = np.float32([4, 1, 0])
    x, g = np.random.default_rng(0).normal(size=(2, 3, 4, 3))
    kept = (np.arange(4) < tokens[:, None])[..., None]
    x, g = x * kept, g * kept
    wanted = Wanted(
      layers={PATH: LayerSize((), 3, 3)},
      names={PATH: ("token_count", "input_sum", "output_sum")},
      groups=3,
      skip_padding=True,
    )
    found = dict(
      token_count=tokens[None],
      input_sum=x.sum(1)[None],
      output_sum=g.sum(1)[None],
    )
    found = wire.reduce({PATH: found}, wanted, "float32")[PATH]
    each = np.maximum(tokens, 1)[:, None]
    np.testing.assert_allclose(found["input_sum"], x.sum(1) / each, rtol=1e-6)
    np.testing.assert_allclose(
      found["output_sum"], tokens.sum() * g.sum(1) / each, rtol=1e-6
    )
    layer = Layer(PATH, (3, 3), 0, 1, bias=True)
    _, inputs = clipped_vectors(layer, found, 100.0)
    np.testing.assert_array_equal(inputs[:, -1], [1, 1, 0])

  def test_half_precision_is_storage_only(self):
    """One refresh from the identity rounds once."""
    (_, low), (_, full) = (
      direction("mkor", rule="exact", dtype=dtype)
      for dtype in ("bfloat16", "float32")
    )
    low, full = (curvature(s).factors[PATH] for s in (low, full))
    self.assertEqual(low.left.dtype, jnp.bfloat16)
    for a, b in zip(low, full):
      np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
      np.testing.assert_array_equal(a, a.T)

  def test_one_side_alone(self):
    found, state = direction("mkor", max_width=OUT, rescale="none")
    factors = curvature(state).factors[PATH]
    self.assertIsNone(factors.right)
    gradient = matrix(gradients(*samples(0)))
    left = np.asarray(factors.left, np.float64)
    np.testing.assert_allclose(found, left @ gradient, rtol=1e-4, atol=1e-6)

  @parameterized.parameters("left", "right")
  def test_a_chosen_side_alone(self, side):
    found, state = direction(
      "mkor", sides=side, rescale="none", dtype="float32"
    )
    factors = curvature(state).factors[PATH]
    gradient = matrix(gradients(*samples(0)))
    if side == "left":
      self.assertIsNone(factors.right)
      expected = np.asarray(factors.left, np.float64) @ gradient
    else:
      self.assertIsNone(factors.left)
      expected = gradient @ np.asarray(factors.right, np.float64)
    assert_near(found, expected)

  @parameterized.parameters("exact", "reference")
  def test_blocks_are_factors_of_their_own(self, rule):
    """Inputs 0-3 and 4, 5 (the bias, and two of padding); outputs 0-1, 2."""
    found, state = direction(
      "mkor", steps=3, rule=rule, interval=1, rescale="none", dtype="float32",
      norm="spectral", threshold=1e6, block_width=2,
    )  # fmt: skip
    factors = curvature(state).factors[PATH]
    self.assertEqual(factors.left.shape, (2, 2, 2))
    self.assertEqual(factors.right.shape, (3, 2, 2))
    gradient = matrix(gradients(*samples(2)))
    expected = np.array(gradient)
    for side, width in ((0, OUT), (1, IN + 1)):
      for start in range(0, width, 2):
        part = slice(start, min(start + 2, width))
        inverse = np.eye(part.stop - start)
        for seed in range(3):
          x, g = samples(seed)
          u = (np.asarray(g).sum(0), homogeneous(x).mean(0))[side][part]
          if rule == "exact":
            mean = 0.95 * np.linalg.inv(inverse) + 0.05 * np.outer(u, u)
          else:
            drawn = 0.95 * inverse + 0.05 * np.eye(len(u))
            mean = np.linalg.inv(drawn) + np.outer(u, u)
          inverse = np.linalg.inv(mean)
        if side == 0:
          expected[part] = inverse @ expected[part]
        else:
          expected[:, part] = expected[:, part] @ inverse
    assert_near(found, expected)
    # Padding never grows, whatever the rule.
    np.testing.assert_array_equal(factors.left[1, 1], [0, 1])

  def test_blocks_of_a_stack_are_blocks_of_its_layers(self):
    keys = jax.random.split(jax.random.key(0))
    blocks = Blocks(7, 3)
    self.assertEqual((blocks.number, blocks.block), (3, 3))
    factor = jax.random.normal(keys[0], (2, 3, 3, 3))
    values = jax.random.normal(keys[1], (2, 7, 4))
    dense = np.zeros((2, 9, 9))
    for i in range(3):
      dense[:, 3 * i : 3 * i + 3, 3 * i : 3 * i + 3] = factor[:, i]
    np.testing.assert_allclose(
      blocks.times(factor, values), dense[:, :7, :7] @ values, rtol=1e-5,
      atol=1e-5,
    )  # fmt: skip
    self.assertEqual(blocks.identity((2,), "float32").shape, (2, 3, 3, 3))

  def test_leading_vectors_are_those_of_an_svd(self):
    """Eckart and Young: nothing of their rank is nearer."""
    u = np.random.default_rng(0).normal(size=(2, 6, 4))
    w = np.asarray(leading_vectors(jnp.asarray(u, jnp.float32), 2), np.float64)
    self.assertEqual(w.shape, (2, 2, 4))
    for vectors, found in zip(u, w):
      _, s, v = np.linalg.svd(vectors, full_matrices=False)
      nearest = v[:2].T @ np.diag(s[:2] ** 2) @ v[:2] / 6
      assert_near(found.T @ found / 2, nearest)
    # With every one of them nothing is lost.
    w = leading_vectors(jnp.asarray(u, jnp.float32), 6)
    assert_near(np.swapaxes(w, 1, 2) @ w, np.swapaxes(u, 1, 2) @ u)

  def test_an_svd_of_many_means_gives_the_vectors(self):
    transform = build(
      "mkor", rule="exact", svd_groups=ROWS, dtype="float32", interval=1
    )
    x, g = samples()
    found = statistics(x, g)[PATH] | dict(
      token_count=np.ones((1, ROWS), np.float32),
      input_sum=x[None],
      output_sum=g[None],
    )
    _, state = transform.update(
      gradients(x, g), transform.init(parameters()), parameters(),
      statistics={PATH: found},
    )  # fmt: skip
    factors = curvature(state).factors[PATH]
    pairs = (
      (factors.left, ROWS * np.asarray(g)),
      (factors.right, homogeneous(x)),
    )
    for factor, u in pairs:
      _, s, v = np.linalg.svd(u, full_matrices=False)
      leading = s[0] ** 2 * np.outer(v[0], v[0]) / ROWS
      expected = np.linalg.inv(0.95 * np.eye(len(v[0])) + 0.05 * leading)
      assert_near(factor, expected)


if __name__ == "__main__":
  absltest.main()
