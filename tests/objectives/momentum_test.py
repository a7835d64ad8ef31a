"""Momentum contrast against closed forms and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import absltest, parameterized

from bertjax.objectives import momentum

B, C, K, T = 5, 7, 15, 0.07


def rows(count, seed):
  x = np.random.default_rng(seed).normal(size=(count, C)).astype(np.float32)
  return momentum.unit(jnp.asarray(x))


class SlowCopyTest(parameterized.TestCase):
  def run_steps(self, rate, steps):
    """Copies of w = 2, 3, 4... at the given steps."""
    model = momentum.SlowCopy(rate)
    state = model.init({}, {"w": jnp.full((2,), 9.0)}, None)
    found = []
    for i, step in enumerate(steps):
      fast = {"w": jnp.full((2,), 2.0 + i)}
      copy, state = model.apply(state, fast, step, mutable=[momentum.SLOW])
      found.append(float(copy["w"][0]))
    return found

  @parameterized.named_parameters(
    ("fixed", 1.0, [2, 2, 2]),
    ("copied", 0.0, [2, 3, 4]),
    ("between", 0.9, [2, 2.1, 2.29]),
  )
  def test_moves_towards_the_model_after_copying_it(self, rate, expected):
    steps = [jnp.int32(s) for s in (7, 8, 9)]
    np.testing.assert_allclose(self.run_steps(rate, steps), expected, rtol=1e-6)
    np.testing.assert_allclose(
      self.run_steps(rate, [None] * 3), expected, rtol=1e-6
    )

  def test_moves_once_in_a_step(self):
    steps = [jnp.int32(s) for s in (7, 7, 8, 8)]
    found = self.run_steps(0.5, steps)
    np.testing.assert_allclose(found, [2, 2, 3, 3])

  def test_has_no_gradient(self):
    model = momentum.SlowCopy(0.5)
    state = model.init({}, jnp.ones(2), None)

    def copied(x):
      return model.apply(state, x, None, mutable=[momentum.SLOW])[0].sum()

    np.testing.assert_array_equal(jax.grad(copied)(jnp.ones(2)), 0)


class QueueTest(parameterized.TestCase):
  def test_the_oldest_leave_first(self):
    queue = momentum.Queue(K, C)
    state = queue.init(jax.random.key(0))
    first = state[momentum.QUEUE]["keys"]
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    pushed = [rows(B, seed) for seed in range(4)]
    for keys in pushed:
      _, state = queue.apply(
        state, keys, method="push", mutable=[momentum.QUEUE]
      )
    expected = jnp.concatenate([pushed[3], pushed[1], pushed[2]])
    np.testing.assert_array_equal(queue.apply(state), expected)

  def test_a_size_that_the_batch_does_not_divide(self):
    queue = momentum.Queue(K, C)
    state = queue.init(jax.random.key(0))
    with self.assertRaisesRegex(
      ValueError, "queue_size=15 must be a multiple of the 4 clouds"
    ):
      queue.apply(state, rows(4, 0), method="push", mutable=[momentum.QUEUE])


class ContrastTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.queries, cls.keys, cls.queue = rows(B, 0), rows(B, 1), rows(K, 2)
    cls.q, cls.k, cls.rest = (
      torch.from_numpy(np.array(x)) for x in (cls.queries, cls.keys, cls.queue)
    )

  def test_plain(self):
    own = (self.q * self.k).sum(1, keepdim=True)
    logits = torch.cat([own, self.q @ self.rest.T], 1) / T
    expected = torch.nn.functional.cross_entropy(
      logits, torch.zeros(B, dtype=torch.long), reduction="none"
    )
    losses, _ = momentum.contrast(self.queries, self.keys, self.queue, T)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)

  def test_mixed(self):
    logits = torch.cat([self.q @ self.k.T, self.q @ self.rest.T], 1) / T
    ratios = torch.rand(B)
    labels = torch.arange(B)
    mine, partner = (
      torch.nn.functional.cross_entropy(logits, y, reduction="none")
      for y in (labels, labels.flip(0))
    )
    losses, _ = momentum.mixed_contrast(
      self.queries, self.keys, self.queue, jnp.asarray(ratios.numpy()), T
    )
    expected = ratios * mine + (1 - ratios) * partner
    np.testing.assert_allclose(losses, expected, rtol=1e-4)

  def test_hits(self):
    _, hits = momentum.contrast(self.keys, self.keys, self.queue, T)
    np.testing.assert_array_equal(hits, 1)
    _, hits = momentum.contrast(self.queue[:B], self.keys, self.queue, T)
    np.testing.assert_array_equal(hits, 0)
    ratios = jnp.zeros(B)
    for keys, hit in ((self.keys, 1), (self.keys[::-1], 1), (-self.keys, 0)):
      _, hits = momentum.mixed_contrast(
        keys, self.keys, self.queue, ratios, 1.0
      )
      np.testing.assert_array_equal(hits, hit)


if __name__ == "__main__":
  absltest.main()
