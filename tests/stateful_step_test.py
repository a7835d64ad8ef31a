"""Objectives with state of their own, and what a step tells them."""

import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import optim, train_state, train_step
from bertjax.evals.replicas import differing
from bertjax.layers.batch_norm import batch_norm
from bertjax.objectives.frozen import FROZEN
from bertjax.objectives.step import current_step
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch

_ROWS, _WIDTH = 16, 3


class Normed(nn.Module):
  """Regression through a batch norm; says which step it is told."""

  queue: bool = False
  coefficients = {"squared": 1.0}
  independent_rows = False

  def weights(self, batch):
    return {"squared": jnp.float32(batch["x"].shape[0])}

  @nn.compact
  def __call__(self, batch, *, train):
    if self.queue:
      self.variable("queue", "keys", jnp.zeros, (2,))
    # A bias would have no gradient but noise, which Adam makes as large as any.
    hidden = nn.Dense(5, use_bias=False)(batch["x"])
    hidden = batch_norm(train, "norm", jnp.float32)(hidden)
    error = nn.Dense(1)(jax.nn.relu(hidden)) ** 2
    step = current_step(self)
    told = jnp.float32(-1 if step is None else step)
    return {"squared": error.sum()}, {"told": (told, jnp.float32(1))}


def _summing(optimizer):
  """The same optimizer, fed with local gradients that it sums itself."""

  def update(grads, state, params=None, **extra):
    grads = jax.tree.map(lambda g: jax.lax.psum(g, "data"), grads)
    return optimizer.transform.update(grads, state, params, **extra)

  transform = optim.LocalGradientTransformation(
    optimizer.transform.init, update
  )
  return optim.Optimizer(transform, optimizer.schedule, local_gradients=True)


def _batch():
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(_ROWS, _WIDTH)).astype(np.float32)
  # Later rows, so later devices too, have other means and spreads.
  return {"x": rows * np.linspace(1, 4, _ROWS, dtype=np.float32)[:, None]}


@functools.cache
def _run(num_devices=1, local=False, microbatches=1, queue=False):
  """The state after three steps on one batch, and all metrics."""
  mesh = make_mesh(devices=jax.devices()[:num_devices])
  objective, batch = Normed(queue), _batch()
  spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  params, axes = train_state.abstract_params(objective, spec)
  optimizer = optim.build_optimizer(
    dict(name="adamw", learning_rate=1e-2),
    total_steps=9,
    params=params,
    logical_axes=axes,
  )
  if local:
    optimizer = _summing(optimizer)
  key = jax.random.key(0)
  _, shardings = train_state.state_shardings(
    objective, optimizer.transform, spec, mesh, key
  )
  make = functools.partial(
    train_state.init_state, objective, optimizer.transform, spec
  )
  with jax.set_mesh(mesh):
    state = jax.jit(make, out_shardings=shardings)(key)
  step = train_step.compile_step(
    objective, optimizer, mesh, shardings, spec, microbatches
  )
  found = []
  for _ in range(3):
    state, metrics = step(state, put_batch(batch, mesh))
    found.append(jax.device_get(metrics))
  return state, found, mesh


class BatchNormTest(parameterized.TestCase):
  def test_one_step_averages_the_statistics_of_the_batch(self):
    state, _, _ = _run()
    stats = state.extra["batch_stats"]["norm"]
    self.assertGreater(np.abs(stats["mean"]).max(), 1e-3)
    self.assertGreater(np.abs(stats["var"] - 1).max(), 1e-2)

  @parameterized.named_parameters(
    ("mesh", dict(num_devices=4)),
    ("workers", dict(num_devices=4, local=True)),
  )
  def test_statistics_are_those_of_the_global_batch(self, layout):
    one, found, _ = _run()
    other, also, mesh = _run(**layout)
    for tree in ("params", "extra"):
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6),
        jax.device_get(getattr(one, tree)),
        jax.device_get(getattr(other, tree)),
      )
    for a, b in zip(found, also, strict=True):
      np.testing.assert_allclose(a["loss"][0], b["loss"][0], rtol=1e-5)
    drifted = differing([other.params, other.extra], mesh)
    self.assertEqual(set(drifted.values()), {0})

  def test_what_every_worker_would_keep_for_itself_is_refused(self):
    with self.assertRaisesRegex(ValueError, "its own queue .* 'lamb'"):
      _run(num_devices=2, local=True, queue=True)
    state, _, _ = _run(queue=True)  # nobody minds where all see everything
    self.assertIn("queue", state.extra)

  def test_frozen_models_are_the_same_on_every_worker(self):
    optimizer = mock.Mock(local_gradients=True)
    train_step.check_collections(optimizer, ("batch_stats", FROZEN))
    with self.assertRaisesRegex(ValueError, "its own slow of the objective"):
      train_step.check_collections(optimizer, ("slow", FROZEN))


class ClockTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(), dict(microbatches=4), dict(num_devices=4, local=True)
  )
  def test_an_objective_is_told_how_many_steps_were_taken(self, **layout):
    state, found, _ = _run(**layout)
    told = [m["told"][0] / m["told"][1] for m in found]
    self.assertEqual(told, [0, 1, 2])
    # A checkpoint holds one step only, the state's.
    self.assertEqual(set(state.extra), {"batch_stats"})

  def test_there_is_no_clock_outside_training(self):
    state, _, _ = _run()
    variables = {"params": state.params, **state.extra}
    _, metrics = Normed().apply(variables, _batch(), train=False)
    self.assertEqual(metrics["told"][0], -1)


if __name__ == "__main__":
  absltest.main()
