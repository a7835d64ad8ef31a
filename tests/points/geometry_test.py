"""Sampling, neighbours and distances against brute force and k-d trees."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy.spatial import cKDTree

from bertjax import points
from bertjax.points import neighbours
from tests import jitted

B, N, M, G, K = 3, 70, 41, 12, 7

sample = jax.jit(
  points.farthest_point_sampling,
  static_argnums=1,
  static_argnames="skip_near_origin",
)
nearest = jax.jit(points.nearest, static_argnums=2)
interpolate = jax.jit(points.interpolate)
chamfer = jax.jit(points.chamfer)


def clouds(seed, count, batch=B):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(batch, count, 3)).astype(np.float32)


def farthest(cloud, count, start, skip):
  """As a loop over points."""
  chosen = [start]
  while len(chosen) < count:
    best, far = -1, -1.0
    for i, point in enumerate(cloud):
      if skip and (point**2).sum() <= 1e-3:
        continue
      distance = min(((point - cloud[j]) ** 2).sum() for j in chosen)
      if distance > far:
        best, far = i, distance
    chosen.append(best)
  return chosen


class SamplingTest(parameterized.TestCase):
  @parameterized.parameters((0, False), (5, False), (0, True))
  def test_equals_a_loop(self, start, skip):
    cloud = clouds(0, 30)
    cloud[:, ::3] *= 0.02  # near the origin, where one kernel is blind
    found = sample(cloud, 14, start=start, skip_near_origin=skip)
    for row, one in zip(np.asarray(found), cloud):
      self.assertEqual(list(row), farthest(one, 14, start, skip))

  def test_all_points_are_chosen_once(self):
    found = np.asarray(sample(clouds(1, 20), 20))
    for row in found:
      self.assertCountEqual(row, range(20))

  def test_a_start_of_its_own_for_each_cloud(self):
    starts = np.array([4, 0, 9])
    found = sample(clouds(1, 20), 3, start=starts)
    np.testing.assert_array_equal(np.array(found)[:, 0], starts)

  @parameterized.parameters(0, 21)
  def test_too_few_or_many(self, count):
    with self.assertRaisesRegex(ValueError, f"count={count} .* 1 and 20"):
      points.farthest_point_sampling(clouds(1, 20), count)


class NeighboursTest(absltest.TestCase):
  def test_nearest_are_those_of_a_tree(self):
    queries, cloud = clouds(0, G), clouds(1, N)
    index, distances = jax.device_get(nearest(queries, cloud, K))
    for q, c, i, d in zip(queries, cloud, index, distances):
      expected, where = cKDTree(c).query(q, K)
      np.testing.assert_array_equal(i, where)
      np.testing.assert_allclose(d, expected**2, rtol=1e-5)

  def test_few_neighbours_are_the_first_of_many(self):
    queries, cloud = clouds(0, G), np.tile(clouds(1, N // 2), (1, 2, 1))
    many, far = jax.device_get(nearest(queries, cloud, 9))
    tpu = mock.patch.object(neighbours, "platform", lambda: "tpu")
    self.enterContext(tpu)
    counts = (1, 3, 4)  # copies of points are equally near
    found = jax.jit(lambda q, c: [points.nearest(q, c, n) for n in counts])
    for count, (few, near) in zip(counts, found(queries, cloud)):
      np.testing.assert_array_equal(few, many[..., :count])
      np.testing.assert_array_equal(near, far[..., :count])

    def distances(q, c, count):
      return jnp.sin(points.nearest(q, c, count)[1][..., :4]).sum()

    slope = jax.jit(jax.grad(distances, (0, 1)), static_argnums=2)
    slopes = [slope(queries, cloud, count) for count in (4, 9)]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *slopes
    )

  def test_far_from_the_origin_nothing_cancels(self):
    cloud = clouds(1, N) * 1e-3
    near, _ = jax.device_get(nearest(cloud[:, :G] + 64, cloud + 64, K))
    rounded = (cloud + np.float32(64)).astype(np.float64)
    for c, i in zip(rounded, near):
      gaps = ((c[:G, None] - c[None]) ** 2).sum(-1)
      np.testing.assert_allclose(
        np.take_along_axis(gaps, np.asarray(i), 1),
        np.sort(gaps, axis=1)[:, :K],
        rtol=1e-5,
      )

  def test_interpolation_weighs_by_inverse_squares(self):
    targets, cloud = clouds(0, N), clouds(1, G)
    features = clouds(2, G)[..., :2]
    found = jax.device_get(interpolate(targets, cloud, features))
    for t, c, f, got in zip(targets, cloud, features, found):
      distance, where = cKDTree(c).query(t, 3)
      weight = 1 / (distance**2 + 1e-8)
      weight /= weight.sum(1, keepdims=True)
      expected = (f[where] * weight[..., None]).sum(1)
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    # At a point that is known, it is what is known there.
    np.testing.assert_allclose(
      interpolate(cloud, cloud, features), features, atol=1e-5
    )

  def test_fewer_points_than_are_averaged(self):
    ones = np.ones((B, 1, 4), np.float32)
    found = interpolate(clouds(0, 5), clouds(1, 1), ones)
    # Compiled, a weight over itself is 1 up to float32's last bit.
    np.testing.assert_allclose(found, 1, rtol=2e-7)


class GroupingTest(absltest.TestCase):
  def test_patches_are_relative_to_centres(self):
    cloud = clouds(0, N)
    patches = jax.device_get(jitted.group(cloud, G, K))
    self.assertEqual(patches.points.shape, (B, G, K, 3))
    whole = np.take_along_axis(
      cloud[:, None], np.asarray(patches.index)[..., None], axis=2
    )
    np.testing.assert_allclose(
      patches.points + patches.centres[:, :, None], whole, atol=1e-6
    )
    # The centre itself is the nearest point.
    np.testing.assert_array_equal(patches.points[:, :, 0], 0)

  def test_translation_moves_centres_only(self):
    cloud = clouds(0, N)
    shift = np.float32([0.5, -2, 8])
    here, there = (jitted.group(x, G, K) for x in (cloud, cloud + shift))
    np.testing.assert_array_equal(here.index, there.index)
    np.testing.assert_allclose(there.points, here.points, atol=1e-5)
    np.testing.assert_allclose(
      there.centres, np.asarray(here.centres) + shift, atol=1e-5
    )


class ChamferTest(parameterized.TestCase):
  @parameterized.parameters((N, M), (1, 5), (1100, 600))
  def test_distances_are_those_of_trees(self, n, m):
    a, b = clouds(0, n), clouds(1, m)
    found = jax.device_get(chamfer(a, b))
    for x, y, forward, backward in zip(a, b, found.forward, found.backward):
      np.testing.assert_allclose(
        forward, cKDTree(y).query(x)[0] ** 2, rtol=1e-5
      )
      np.testing.assert_allclose(
        backward, cKDTree(x).query(y)[0] ** 2, rtol=1e-5
      )

  def test_sums_by_definition(self):
    a, b = clouds(0, N), clouds(1, M)
    found = chamfer(a, b)
    to_b = np.stack([cKDTree(y).query(x)[0] for x, y in zip(a, b)])
    to_a = np.stack([cKDTree(x).query(y)[0] for x, y in zip(a, b)])
    np.testing.assert_allclose(
      found.l1, (to_b.mean(1) + to_a.mean(1)) / 2, rtol=1e-5
    )
    np.testing.assert_allclose(
      found.l2, (to_b**2).mean(1) + (to_a**2).mean(1), rtol=1e-5
    )
    share = (to_b < 0.4).mean(1), (to_a < 0.4).mean(1)
    np.testing.assert_allclose(
      found.f_score(0.4), 2 * share[0] * share[1] / sum(share), rtol=1e-5
    )
    np.testing.assert_array_equal(found.f_score(1e-9), 0)

  def test_scales_and_vanishes(self):
    a, b = clouds(0, N), clouds(1, M)
    one, three = chamfer(a, b), chamfer(3 * a, 3 * b)
    np.testing.assert_allclose(three.l1, 3 * one.l1, rtol=1e-5)
    np.testing.assert_allclose(three.l2, 9 * one.l2, rtol=1e-5)
    np.testing.assert_array_equal(chamfer(a, a).l1, 0)

  @parameterized.parameters("l1", "l2")
  def test_gradients_are_those_of_the_whole_table(self, name):
    a, b = clouds(0, 530), clouds(1, M)

    def dense(a, b):
      table = ((a[:, :, None] - b[:, None]) ** 2).sum(-1)
      found = points.Chamfer(table.min(2), table.min(1))
      return getattr(found, name).sum()

    def ours(a, b):
      return getattr(points.chamfer(a, b), name).sum()

    for got, expected in zip(
      jax.jit(jax.grad(ours, (0, 1)))(a, b),
      jax.jit(jax.grad(dense, (0, 1)))(a, b),
    ):
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)

  def test_gradients_of_equal_clouds_are_finite(self):
    a = clouds(0, N)
    slope = jax.jit(jax.grad(lambda x, y: points.chamfer(x, y).l1.sum()))
    np.testing.assert_array_equal(slope(a, a), 0)

  def test_memory_is_linear(self):
    def temporaries(n):
      spec = jax.ShapeDtypeStruct((1, n, 3), jnp.float32)
      gradient = jax.grad(lambda a, b: points.chamfer(a, b).l2.sum(), (0, 1))
      compiled = jax.jit(gradient).lower(spec, spec).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    large = temporaries(8192)
    self.assertLess(large, 8192**2 * 4 / 4)
    self.assertLess(large, 2.2 * temporaries(4096))


if __name__ == "__main__":
  absltest.main()
