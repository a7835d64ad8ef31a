"""LAMB, Adam and AdamW against independent implementations and closed forms."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from bertjax.optim import adam, adamw, build_optimizer, lamb
from bertjax.optim.adamw import scale_by_adam
from tests.optim.toy import NOTHING, assert_close, run, unstacked


class PeersTest(parameterized.TestCase):
  @parameterized.product(weight_decay=(0.0, 0.01), nesterov=("none", "first"))
  def test_unadapted_is_optax_adamw(self, weight_decay, nesterov):
    mine, _ = run(
      lamb(
        1e-2,
        adapt=False,
        weight_decay=weight_decay,
        nesterov=nesterov,
        no_decay=["bias"],
      ),
      unstacked(),
    )
    theirs, _ = run(
      optax.adamw(
        1e-2,
        eps=1e-6,
        weight_decay=weight_decay,
        nesterov=nesterov == "first",
        mask=lambda params: jax.tree_util.tree_map_with_path(
          lambda path, _: path[-1].key != "bias", params
        ),
      ),
      unstacked(),
    )
    # Rounding of ten steps of |w| up to 30.
    assert_close(mine[-1], theirs[-1], rtol=1e-6, atol=1e-6)

  @parameterized.parameters(0.0, 0.01)
  def test_defaults_without_exclusions_are_optax_lamb(self, weight_decay):
    mine, _ = run(
      lamb(
        1e-2,
        weight_decay=weight_decay,
        no_decay=NOTHING,
        no_adaptation=NOTHING,
      ),
      unstacked(),
    )
    theirs, _ = run(optax.lamb(1e-2, weight_decay=weight_decay), unstacked())
    assert_close(mine[-1], theirs[-1], rtol=1e-6, atol=1e-6)

  def test_adam_and_adamw_are_optax(self):
    for mine, theirs in (
      (adam(1e-2), optax.adam(1e-2)),
      (
        adamw(1e-2, eps=1e-8, no_decay=NOTHING),
        optax.adamw(1e-2, weight_decay=0.01),
      ),
    ):
      assert_close(
        run(mine, unstacked())[0][-1],
        run(theirs, unstacked())[0][-1],
        rtol=1e-6,
        atol=1e-6,
      )

  def quadratic(self):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6)).astype(np.float32)
    start = rng.normal(size=(6,)).astype(np.float32)
    return root @ root.T / 6, start

  def mine(self, transform, steps=20, scale=1.0):
    matrix, start = self.quadratic()
    path, _ = run(
      transform,
      {"w": jnp.asarray(scale * start)},
      steps,
      lambda p, t: {"w": jnp.asarray(matrix) @ p["w"]},
    )
    return path[-1]["w"]

  def test_lamb_is_keras_lamb(self):
    import keras

    matrix, start = self.quadratic()
    weight = keras.Variable(start)
    peer = keras.optimizers.Lamb(learning_rate=0.02, epsilon=1e-6)
    for _ in range(20):
      peer.apply([jnp.asarray(matrix) @ weight.value], [weight])
    # 20 steps of float32 rounding.
    np.testing.assert_allclose(
      self.mine(lamb(0.02, weight_decay=0.0)),
      np.asarray(weight.value),
      rtol=1e-5,
      atol=1e-6,
    )

  @parameterized.product(
    weight_decay=(0.0, 0.1), size=(1.0, 20.0), unadapted=(False, True)
  )
  def test_lamb_is_torch_optimizers_lamb(self, weight_decay, size, unadapted):
    """The paper's third version: no correction, and norms of 10 at most."""
    import torch
    import torch_optimizer

    matrix, start = self.quadratic()
    start = size * start
    self.assertEqual(np.linalg.norm(start) > 10, size == 20.0)
    weight = torch.tensor(start, requires_grad=True)
    peer = torch_optimizer.Lamb(
      [weight],
      lr=0.02,
      eps=1e-6,
      weight_decay=weight_decay,
      clamp_value=10,
      adam=unadapted,
      debias=False,
    )
    for _ in range(20):
      weight.grad = torch.tensor(matrix) @ weight.detach()
      peer.step()
    mine = self.mine(
      lamb(
        0.02,
        weight_decay=weight_decay,
        bias_correction=False,
        adapt=not unadapted,
        phi_clip=(0.0, 10.0),
      ),
      scale=size,
    )
    # 20 steps of float32 rounding.
    np.testing.assert_allclose(mine, weight.detach().numpy(), rtol=1e-5,
                               atol=1e-6 * size)  # fmt: skip

  @parameterized.parameters(0.0, 0.1)
  def test_adamw_is_torch_adamw(self, weight_decay):
    import torch

    matrix, start = self.quadratic()
    weight = torch.tensor(start, requires_grad=True)
    peer = torch.optim.AdamW(
      [weight], lr=0.02, eps=1e-6, weight_decay=weight_decay
    )
    for _ in range(20):
      weight.grad = torch.tensor(matrix) @ weight.detach()
      peer.step()
    np.testing.assert_allclose(
      self.mine(adamw(0.02, weight_decay=weight_decay)),
      weight.detach().numpy(),
      rtol=1e-5,  # 20 steps of float32 rounding
      atol=1e-6,
    )

  def test_without_eps_what_has_no_gradient_stays(self):
    transform = scale_by_adam(eps=0.0)
    grads = jnp.array([0.0, -2.0])
    found, _ = transform.update(grads, transform.init(grads))
    np.testing.assert_allclose(found, [0.0, -1.0], rtol=1e-5)

  def test_uncorrected_adam_has_the_closed_form(self):
    """Gradient 1: u_t = (1 - b1^t) / (sqrt(1 - b2^t) + eps)."""
    transform = adamw(1.0, bias_correction=False, weight_decay=0.0)
    params = {"w": jnp.zeros(())}
    state = transform.init(params)
    for t in range(1, 21):
      updates, state = transform.update({"w": jnp.ones(())}, state, params)
      expected = (1 - 0.9**t) / (np.sqrt(1 - 0.999**t) + 1e-6)
      # Twenty float32 roundings, of 1 - 0.999 above all (6e-5 relative ulp).
      np.testing.assert_allclose(-updates["w"], expected, rtol=1e-4)
      if t == 1:
        self.assertAlmostEqual(-float(updates["w"]), 3.1622, delta=2e-4)

  def test_grad_averaging_off_sums_gradients(self):
    """Gradient 1, no correction: m_t = (1 - b1^t) / (1 - b1)."""
    transform = lamb(
      1.0,
      adapt=False,
      weight_decay=0.0,
      bias_correction=False,
      grad_averaging=False,
    )
    params = {"w": jnp.ones(())}
    updates, _ = transform.update(
      {"w": jnp.ones(())}, transform.init(params), params
    )
    np.testing.assert_allclose(
      -updates["w"], 1.0 / (np.sqrt(0.001) + 1e-6), rtol=1e-4
    )

  def test_nn_lamb_looks_ahead_in_both_moments(self):
    """Constant gradient g: both closed forms of the appendix, at step 1."""
    transform = lamb(1.0, adapt=False, weight_decay=0.0, nesterov="both")
    params = {"w": jnp.ones(())}
    updates, _ = transform.update(
      {"w": jnp.full((), 2.0)}, transform.init(params), params
    )
    first, second = (
      0.9 * 0.1 * 2 / (1 - 0.9**2) + 0.1 * 2 / (1 - 0.9),
      0.999 * 0.001 * 4 / (1 - 0.999**2) + 0.001 * 4 / (1 - 0.999),
    )
    np.testing.assert_allclose(
      -updates["w"], first / np.sqrt(second), rtol=1e-4
    )

  def test_independent_decay_follows_the_schedule_not_the_peak(self):
    params = {"w": jnp.ones((3,))}
    moved = []
    for rate in (1e-2, 1e-3):
      spec = dict(
        name="adamw",
        learning_rate=rate,
        weight_decay=0.1,
        weight_decay_form="independent",
        schedule=dict(name="linear"),
      )
      transform = build_optimizer(spec, total_steps=4, params=params).transform
      state = transform.init(params)
      for _ in range(2):
        updates, state = transform.update({"w": jnp.zeros((3,))}, state, params)
        moved.append(float(updates["w"][0]))
    # Zero gradient: only decay, at rate / peak = 1 and 3/4.
    np.testing.assert_allclose(moved, [-0.1, -0.075] * 2, rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
