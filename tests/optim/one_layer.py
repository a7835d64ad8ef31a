"""One linear layer behind a preconditioner, and statistics to feed it."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.layers.statistics import NAMES
from bertjax.optim import CurvatureState, build_optimizer

ROWS, IN, OUT = 6, 5, 3
PATH = "layer"


@functools.cache
def parameters(bias=True):
  """The layer, and a parameter that belongs to none."""
  keys = jax.random.split(jax.random.key(0))
  layer = {"kernel": jax.random.normal(keys[0], (IN, OUT))}
  if bias:
    layer["bias"] = jax.random.normal(keys[1], (OUT,))
  return {PATH: layer, "other": jnp.arange(4.0)}


@functools.cache
def samples(seed=1):
  """Inputs and gradients of the loss by outputs, of one token per row."""
  keys = jax.random.split(jax.random.key(seed))
  return (
    0.5 + jax.random.normal(keys[0], (ROWS, IN)),
    (0.2 + jax.random.normal(keys[1], (ROWS, OUT))) / ROWS,
  )


def statistics(x, g):
  """All that there are, of one shard."""
  found = dict(
    token_count=np.full((1, 1), ROWS, np.float32),
    input_sum=x.sum(0)[None, None],
    output_sum=g.sum(0)[None, None],
    input_square=(x * x).sum()[None, None],
    input_gram=(x.T @ x)[None],
    output_gram=(g.T @ g)[None],
    input_rows=x,
    output_rows=g,
  )
  assert set(found) == set(NAMES)
  return {PATH: found}


def gradients(x, g, bias=True):
  """Of the loss by `parameters`."""
  layer = {"kernel": x.T @ g}
  if bias:
    layer["bias"] = g.sum(0)
  return {PATH: layer, "other": jnp.array([3.0, 1.0, -1.0, 2.0])}


class Compiled(NamedTuple):
  """A transformation's two functions."""

  init: Callable
  update: Callable


@functools.cache
def _built(name, bias, learning_rate, switch, options):
  spec = dict(name=name) | dict(options)
  if switch is not None:
    spec["switch"] = dict(switch)
  transform = build_optimizer(
    dict(name="sgd", learning_rate=learning_rate, precondition=spec),
    total_steps=100,
    params=parameters(bias),
  ).transform
  return Compiled(jax.jit(transform.init), jax.jit(transform.update))


def build(name, bias=True, learning_rate=0.5, switch=None, **options):
  """SGD behind a preconditioner; the same arguments compile once."""
  switch = None if switch is None else tuple(switch.items())
  return _built(name, bias, learning_rate, switch, tuple(options.items()))


def curvature(state):
  """The preconditioner's state within an optimizer's."""
  leaves = jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, CurvatureState)
  )
  (found,) = [x for x in leaves if isinstance(x, CurvatureState)]
  return found


def matrix(tree):
  """[W, b] of a layer's parameters, outputs by inputs, float64."""
  layer = tree[PATH]
  columns = [np.asarray(layer["kernel"]).T]
  if "bias" in layer:
    columns.append(np.asarray(layer["bias"])[:, None])
  return np.concatenate(columns, 1).astype(np.float64)


def direction(name, bias=True, steps=1, rate=0.5, **options):
  """D of the last step, where every step has samples of its own; the state."""
  transform = build(name, bias, rate, **options)
  state = transform.init(parameters(bias))
  for seed in range(steps):
    x, g = samples(seed)
    updates, state = transform.update(
      gradients(x, g, bias),
      state,
      parameters(bias),
      statistics=statistics(x, g),
    )
  return -matrix(updates) / rate, state


def homogeneous(x, bias=True):
  """Inputs with a 1 for the bias, float64."""
  x = np.asarray(x, np.float64)
  return np.concatenate([x, np.ones((len(x), 1))], 1) if bias else x


def assert_near(found, expected, rtol=2e-4):
  """Relative to the largest entry: float32 against float64."""
  np.testing.assert_allclose(
    found, expected, rtol=rtol, atol=rtol * np.abs(expected).max()
  )
