"""Buckets, T5's bias and DeBERTa's terms against the published models' code."""

import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import absltest, parameterized
from transformers import DebertaV2Config, T5Config
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta
from transformers.models.t5.modeling_t5 import T5Attention

from bertjax.layers import relative
from bertjax.layers.attention import ATTENTION
from kernels.flash_attention import flash_attention
from tests.draws import normal

FAR = np.arange(-3000, 3001)


class BucketsTest(parameterized.TestCase):
  @parameterized.product(
    bidirectional=(True, False), sizes=((32, 128), (32, 64), (8, 20), (64, 500))
  )
  def test_t5_buckets_are_those_of_its_code(self, bidirectional, sizes):
    num_buckets, max_distance = sizes
    want = T5Attention._relative_position_bucket(
      torch.tensor(FAR), bidirectional, num_buckets, max_distance
    )
    found = relative.t5_bucket(
      FAR,
      num_buckets=num_buckets,
      max_distance=max_distance,
      bidirectional=bidirectional,
    )
    np.testing.assert_array_equal(found, want)

  def test_deberta_buckets_are_those_of_its_code(self):
    far = FAR[np.abs(FAR) < 512]
    want = deberta.make_log_bucket_position(torch.tensor(far), 256, 512)
    found = relative.deberta_bucket(far)
    np.testing.assert_array_equal(found, want)
    distances = np.array([128, 140, 200, 256, 300, 400, 511])
    np.testing.assert_array_equal(
      relative.deberta_bucket(-distances),
      [-128, -137, -169, -192, -207, -233, -255],
    )

  @parameterized.named_parameters(
    ("few", relative.t5_bucket, dict(num_buckets=3), "num_buckets=3 must be"),
    ("odd", relative.t5_bucket, dict(num_buckets=7), "num_buckets=7 must be"),
    ("near", relative.t5_bucket, dict(max_distance=8), "=8 must exceed 8"),
    (
      "deberta",
      relative.deberta_bucket,
      dict(num_buckets=64, max_distance=33),
      "max_distance=33 exceed 33",
    ),
  )
  def test_bad_sizes_are_named(self, bucket, sizes, message):
    with self.assertRaisesRegex(ValueError, message):
      bucket(FAR, **sizes)


class RelativeBiasTest(parameterized.TestCase):
  @parameterized.product(decoder=(True, False))
  def test_equals_t5(self, decoder):
    t, h = 150, 3
    config = T5Config(d_model=12, d_kv=4, num_heads=h, is_decoder=decoder)
    theirs = T5Attention(
      config, has_relative_attention_bias=True, layer_idx=0
    ).relative_attention_bias.weight
    layer = relative.RelativeBias(num_heads=h, bidirectional=not decoder)
    params = {"embedding": jnp.asarray(theirs.detach().numpy())}
    bias = layer.apply({"params": params}, t, t)
    buckets = T5Attention._relative_position_bucket(
      torch.arange(t)[None] - torch.arange(t)[:, None], not decoder
    )
    want = theirs[buckets].permute(2, 0, 1).detach().numpy()
    diagonal = np.arange(t)[None] - np.arange(t)[:, None] + t - 1
    np.testing.assert_array_equal(bias[0, :, diagonal], want.transpose(1, 2, 0))

  @parameterized.product(attend=tuple(ATTENTION))
  def test_every_implementation_adds_terms_like_a_bias(self, attend):
    q, k, v = (normal(seed, 2, 9, 3, 8) for seed in range(3))
    terms = {
      "relative_bias": normal(3, 1, 3, 17),
      "relative_keys": normal(4, 3, 17, 8),
      "relative_queries": normal(5, 1, 17, 8),
    }
    diagonal = jnp.arange(9)[None] - jnp.arange(9)[:, None] + 8
    bias, keys, queries = terms.values()
    bias = bias[..., diagonal]
    bias += jnp.einsum("bihd,hijd->bhij", q, keys[:, diagonal]) * 8**-0.5
    bias += jnp.einsum("bjhd,ijd->bhij", k, queries[0, diagonal]) * 8**-0.5
    run = ATTENTION[attend]
    np.testing.assert_allclose(
      run(q, k, v, **terms),
      run(q, k, v, bias=bias),
      atol=1e-6,  # the same float32 sums
    )


class DebertaTest(parameterized.TestCase):
  @parameterized.product(
    backend=("reference", "blockwise"),
    terms=(("c2p",), ("p2c",), ("c2p", "p2c")),
  )
  def test_attention_equals_deberta(self, backend, terms):
    b, t, h, d = 2, 40, 3, 8
    span, longest = 8, 30  # so that buckets grow and the last one clips
    torch.manual_seed(0)
    config = DebertaV2Config(
      hidden_size=h * d,
      num_attention_heads=h,
      pos_att_type=list(terms),
      relative_attention=True,
      position_buckets=span,
      max_relative_positions=longest,
      share_att_key=True,
      attention_probs_dropout_prob=0.0,
      hidden_dropout_prob=0.0,
    )
    layer = deberta.DisentangledSelfAttention(config).eval()
    x, table = torch.randn(b, t, h * d), torch.randn(2 * span, h * d)
    real = torch.arange(t)[None] < torch.tensor([t, 25])[:, None]
    with torch.no_grad():
      want, _ = layer(
        x, real[:, None, None] & real[:, None, :, None], rel_embeddings=table
      )

    def projected(name, x):
      y = getattr(layer, f"{name}_proj")(x).detach().numpy()
      return jnp.asarray(y).reshape(*y.shape[:-1], h, d)

    rows = relative.deberta_rows(t, t, num_buckets=span, max_distance=longest)
    entries = {
      {"key": "relative_keys", "query": "relative_queries"}[name]: projected(
        name, table
      )[rows].swapaxes(0, 1)
      for term, name in (("c2p", "key"), ("p2c", "query"))
      if term in terms
    }
    found = flash_attention(
      *(projected(name, x) for name in ("query", "key", "value")),
      segment_ids=jnp.asarray(real.numpy(), jnp.int32),
      sm_scale=((1 + len(terms)) * d) ** -0.5,
      backend=backend,
      **entries,
    )
    # DeBERTa's padded queries see all keys alike; ours return 0.
    where = real.numpy()
    np.testing.assert_allclose(
      found.reshape(b, t, h * d)[where],
      want.numpy()[where],
      atol=1e-5,  # float32 sums of 8 and 40 terms
    )


if __name__ == "__main__":
  absltest.main()
