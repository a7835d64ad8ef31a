"""The reference attention: what is visible, what is added, what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from bertjax.layers.attention import (
  SelfAttention,
  reference_attend,
  visible,
)
from bertjax.layers.flash import FlashAttend
from tests import jitted
from tests.draws import normal

B, T, H, D = 2, 8, 3, 4
_STATIC = ("causal", "window")


class ReferenceAttendTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.q, cls.k, cls.v = (normal(i, B, T, H, D) for i in range(3))
    cls.bias = normal(3, 1, H, T, T)

  def attend(self, **arguments):
    """The reference as one program, and as a NumPy array."""
    static = {k: arguments.pop(k) for k in _STATIC if k in arguments}
    attend = jax.jit(functools.partial(reference_attend, **static))
    return np.array(attend(self.q, self.k, self.v, **arguments))

  def test_equals_jax_with_bias_window_and_causality(self):
    # Both are softmax(q k / sqrt d) v in float32.
    oracle = jax.nn.dot_product_attention
    for ours, theirs in (
      ({}, {}),
      ({"bias": self.bias}, {"bias": self.bias}),
      ({"window": 2}, {"local_window_size": 2}),
      ({"causal": True}, {"is_causal": True}),
    ):
      expected = jax.jit(lambda *x, theirs=theirs: oracle(*x, **theirs))
      np.testing.assert_allclose(
        self.attend(**ours), expected(self.q, self.k, self.v), atol=1e-5
      )

  def test_alibi_is_a_bias_by_distance(self):
    slopes = np.float32([0.5, 0.25, 0.125])
    distance = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))
    bias = -slopes[None, :, None, None] * distance.astype(np.float32)
    np.testing.assert_allclose(
      self.attend(alibi_slopes=slopes),
      self.attend(bias=bias),
      atol=1e-6,  # the same float32 sums
    )

  def test_the_last_query_stands_at_the_last_key_as_in_the_kernels(self):
    q, k, v = (
      normal(0, B, T, H, D),
      normal(1, B, 19, H, D),
      normal(2, B, 19, H, D),
    )
    for arguments in (
      {"causal": True},
      {"window": 3},
      {"alibi_slopes": jnp.float32([0.5, 0.25, 0.125])},
      {"relative_bias": normal(3, 1, H, T + 19 - 1)},
    ):
      found, want = (
        jax.jit(functools.partial(attend, **arguments))(q, k, v)
        for attend in (reference_attend, FlashAttend("blockwise", "bthd"))
      )
      # Other orders of the same float32 sums.
      np.testing.assert_allclose(found, want, atol=1e-5)

  def test_a_query_with_no_visible_key_returns_zero(self):
    ids = np.zeros((B, T), np.int32)
    ids[0, 0] = 1
    out = self.attend(segment_ids=ids)
    np.testing.assert_array_equal(out[:, 1:], 0.0)
    np.testing.assert_allclose(out[0, 0], np.array(self.v)[0, 0], atol=1e-6)

  def test_gradients_of_a_masked_row_are_finite(self):
    grads = jax.jit(
      jax.grad(
        lambda q, ids: reference_attend(
          q, self.k, self.v, segment_ids=ids
        ).sum()
      )
    )(self.q, np.zeros((B, T), np.int32))
    np.testing.assert_array_equal(grads, 0.0)

  def test_a_block_mask_shows_whole_tiles(self):
    tiles = np.array([[True, False], [True, True]])
    mask = jax.jit(lambda tiles: visible(T, T, block_mask=tiles)[0, 0])(tiles)
    np.testing.assert_array_equal(mask, np.kron(tiles, np.ones((4, 4), bool)))
    with self.assertRaisesRegex(ValueError, "does not tile"):
      visible(T, T, block_mask=jnp.ones((3, 3), bool))

  def test_dropout_without_key_is_refused(self):
    with self.assertRaisesRegex(ValueError, "needs dropout_seed"):
      reference_attend(self.q, self.k, self.v, dropout_rate=0.1)

  def test_dropout_keeps_the_mean(self):
    drop = jax.vmap(
      lambda key: reference_attend(
        self.q, self.k, self.v, dropout_rate=0.2, dropout_seed=key
      )
    )
    outs = np.array(
      jax.jit(lambda key: drop(jax.random.split(key, 4000)))(jax.random.key(0))
    )
    plain = self.attend()
    # One output has a deviation of at most about 1 over 4000 draws: 5 sigma.
    np.testing.assert_allclose(outs.mean(0), plain, atol=0.08)
    self.assertGreater(float(outs.std(0).min()), 0.0)


class KeptTest(absltest.TestCase):
  """What a loop over layers stacks has the shapes that products write."""

  def test_heads_lie_side_by_side_and_log_sums_fill_tiles(self):
    def layer(attend):
      return SelfAttention(num_heads=4, head_dim=6, attend=attend)

    kernel = layer(FlashAttend("blockwise", "bhdt", "counter"))
    dense = layer(reference_attend)
    x = normal(0, 2, 128, 5)
    params = jitted.init(kernel, jax.random.key(1), x, None, train=False)
    # Far from uniform weights.
    params = jax.jit(lambda params: jax.tree.map(lambda p: 30 * p, params))(
      params
    )

    def loss(layer, x):
      return (layer.apply(params, x, None, train=False) ** 2).sum()

    grads = [jax.grad(functools.partial(loss, m)) for m in (kernel, dense)]
    found = re.findall(
      r":f32\[([\d,]+)\] = name\[name=(\w+)", str(jax.make_jaxpr(grads[0])(x))
    )
    shapes = {name: shape for shape, name in found}
    self.assertEqual(shapes["attention_projections"], "2,24,128")
    self.assertEqual(shapes["flash_lse"], "1,8,128")
    # Sums over 128 positions in another order.
    found, wanted = (jax.jit(g)(x) for g in grads)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
  absltest.main()
