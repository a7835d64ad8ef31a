"""What other people's attention computes, ours does too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import absltest, parameterized
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from kernels.flash_attention import flash_attention
from tests.draws import normal

B, H, KV, D = 2, 4, 2, 16


def qkv(t, s):
  return normal(0, B, t, H, D), normal(1, B, s, KV, D), normal(2, B, s, KV, D)


class PeersTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("bias", dict(bias=normal(3, 1, H, 33, 40))),
    ("causal", dict(causal=True)),
    ("window", dict(window=(7, 2))),
    ("lengths", dict(kv_lengths=jnp.array([40, 13]))),
  )
  def test_equals_jax(self, options):
    t = 33 if "bias" in options or "kv_lengths" in options else 40
    x = qkv(t, 40)
    names = {
      "bias": "bias",
      "causal": "is_causal",
      "window": "local_window_size",
      "kv_lengths": "key_value_seq_lengths",
    }
    theirs = {names[name]: value for name, value in options.items()}
    want = jax.nn.dot_product_attention(*x, implementation="xla", **theirs)
    found = flash_attention(*x, backend="blockwise", **options)
    np.testing.assert_allclose(found, want, atol=1e-5)

  @parameterized.parameters("none", "causal", "window")
  def test_equals_splash(self, kind):
    t = 128
    masks = {
      "none": splash.FullMask((t, t)),
      "causal": splash.CausalMask((t, t)),
      "window": splash.LocalMask((t, t), (20, 9), offset=0),
    }
    ours = {
      "none": {},
      "causal": {"causal": True},
      "window": {"window": (20, 9)},
    }
    q, k, v = qkv(t, t)
    # Every segment has real keys: where nothing is seen, splash is not zero.
    ids = jnp.repeat(jnp.array([[1, 2], [1, 1]]), 64, axis=1)
    kernel = splash.make_splash_mha(
      mask=splash.MultiHeadMask([masks[kind]] * H),
      head_shards=1,
      q_seq_shards=1,
      interpret=True,
    )
    head_first = [x.swapaxes(1, 2) for x in (q * D**-0.5, k, v)]
    # It groups heads as ours does: neighbours share keys.
    head_first[1:] = [jnp.repeat(x, H // KV, 1) for x in head_first[1:]]
    pairs = splash.SegmentIds(ids, ids)
    want = jax.vmap(kernel)(*head_first, pairs).swapaxes(1, 2)
    found = flash_attention(
      q, k, v, segment_ids=ids, backend="blockwise", **ours[kind]
    )
    np.testing.assert_allclose(found, want, atol=1e-5)

  def test_equals_torch_with_gradients(self):
    t, s = 33, 40
    x, bias = qkv(t, s), normal(3, B, 1, t, s)
    weights = normal(4, B, t, H, D)

    def loss(q, k, v, bias):
      out = flash_attention(q, k, v, bias=bias, backend="blockwise")
      return (out * weights).sum(), out

    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
    grads, out = grad(*x, bias)
    theirs = [torch.tensor(np.array(y), requires_grad=True) for y in (*x, bias)]
    q, k, v = (y.transpose(1, 2) for y in theirs[:3])
    want = torch.nn.functional.scaled_dot_product_attention(
      q, k, v, attn_mask=theirs[3], enable_gqa=True
    ).transpose(1, 2)
    (want * torch.tensor(np.array(weights))).sum().backward()
    np.testing.assert_allclose(out, want.detach().numpy(), atol=1e-5)
    for a, b in zip(grads, theirs, strict=True):
      np.testing.assert_allclose(a, b.grad.numpy(), atol=5e-5)


class PatternsTest(parameterized.TestCase):
  @parameterized.parameters("blockwise", "gpu", "tpu")
  def test_a_mask_of_ones_is_no_mask(self, backend):
    x = qkv(256, 256)
    run = functools.partial(
      flash_attention,
      *x,
      backend=backend,
      interpret=backend != "blockwise",
      return_lse=True,
    )
    found = run(block_mask=np.ones((2, 2), bool))
    for a, b in zip(found, run(), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
