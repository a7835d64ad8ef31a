"""A small tree of layers, and the path that a transform takes on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

NOTHING = lambda name, leaf: False  # noqa: E731
STEPS = 10


def unstacked(seed=0):
  """Three layers of very different scale, a bias, a zero tensor."""
  keys = jax.random.split(jax.random.key(seed), 5)
  layers = {
    f"layers_{i}": {
      "kernel": scale * jax.random.normal(keys[i], (5, 7)),
      "bias": scale * jax.random.normal(keys[i + 1], (7,)),
    }
    for i, scale in enumerate((1.0, 10.0, 0.1))
  }
  return {**layers, "embedding": jax.random.normal(keys[4], (11, 5))}


def stack(tree):
  """The scanned twin of an unstacked tree."""
  layers = [tree[f"layers_{i}"] for i in range(3)]
  return {
    "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers),
    "embedding": tree["embedding"],
  }


def gradients(params, step):
  """A fixed non-convex-looking gradient that depends on params and step."""
  return jax.tree.map(lambda p: jnp.sin(3.0 * p + step) + 0.1 * p, params)


def run(transform, params, steps=STEPS, grad_fn=gradients):
  """Parameters after every step, and the last state."""

  @jax.jit
  def one(params, state, step):
    updates, state = transform.update(grad_fn(params, step), state, params)
    return optax.apply_updates(params, updates), state

  state, path = transform.init(params), [params]
  for step in range(steps):
    params, state = one(params, state, float(step))
    path.append(params)
  return path, state


def assert_close(actual, expected, rtol, atol=0.0):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    actual,
    expected,
  )
