"""A small tree of layers, and the path that a transform takes on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

NOTHING = lambda name, leaf: False  # noqa: E731
STEPS = 10


def unstacked(seed=0):
  """Three layers of very different scale, a bias, a zero tensor."""
  rng = np.random.default_rng(seed)

  def normal(scale, *shape):
    return (scale * rng.normal(size=shape)).astype(np.float32)

  layers = {
    f"layers_{i}": {"kernel": normal(scale, 5, 7), "bias": normal(scale, 7)}
    for i, scale in enumerate((1.0, 10.0, 0.1))
  }
  return jax.device_put({**layers, "embedding": normal(1.0, 11, 5)})


def stack(tree):
  """The scanned twin of an unstacked tree."""
  layers = [tree[f"layers_{i}"] for i in range(3)]
  stacked = jax.tree.map(lambda *x: np.stack(x), *layers)
  return {"layers": jax.device_put(stacked), "embedding": tree["embedding"]}


def gradients(params, step):
  """A fixed non-convex-looking gradient that depends on params and step."""
  return jax.tree.map(lambda p: jnp.sin(3.0 * p + step) + 0.1 * p, params)


def run(transform, params, steps=STEPS, grad_fn=gradients):
  """Parameters after every step, and the last state."""

  @jax.jit
  def one(params, state, step):
    updates, state = transform.update(grad_fn(params, step), state, params)
    return optax.apply_updates(params, updates), state

  state, path = jax.jit(transform.init)(params), [params]
  for step in range(steps):
    params, state = one(params, state, float(step))
    path.append(params)
  return path, state


def first_update(transform, params, grads=None):
  """Updates of the first step, and the state after it."""

  @jax.jit
  def one(params, grads):
    if grads is None:
      grads = gradients(params, 0.0)
    return transform.update(grads, transform.init(params), params)

  return one(params, grads)


def assert_close(actual, expected, rtol, atol=0.0):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    actual,
    expected,
  )
