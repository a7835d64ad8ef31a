"""The kernel chooses what the loop chooses, and TPUs are faster for it."""

import importlib.util
import unittest

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from benchmarks.farthest_points import sampled
from bertjax import points
from bertjax.hardware import compile_for, price
from kernels.farthest_points import farthest_points, fits


def _clouds(b, n):
  found = np.random.default_rng(b * n).normal(size=(b, n, 3))
  found[0, n // 2] = found[0, 1]  # equally far
  return found.astype(np.float32)


class FarthestPointsTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 20, 20), (5, 200, 33), (16, 128, 7), (19, 130, 130)
  )
  def test_is_the_loop(self, b, n, count):
    """Sizes that fill no register, too; at last points chosen before."""
    clouds = _clouds(b, n)
    first = jnp.arange(b, dtype=jnp.int32) % n
    expected = points.farthest_point_sampling(clouds, count, start=first)
    found = farthest_points(
      jnp.asarray(clouds.transpose(2, 0, 1)),
      jnp.full((b, n), jnp.inf),
      first,
      count,
      interpret=True,
    )
    np.testing.assert_array_equal(found, expected)

  def test_distances_to_begin_with_bound_what_is_chosen(self):
    clouds = _clouds(3, 40)
    near = np.arange(40) % 3 == 1
    found = farthest_points(
      jnp.asarray(clouds.transpose(2, 0, 1)),
      jnp.where(near, -1.0, jnp.inf)[None].repeat(3, 0),
      jnp.full((3,), 1),
      20,
      interpret=True,
    )
    self.assertTrue(np.all(found[:, 0] == 1))
    self.assertFalse(np.any(near[np.asarray(found[:, 1:])]))

  def test_large_clouds_are_left_to_the_loop(self):
    self.assertTrue(fits(8192))
    self.assertFalse(fits(10**6))

  @unittest.skipUnless(
    importlib.util.find_spec("libtpu"),
    "libtpu is not installed: pip install 'bertjax[test]'",
  )
  def test_a_tpu_takes_a_fifth_of_the_cycles(self):
    """On a mesh, where each device has the clouds of its own."""
    sizes = dict(clouds=32, points=1024, count=64)
    ours = compile_for("v5e:2x2", sampled, **sizes)
    self.assertRegex(ours.text, r"tpu_custom_call")
    self.assertNotRegex(ours.text, "all-gather|all-reduce|all-to-all")
    loop = compile_for("v5e:2x2", sampled, kernel=False, **sizes)
    self.assertNotRegex(loop.text, r"tpu_custom_call")
    self.assertLess(5 * price(ours).cycles, price(loop).cycles)
    self.assertGreater(price(ours).cycles, 64 * 8 * 3)  # all steps counted


if __name__ == "__main__":
  absltest.main()
