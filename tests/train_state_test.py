"""A state is initialised alike in one program and in two, from one trace."""

import functools
import pathlib
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from bertjax import experiment, train_state
from bertjax.config import settings
from bertjax.parallel.mesh import make_mesh
from tests import tiny

_SPEC = {"x": jax.ShapeDtypeStruct((4, 3), jnp.float32)}


class Counted(nn.Module):
  """Counts in a list of its class how often it is traced."""

  weights: object = None
  traced = []

  @nn.compact
  def __call__(self, batch, *, train):
    self.traced.append(train)
    x = batch["x"] if self.weights is None else batch["x"] * self.weights
    self.variable("batch_stats", "mean", lambda: x.mean(0))
    return nn.Dense(5)(x)


def states(objective):
  """Of the abstract form, of one program, and of two."""
  mesh = make_mesh(devices=jax.devices()[:2])
  adam, keys = optax.adam(1e-3), (jax.random.key(0), jax.random.key(1))
  with jax.set_mesh(mesh):
    train_state.abstract_params(objective, _SPEC)
    abstract, _ = train_state.state_shardings(
      objective, adam, _SPEC, mesh, *keys
    )
    make = functools.partial(train_state.init_state, objective, adam, _SPEC)
    whole = jax.jit(make)(*keys)
    make = functools.partial(train_state.init_variables, objective, _SPEC)
    variables = jax.jit(make)(keys[0])
    parts = train_state.start(adam, variables, keys[1])
  return abstract, whole, parts


class TrainStateTest(absltest.TestCase):
  def _assert_alike(self, objective):
    abstract, whole, parts = states(objective)
    self.assertEqual(jax.eval_shape(lambda: whole), abstract)
    self.assertEqual(jax.tree.structure(whole), jax.tree.structure(parts))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts)):
      if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
      np.testing.assert_array_equal(a, b)

  def test_shapes_and_values_are_of_one_trace(self):
    Counted.traced.clear()
    self._assert_alike(Counted())
    self.assertEqual(Counted.traced, [False])

  def test_a_run_traces_its_model_once_before_the_first_step(self):
    folder = pathlib.Path(self.create_tempdir())
    tiny.write_corpus(folder)
    # A width of its own: equal models are not traced again.
    made = settings(tiny.config(folder, evals={}, model=dict(mlp_dim=20)))
    initialised = train_state._initialised
    with mock.patch.object(
      train_state, "_initialised", side_effect=initialised
    ) as traced:
      experiment.build(made).init()
    self.assertEqual(traced.call_count, 1)

  def test_an_attribute_may_be_an_array(self):
    self._assert_alike(Counted(weights=np.arange(3, dtype=np.float32)[None]))


if __name__ == "__main__":
  absltest.main()
