"""Hidden, replaced and mixed patches are what the paper says."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import points
from bertjax.objectives import point_masks

B, G, M = 65, 40, 3


def clouds():
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(B, G, 3)).astype(np.float32)
  inside = rng.normal(size=(B, G, M, 3)).astype(np.float32)
  index = np.arange(B * G * M, dtype=np.int32).reshape(B, G, M)
  return points.Patches(*map(jnp.asarray, (inside, centres, index)))


class MasksTest(parameterized.TestCase):
  def test_blocks_are_balls_of_a_size_in_between(self):
    centres = clouds().centres
    mask = np.asarray(
      point_masks.block_mask(jax.random.key(0), centres, 0.25, 0.45)
    )
    counts = mask.sum(1)
    # 65 draws of a share: both ends are reached, and nothing beyond.
    self.assertEqual((counts.min(), counts.max()), (10, 17))
    distances = np.asarray(points.squared_distances(centres, centres))
    balls = [
      any(
        d[i, hidden].max() <= d[i, ~hidden].min()
        for i in np.flatnonzero(hidden)
      )
      for d, hidden in zip(distances, mask)
    ]
    self.assertTrue(all(balls))
    self.assertGreater(len({tuple(row) for row in mask}), B - 3)

  @parameterized.parameters(
    (0.25, 0.45, 2, False),
    (0.25, 0.45, 3, True),
    (0.25, 0.5, 2, False),  # a share is less than the largest
    (0.5, 0.5, 2, True),  # but for where there is one alone
    (0.25, 0.51, 2, True),
    (0.1, 1.0, 1, False),
    (1.0, 1.0, 1, True),
  )
  def test_blocks_hide_a_patch_at_all(self, low, high, patches, hides):
    centres = jnp.zeros((2000, patches, 3))
    mask = point_masks.block_mask(jax.random.key(0), centres, low, high)
    self.assertEqual(point_masks.block_hides(low, high, patches), hides)
    self.assertEqual(bool(mask.any()), hides)

  def test_random_masks_have_one_share_for_all_clouds(self):
    centres = jnp.zeros((40, 1000, 3))
    shares = []
    for seed in range(20):
      mask = point_masks.random_mask(jax.random.key(seed), centres, 0.2, 0.6)
      each = np.asarray(mask).mean(1)
      # A share's own deviation is 0.016 at the most; between seeds it is 0.115.
      self.assertLess(each.std(), 0.03)
      shares.append(each.mean())
    self.assertGreater(np.std(shares), 0.06)
    self.assertBetween(min(shares), 0.19, 0.35)
    self.assertBetween(max(shares), 0.45, 0.61)

  def test_replacements_come_from_a_permutation_of_the_batch(self):
    masked = point_masks.random_mask(
      jax.random.key(0), clouds().centres, 0.5, 0.5
    )
    sources, moved = point_masks.replacements(jax.random.key(1), masked, 0.3)
    self.assertFalse((moved & masked).any())
    # 4 standard deviations of 1300 draws
    self.assertAlmostEqual(moved.sum() / (~masked).sum(), 0.3, delta=0.051)
    own = np.arange(B * G).reshape(B, G)
    np.testing.assert_array_equal(sources[~moved], own[~moved])
    taken = np.asarray(sources[moved])
    self.assertLen(set(taken), len(taken))
    # Other clouds' patches, nearly always.
    self.assertGreater((taken // G != own[moved] // G).mean(), 0.9)

  def test_mixtures_take_whole_patches_from_the_partner(self):
    patches = clouds()
    codes = jnp.arange(B * G).reshape(B, G)
    mixture = point_masks.mixed(jax.random.key(0), patches, codes)
    kept = np.asarray(mixture.codes == codes)
    for mine, old in zip(
      (*mixture.patches, mixture.codes), (*patches, codes), strict=True
    ):
      wide = kept.reshape(*kept.shape, *(1,) * (old.ndim - 2))
      np.testing.assert_array_equal(mine, np.where(wide, old, old[::-1]))
    self.assertTrue(kept[B // 2].all())  # mixed with itself
    others = np.arange(B) != B // 2
    share, ratios = kept.mean(1)[others], np.asarray(mixture.ratios)[others]
    # A share's deviation is 0.08 at the most.
    self.assertLess(np.abs(share - ratios).max(), 0.32)
    self.assertLess(ratios.min(), 0.1)
    self.assertGreater(ratios.max(), 0.9)


if __name__ == "__main__":
  absltest.main()
