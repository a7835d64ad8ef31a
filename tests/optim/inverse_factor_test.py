"""Updates of inverses against inverses."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.optim.preconditioning import inverse_factor
from bertjax.optim.preconditioning.inverse_factor import NORMS, RULES

_WIDTH, _DECAY = 7, 0.95


def _vectors(count, rank=1, scale=1.0, width=_WIDTH, seed=0):
  rng = np.random.default_rng(seed)
  return scale * (0.5 + rng.normal(size=(count, rank, width)))


def _run(rule, vectors, dtype=jnp.float32):
  update = jax.jit(lambda j, u: RULES[rule](j, u, _DECAY))
  factor = jnp.eye(vectors.shape[-1], dtype=dtype)
  for u in vectors:
    factor = update(factor, jnp.asarray(u, dtype))
  return np.asarray(factor)


class RulesTest(parameterized.TestCase):
  @parameterized.product(rank=(1, 3), double=(False, True))
  def test_exact_is_the_inverse_of_the_moving_average(self, rank, double):
    vectors = _vectors(12, rank)
    covariance = np.eye(_WIDTH)
    for u in vectors:
      covariance = _DECAY * covariance + (1 - _DECAY) / rank * u.T @ u
    with jax.enable_x64(double):
      found = _run("exact", vectors, jnp.float64 if double else jnp.float32)
    np.testing.assert_allclose(
      found,
      np.linalg.inv(covariance),
      rtol=0,
      atol=1e-12 if double else 1e-5,
    )

  @parameterized.parameters(1, 2)
  def test_reference_is_the_inverse_after_a_draw_to_the_identity(self, rank):
    vectors = _vectors(5, rank)
    expected = np.eye(_WIDTH)
    for u in vectors:
      drawn = _DECAY * expected + (1 - _DECAY) * np.eye(_WIDTH)
      expected = np.linalg.inv(np.linalg.inv(drawn) + u.T @ u / rank)
    np.testing.assert_allclose(_run("reference", vectors), expected, atol=1e-5)

  @parameterized.parameters(1e-4, 1e-2, 1.0, 100.0)
  def test_reference_stays_between_zero_and_one(self, scale):
    values = np.linalg.eigvalsh(_run("reference", _vectors(200, 1, scale)))
    self.assertGreater(values.min(), 0.0)
    self.assertLess(values.max(), 1 + 1e-5)

  def test_reference_without_gradients_rests_at_the_identity(self):
    found = _run("reference", np.zeros((3, 1, _WIDTH)))
    np.testing.assert_allclose(found, np.eye(_WIDTH), atol=1e-6)

  def test_reference_of_one_vector_tends_to_a_root(self):
    u = _vectors(1)[0]
    found = _run("reference", np.repeat(u[None], 200, 0))
    square = float(np.sum(u * u))
    along = (u @ found @ u.T / square).item()
    # j (1 + k |u|^2) = k with k = decay j + 1 - decay, a quadratic in j.
    root = max(
      np.roots([
        _DECAY * square,
        1 + (1 - _DECAY) * square - _DECAY,
        -(1 - _DECAY),
      ])
    )  # fmt: skip
    self.assertAlmostEqual(along, root, places=5)
    self.assertLessEqual(along, 1 / (1 + square))

  def test_paper_is_as_printed_and_not_an_inverse(self):
    u = _vectors(1)[0]
    square = (u @ u.T).item()
    expected = _DECAY * np.eye(_WIDTH) + (1 - _DECAY) / (
      _DECAY**2 * (1 + _DECAY * (1 - _DECAY) * square)
    ) * (u.T @ u)
    found = _run("paper", u[None])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # It grows along u, where every inverse shrinks.
    self.assertGreater((u @ found @ u.T).item(), square)
    self.assertLess((u @ _run("exact", u[None]) @ u.T).item(), square)

  @parameterized.parameters(
    ("exact", 1e-4, 1e9, 1e11),  # 1 / decay per refresh
    ("reference", 1e-4, 0.99, 1.01),
    ("paper", 1e-4, 0.0, 1e-10),  # decay per refresh
    ("exact", 1.0, 1.0, 1e3),
    ("reference", 1.0, 0.5, 1.0),
  )
  def test_how_the_rules_part(self, rule, scale, least, most):
    """The largest eigenvalue after 480 refreshes at width 64."""
    vectors = _vectors(480, 1, scale, width=64)
    largest = np.linalg.eigvalsh(_run(rule, vectors)).max()
    self.assertBetween(largest, least, most)

  def test_paper_diverges_for_vectors_of_unit_coordinates(self):
    found = _run("paper", _vectors(100, width=64))
    self.assertFalse(np.isfinite(found).all() and np.abs(found).max() < 1e6)

  @parameterized.parameters("exact", "reference")
  def test_a_stack_is_its_layers(self, rule):
    vectors = jnp.asarray(_vectors(3, 2))
    factors = jnp.stack([jnp.diag(jnp.arange(1.0, 8.0)) + i for i in range(3)])
    stacked = RULES[rule](factors, vectors, _DECAY)
    for i in range(3):
      np.testing.assert_allclose(
        stacked[i], RULES[rule](factors[i], vectors[i], _DECAY), rtol=1e-5,
        atol=1e-6,
      )  # fmt: skip

  def test_paper_takes_one_vector(self):
    with self.assertRaisesRegex(ValueError, "rule 'paper' is for rank 1"):
      RULES["paper"](jnp.eye(3), jnp.ones((2, 3)), _DECAY)

  @parameterized.parameters(16, 512)
  def test_work_does_not_depend_on_anything_but_the_width(self, width):
    """A refresh is a few products of the factor with one vector."""
    compiled = jax.jit(lambda j, u: RULES["exact"](j, u, _DECAY)).lower(
      jnp.eye(width), jnp.ones((1, width))
    )
    flops = compiled.compile().cost_analysis()["flops"]
    self.assertLess(flops, 16 * width**2)


class NormsTest(parameterized.TestCase):
  @parameterized.parameters(*NORMS)
  def test_identity_has_norm_one_at_every_width(self, norm):
    for width in (3, 50):
      stack = jnp.stack([jnp.eye(width), 3.0 * jnp.eye(width)])
      np.testing.assert_allclose(NORMS[norm](stack), [1.0, 3.0], rtol=1e-6)

  def test_spectral_is_the_largest_eigenvalue(self):
    rng = np.random.default_rng(3)
    basis, _ = np.linalg.qr(rng.normal(size=(9, 9)))
    values = np.r_[np.linspace(0.1, 4.0, 8), 12.0]
    found = NORMS["spectral"](jnp.asarray(basis @ np.diag(values) @ basis.T))
    np.testing.assert_allclose(found, 12.0, rtol=1e-4)

  def test_blend_draws_to_the_identity(self):
    found = inverse_factor.blend(jnp.full((2, 2), 5.0), 0.9)
    np.testing.assert_allclose(found, [[4.6, 4.5], [4.5, 4.6]], rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
