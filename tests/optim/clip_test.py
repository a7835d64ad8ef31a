"""Clipping by norm: of the whole gradient, and of every shard's own."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.optim import build_optimizer, clip, clip_by_global_norm
from tests.optim.toy import unstacked


class ClipTest(parameterized.TestCase):
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

  def test_a_norm_that_overflows_is_seen(self):
    grads = {"a": jnp.array([3e20, 1.0])}  # finite, but not its square
    for transform in (
      clip_by_global_norm(1.0), clip.normalize_by_global_norm()
    ):  # fmt: skip
      found, state = transform.update(grads, transform.init(grads))
      self.assertTrue(np.isnan(found["a"]).all())
      self.assertTrue(np.isinf(state.norm))

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


if __name__ == "__main__":
  absltest.main()
