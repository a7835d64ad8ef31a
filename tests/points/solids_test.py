"""Points of solids lie where they should, as densely everywhere."""

import math

import numpy as np
from absl.testing import absltest, parameterized

from bertjax.data.shapes import solids

COUNT = 40_000


def drawn(surface, seed=0):
  return surface.draw(COUNT, np.random.default_rng(seed))


class SolidsTest(parameterized.TestCase):
  def test_sphere(self):
    points = drawn(solids.sphere(2))
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 2)
    # Archimedes: heights on a sphere are uniform.
    heights = np.histogram(points[:, 2], 8, (-2, 2))[0] / COUNT
    np.testing.assert_allclose(heights, 1 / 8, atol=0.01)

  def test_disc_with_a_hole(self):
    surface = solids.disc(3, 1)
    radii = np.linalg.norm(drawn(surface)[:, :2], axis=1)
    self.assertAlmostEqual(surface.area, math.pi * 8)
    self.assertBetween(radii.min(), 1, 1.01)
    # Areas of rings are differences of squares.
    self.assertAlmostEqual((radii < 2).mean(), 3 / 8, delta=0.01)

  def test_tube_of_two_radii(self):
    surface = solids.tube(2, 4, 1)
    points = drawn(surface)
    radii, heights = np.linalg.norm(points[:, :2], axis=1), points[:, 2]
    np.testing.assert_allclose(radii, 1.5 - heights / 4, atol=1e-9)
    self.assertAlmostEqual(surface.area, math.pi * 3 * math.sqrt(17))
    # The lower half holds (2 + 1.5) of (2 + 1.5) + (1.5 + 1) parts.
    self.assertAlmostEqual((heights < 0).mean(), 3.5 / 6, delta=0.01)

  def test_tube_of_one_radius(self):
    points = drawn(solids.tube(2, 4))
    np.testing.assert_allclose(np.linalg.norm(points[:, :2], axis=1), 2)
    self.assertAlmostEqual((points[:, 2] < 0).mean(), 0.5, delta=0.01)

  def test_torus(self):
    surface = solids.torus(3, 1)
    points = drawn(surface)
    radii = np.linalg.norm(points[:, :2], axis=1)
    np.testing.assert_allclose(np.hypot(radii - 3, points[:, 2]), 1)
    # Pappus: the outer half's centroid goes round at 3 + 2 / pi.
    share = (3 + 2 / math.pi) / 6
    self.assertAlmostEqual((radii > 3).mean(), share, delta=0.01)
    with self.assertRaisesRegex(ValueError, r"thickness=4 must be in 0\.\.3"):
      solids.torus(3, 4)

  def test_box(self):
    parts = list(solids.box(1, 2, 3).values())
    points, labels = solids.sample(parts, COUNT, np.random.default_rng(0))
    half = np.array([0.5, 1, 1.5])
    np.testing.assert_allclose((np.abs(points) / half).max(1), 1)
    self.assertTrue((points[labels == 0, 2] == 1.5).all())
    self.assertTrue((points[labels == 1, 2] == -1.5).all())
    for axis, area in ((0, 6), (1, 3), (2, 2)):  # of each of a pair of faces
      on = np.isclose(points[:, axis], half[axis])
      self.assertAlmostEqual(on.mean(), area / 22, delta=0.01)

  @parameterized.parameters(0, 1, 2)
  def test_rotations_are_right_handed(self, axis):
    matrix = solids.rotation(axis, 0.3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turned = matrix @ np.eye(3)[i]
    self.assertAlmostEqual(turned[i], math.cos(0.3))
    self.assertAlmostEqual(turned[j], math.sin(0.3))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)

  def test_same_generator_same_points(self):
    parts = [[solids.sphere(1)], [solids.disc(1), solids.tube(1, 1)]]
    draw = [
      solids.sample(parts, 50, np.random.default_rng(7)) for _ in range(2)
    ]
    for a, b in zip(*draw):
      np.testing.assert_array_equal(a, b)
    self.assertLen(draw[0][0], 50)
    with self.assertRaisesRegex(ValueError, "no area"):
      solids.sample([[]], 5, np.random.default_rng(0))


if __name__ == "__main__":
  absltest.main()
