"""Layer by layer is the same update as all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from bertjax.optim import by_layer, global_norm, lamb, selection
from tests.optim.toy import assert_close, gradients, run, stack, unstacked

_AXES = {"layers": {"kernel": (0,), "bias": (0,)}, "embedding": ()}
_STACKED = selection.as_axes_fn(_AXES)


class ApplyTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("lamb", {}),
    ("clipped_ratio", dict(trust_clip=(0.01, 0.3))),
    ("nn_lamb", dict(nesterov="both")),
    ("bfloat16_moment", dict(mu_dtype="bfloat16")),
    ("without_ratio", dict(adapt=False)),
  )
  def test_parameters_and_state_equal_those_of_update(self, options):
    # A schedule, so that its counter matters as well as that of the moments.
    rate = optax.linear_schedule(0.1, 0.0, 20)
    transform = lamb(rate, stacked_axes=_AXES, **options)
    params = stack(unstacked())
    path, wanted = run(transform, params, steps=4)
    step = jax.jit(
      functools.partial(
        by_layer.apply, transform, stacked=_STACKED, names={"layers/kernel"}
      )
    )
    state = transform.init(params)
    for i in range(4):
      grads = gradients(params, float(i))
      applied = step(grads, state, params)
      params, state = applied.params, applied.state
      np.testing.assert_allclose(
        jnp.sqrt(applied.gradient_square), global_norm(grads), rtol=1e-6
      )
    self.assertEqual(jax.tree.structure(state), jax.tree.structure(wanted))
    jax.tree.map(lambda a, b: self.assertEqual(a.dtype, b.dtype), state, wanted)
    # Same arithmetic, other summation order; a moment may round once.
    atol = 2e-3 if "mu_dtype" in options else 1e-6
    assert_close(params, path[-1], rtol=1e-5, atol=atol)
    assert_close(state, wanted, rtol=1e-5, atol=atol)

  def test_options_that_mix_layers_are_not_staged(self):
    for options in (
      dict(pre_norm="clip"),
      dict(split=lambda name, leaf: None),
      dict(norm_axes=lambda name, leaf: ()),
    ):
      transform = lamb(0.1, **options)
      self.assertNotIsInstance(transform, by_layer.StagedTransformation)


class LoopedTest(absltest.TestCase):
  def test_large_stacks_that_fit_five_times_are_looped(self):
    def leaf(*shape):
      return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {
      "small": leaf(3, 512, 511),
      "fits": leaf(3, 512, 512),
      "large": leaf(3, 1024, 512),
      "unstacked": leaf(512, 512),
      "second_axis": leaf(512, 3, 512),
    }
    axes = {name: (0,) for name in params}
    axes |= {"unstacked": (), "second_axis": (1,)}
    found = by_layer.looped(
      params, lambda name, leaf: axes[name], on_chip=5 * 2**20
    )
    self.assertEqual(found, {"fits"})

  def test_a_cpu_has_nothing_to_gain(self):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    self.assertEqual(by_layer.on_chip_bytes(mesh), 0)
    self.assertEqual(by_layer.on_chip_bytes(None), 0)


if __name__ == "__main__":
  absltest.main()
