"""Layer by layer is the same update as all at once."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from bertjax.optim import (
  build_optimizer,
  by_layer,
  global_norm,
  gradient_norm,
  lamb,
  selection,
)
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


class BuiltTest(parameterized.TestCase):
  """Of what `build_optimizer` makes for a chip with room for every layer."""

  def built(self, **options):
    spec = dict(name="lamb", learning_rate=0.05, **options)
    axes = {
      "layers": {
        "kernel": ("layers", "embed", "mlp"),
        "bias": ("layers", "mlp"),
      },
      "embedding": ("vocab", "embed"),
    }
    with (
      mock.patch.object(by_layer, "on_chip_bytes", return_value=2**30),
      mock.patch.object(by_layer, "_LEAST_BYTES", 1),
    ):
      return build_optimizer(
        spec, total_steps=9, params=stack(unstacked()), logical_axes=axes
      )

  @parameterized.parameters(None, 0.3)
  def test_parameters_and_gradient_norm_are_those_of_update(self, clip_norm):
    optimizer = self.built(clip_norm=clip_norm)
    self.assertIsNotNone(optimizer.layerwise)
    plain = dataclasses.replace(optimizer, layerwise=None)
    params = stack(unstacked())
    state, grads = optimizer.transform.init(params), gradients(params, 1.0)
    found, want = (
      jax.jit(o.apply)(grads, state, params) for o in (optimizer, plain)
    )
    assert_close(found, want, rtol=1e-5, atol=1e-6)  # other orders of sums
    np.testing.assert_allclose(
      gradient_norm(found[1]), global_norm(grads), rtol=1e-6
    )

  def test_factors_and_freezing_take_the_plain_way(self):
    for options in (
      dict(freeze=["embedding"]),
      dict(lr_multipliers=[("embedding", 0.5)]),
    ):
      self.assertIsNone(self.built(**options).layerwise)


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
