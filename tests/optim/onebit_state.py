"""Options of tests of averages in one bit, and what they read off a state."""

import jax
import numpy as np

from bertjax.optim.onebit_adam import OneBitAdamState
from bertjax.optim.onebit_lamb import OneBitLambState
from bertjax.parallel import elastic
from bertjax.parallel.error_feedback import ErrorFeedback

ADAM = dict(b1=0.9, b2=0.99, eps=1e-8)
ONEBIT = dict(name="onebit_adam", freeze_step=3, weight_decay=0.0, **ADAM)


def assert_close(actual, expected, **tolerance):
  tolerance = dict(rtol=1e-5, atol=1e-6) | tolerance  # float32, other order
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance),
    jax.device_get(actual),
    jax.device_get(expected),
  )


def nodes(state, kind):
  leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
  return [leaf for leaf in leaves if isinstance(leaf, kind)]


def debt(state):
  """Mean of the workers' errors plus the servers', by parameter."""
  (errors,) = nodes(state.opt_state, ErrorFeedback)
  return jax.tree.map(
    lambda e, d: e.mean(0) + elastic.joined_servers(d, e.shape[1:]),
    jax.device_get(errors.worker.tree),
    jax.device_get(errors.server),
  )


def sent_and_owed(state):
  """The averaged momentum in the units of its errors, plus what is owed.

  Its next value follows from the mean gradient alone: what of it was sent, and
  by how many workers, does not matter.
  """
  (adam,) = nodes(state.opt_state, (OneBitAdamState, OneBitLambState))
  mu = jax.device_get(adam.mu)
  scales = jax.tree.map(lambda m: 1.0, mu)
  if isinstance(adam, OneBitLambState):
    scales = jax.device_get(adam.momentum_scale)
  return jax.tree.map(
    lambda m, scale, owed: m * scale + owed, mu, scales, debt(state)
  )
