"""The public function: what it refuses, where it runs, what it occupies."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from kernels.flash_attention import Sharding, Unsupported, flash_attention
from tests import optimized
from tests.draws import normal
from tests.kernels.flash_attention.cases import qkv

B, T, S, H, D = 2, 6, 8, 4, 16
Q, K, V = qkv((B, T, S, H, 2, D, D))[:3]
LONG = jnp.ones((1, 4096, 1, 64))
WIDE = normal(0, 1, 4, 1, 300)


class RefusalTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("layout", dict(layout="bhd"), "layout='bhd'.*bthd, bhtd, bhdt"),
    ("backend", dict(backend="cuda"), "backend='cuda'.*reference, dense"),
    ("rank", dict(q=Q[0]), r"q has shape \(6, 4, 16\).*bthd"),
    ("dtype", dict(q=Q.astype(int)), "q has dtype int32"),
    ("width", dict(q=Q[..., :3]), "k of shape.*head width must be equal"),
    ("values", dict(v=V[:, :5]), "v of shape.*all but the head width"),
    ("heads", dict(q=Q[:, :, :3]), "2 heads, which do not divide q's 3"),
    ("bias", dict(bias=Q), r"bias has shape.*\[1\|2, 1\|4, 1\|6, 8\]"),
    (
      "bias_dtype",
      dict(bias=jnp.ones((1, 1, T, S), bool)),
      r"bias has dtype bool, .*jnp.where\(mask, 0.0, -jnp.inf\)",
    ),
    ("slopes", dict(alibi_slopes=Q[0, 0]), r"alibi_slopes.*\[4\] or \[2, 4\]"),
    (
      "relative_bias",
      dict(relative_bias=jnp.ones((1, H, T))),
      r"relative_bias has shape \(1, 4, 6\).*\[1\|2, 1\|4, 13\].*6 queries",
    ),
    (
      "relative_keys",
      dict(relative_keys=jnp.ones((H, T + S - 1, D))),
      r"relative_keys has shape.*\[1\|2, 13, 16\]",
    ),
    (
      "relative_queries",
      dict(relative_queries=jnp.ones((1, T + S - 1, D), int)),
      "relative_queries has dtype int32",
    ),
    ("ids", dict(segment_ids=jnp.ones((B, T))), r"\(q, kv\) pair"),
    (
      "padding_twice",
      dict(segment_ids=jnp.ones((B, T)), kv_lengths=jnp.ones(B)),
      "segment_ids and kv_lengths.*give one",
    ),
    (
      "lengths",
      dict(kv_lengths=jnp.ones(3)),
      r"kv_lengths has .*\(3,\).*\[2\]",
    ),
    ("one_length", dict(kv_lengths=3), r"kv_lengths has shape \(\)"),
    ("rate", dict(dropout_rate=1.0), r"dropout_rate=1.0 must lie in \[0, 1\)"),
    ("seed", dict(dropout_rate=0.1), "needs dropout_seed"),
    (
      "generator",
      dict(dropout_generator="philox"),
      "dropout_generator='philox'.*counter, hardware, auto",
    ),
    ("window", dict(window=(1, -1)), r"window=\(1, -1\).*at least 0"),
    ("window_type", dict(window=1.0), "window=1.0 must be .left, right., int"),
    (
      "mesh",
      dict(sharding=Sharding(("data",)), backend="blockwise"),
      r"mesh axes \('data',\); .*has no data, .*jax.set_mesh",
    ),
    ("cap", dict(logit_softcap=0.0), "logit_softcap=0.0 must be positive"),
    ("mask", dict(block_mask=np.ones((4, 4), bool)), "does not tile.*(6, 8)"),
    (
      "mask_dtype",
      dict(block_mask=np.ones((3, 4))),
      "block_mask is float64.*must be bool",
    ),
    (
      "mask_size",
      dict(block_mask=np.ones((3, 4), bool), block_size=(4, 2)),
      r"\(3, 4\) blocks.*make \(2, 4\)",
    ),
    ("size_alone", dict(block_size=(2, 2)), "without a block_mask"),
  )
  def test_bad_arguments_are_named(self, changes, message):
    arguments = dict(q=Q, k=K, v=V) | changes
    with self.assertRaisesRegex(ValueError, message):
      flash_attention(**arguments)

  def test_a_traced_scale_is_refused(self):
    attend = jax.jit(lambda scale: flash_attention(Q, K, V, sm_scale=scale))
    with self.assertRaisesRegex(ValueError, "sm_scale is traced.*multiply q"):
      attend(0.3)

  @parameterized.named_parameters(
    (
      "blockwise_hardware",
      "blockwise",
      dict(dropout_rate=0.1, dropout_seed=0, dropout_generator="hardware"),
      "'hardware' is not one of.*: counter",
    ),
    ("blockwise_tiles", "blockwise", dict(tiles=(8,)), r"\(rows, columns\)"),
    ("reference_tiles", "reference", dict(tiles=(8, 8)), "has none; leave"),
    ("dense_tiles", "dense", dict(tiles=(8, 8)), "has none; leave"),
    (
      "gpu_hardware",
      "gpu",
      dict(dropout_rate=0.1, dropout_seed=0, dropout_generator="hardware"),
      "'hardware' is not one of.*: counter",
    ),
    (
      "gpu_relative",
      "gpu",
      dict(
        relative_bias=jnp.ones((1, 1, T + S - 1)),
        relative_keys=jnp.ones((1, T + S - 1, D)),
      ),
      "relative_bias, relative_keys: gpu takes none",
    ),
    (
      "tpu_relative",
      "tpu",
      dict(q=LONG, k=LONG, v=LONG, relative_keys=jnp.ones((1, 8191, 64))),
      "relative_keys: the entries .* 4193792 bytes of VMEM; tpu has 3145728",
    ),
    ("gpu_tiles", "gpu", dict(tiles=(24, 16)), "powers of two from 16"),
    ("gpu_width", "gpu", dict(q=WIDE, k=WIDE, v=WIDE), "300.*exceed.*256"),
    (
      "tpu_lone_block",
      "tpu",
      dict(block_mask=np.ones((1, 1), bool)),
      r"blocks of \(6, 8\).*multiples of 128",
    ),
    (
      "gpu_blocks",
      "gpu",
      dict(block_mask=np.ones((3, 4), bool)),
      r"blocks of \(2, 2\).*multiples of 16",
    ),
  )
  def test_what_a_backend_cannot_do_is_named(self, backend, changes, message):
    arguments = dict(q=Q, k=K, v=V, backend=backend) | changes
    with self.assertRaisesRegex(Unsupported, message):
      flash_attention(**arguments)


class DispatchTest(parameterized.TestCase):
  def lower(self, platform, **options):
    def loss(q, k, v):
      return flash_attention(q, k, v, **options).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    return grad.trace(Q, K, V).lower(lowering_platforms=(platform,)).as_text()

  def test_cuda_gets_triton_and_cpu_gets_none_of_it(self):
    kernels = re.findall(
      "flash_attention_(?:forward|dq|dkv)", self.lower("cuda")
    )
    self.assertEqual(
      set(kernels),
      {f"flash_attention_{k}" for k in ("forward", "dq", "dkv")},
    )
    self.assertNotIn("flash_attention_", self.lower("cpu"))

  def test_what_the_kernels_refuse_runs_blockwise(self):
    mask = np.ones((3, 4), bool)  # blocks of 2, too small for a tensor core
    self.assertNotIn("flash_attention_", self.lower("cuda", block_mask=mask))
    entries = dict(relative_bias=jnp.ones((1, 1, T + S - 1)))
    self.assertNotIn("flash_attention_", self.lower("cuda", **entries))
    self.assertIn("flash_attention_tpu", self.lower("tpu", **entries))

  def test_a_lone_block_needs_no_tiles_but_on_a_tpu(self):
    mask = np.ones((1, 1), bool)
    self.assertIn("flash_attention_", self.lower("cuda", block_mask=mask))
    self.assertNotIn("flash_attention_", self.lower("tpu", block_mask=mask))

  @parameterized.parameters((0, T, S), (B, 0, S), (B, T, 0))
  def test_of_nothing_there_is_nothing_to_see(self, *sizes):
    q, k, v = qkv((*sizes, H, 2, D, 24))[:3]

    def attend(q):
      return flash_attention(q, k, v, return_lse=True)

    (out, lse), pullback = jax.vjp(attend, q)
    self.assertEqual(out.shape, (*q.shape[:3], 24))
    np.testing.assert_array_equal(out, 0.0)
    np.testing.assert_array_equal(lse, -np.inf)
    (grad,) = pullback((out, lse))
    np.testing.assert_array_equal(grad, np.zeros_like(q))

  @parameterized.parameters(
    dict(),
    dict(causal=True, dropout_rate=0.2, dropout_seed=1),
    dict(backend="blockwise", tiles=(3, 4)),
  )
  def test_programs_of_64_bits_say_the_same(self, **options):
    def solved():
      loss = lambda q: flash_attention(q, K, V, **options).sum()  # noqa: E731
      return jax.jit(jax.value_and_grad(loss))(Q)

    want = solved()
    with jax.enable_x64(True):
      found = solved()
    for a, b in zip(found, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

  def test_a_window_may_be_an_integer_of_numpy(self):
    found, want = (
      flash_attention(Q, K, V, window=window) for window in (np.int32(2), 2)
    )
    np.testing.assert_array_equal(found, want)

  def test_auto_dropout_is_the_counter_where_there_is_no_other(self):
    drop = dict(dropout_rate=0.3, dropout_seed=1)
    auto, counter = (
      jax.jit(
        functools.partial(flash_attention, dropout_generator=name, **drop)
      )(Q, K, V)
      for name in ("auto", "counter")
    )
    np.testing.assert_array_equal(auto, counter)


class TransformationTest(absltest.TestCase):
  def test_vmap_equals_a_loop(self):
    q, k, v = (np.stack([x, x[::-1] + 1]) for x in map(np.array, (Q, K, V)))
    mask = np.random.default_rng(0).random((2, 3, 4)) < 0.6

    def f(q, k, v, mask):
      return flash_attention(q, k, v, block_mask=mask, causal=True)

    def grads(*x):
      return jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))(*x)

    found, alone = jax.jit(jax.vmap(f))(q, k, v, mask), jax.jit(f)
    for i in range(2):
      np.testing.assert_allclose(
        found[i], alone(q[i], k[i], v[i], mask[i]), atol=1e-6
      )
    batched = jax.jit(jax.vmap(grads, (0, 0, 0, None)))(q, k, v, mask[0])
    alone = jax.jit(grads)
    for i in range(2):
      for a, b in zip(batched, alone(q[i], k[i], v[i], mask[0])):
        np.testing.assert_allclose(a[i], b, atol=1e-5)

  def test_scan_over_layers_equals_a_loop(self):
    slopes = np.arange(3 * H, dtype=np.float32).reshape(3, H) / 10

    def layer(x, slope):
      return flash_attention(x, x, x, alibi_slopes=slope), None

    def scanned(slopes):
      return jax.lax.scan(layer, Q, slopes)[0].sum()

    def looped(slopes):
      x = Q
      for slope in slopes:
        x = layer(x, slope)[0]
      return x.sum()

    found, want = (
      jax.jit(jax.value_and_grad(f))(slopes) for f in (scanned, looped)
    )
    for a, b in zip(found, want):
      np.testing.assert_allclose(a, b, atol=1e-4)


class MemoryTest(parameterized.TestCase):
  def temporaries(self, length, **options):
    x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)

    shapes, entries = {}, 2 * length - 1
    if options.pop("relative", False):
      shapes["relative_bias"] = 1, 2, entries
      shapes["relative_keys"] = shapes["relative_queries"] = 1, entries, 64
    diff = {
      name: jax.ShapeDtypeStruct(shape, jnp.float32)
      for name, shape in shapes.items()
    }

    def loss(diff):
      return flash_attention(**diff, **options).sum()

    lowered = jax.jit(jax.grad(loss)).lower(dict(q=x, k=x, v=x, **diff))
    compiled = optimized.compiled(lowered)
    self.assertNotRegex(compiled.as_text(), rf"\[[\d,]*{length},{length}\]")
    return compiled.memory_analysis().temp_size_in_bytes

  @parameterized.named_parameters(
    ("plain", {}),
    ("causal_dropout", dict(causal=True, dropout_rate=0.1, dropout_seed=0)),
    ("relative", dict(relative=True)),
  )
  def test_memory_is_linear_in_the_length(self, options):
    short, long = (self.temporaries(n, **options) for n in (4096, 8192))
    array = 8192 * 2 * 64 * 4
    # Twelve arrays of the size of q, and a few tiles of 4 MB.
    self.assertLess(long, 12 * array + 8 * 2**22)
    self.assertLess(long - short, 6 * array)
    # The scores alone would be 2 * 8192^2 * 4 bytes.
    self.assertLess(long, 2 * 8192**2 * 4 / 4)


class DenseTest(absltest.TestCase):
  def test_it_is_the_faster_form_of_what_is_asked(self):
    q, k, v = (normal(i, 2, 33, 2, 8) for i in range(3))

    def solve(backend, *, differentiated):
      def attend(*x):
        return flash_attention(*x, backend=backend)

      def kept(*x):
        return jax.vjp(attend, *x)[0]

      return np.asarray(jax.jit(kept if differentiated else attend)(q, k, v))

    alone = solve("dense", differentiated=False)
    kept = solve("dense", differentiated=True)
    # Of other rounding than each other, so that the bits tell which it was.
    self.assertFalse((alone == kept).all())
    want = solve("blockwise", differentiated=False)
    np.testing.assert_array_equal(alone, want)
    want = solve("reference", differentiated=True)
    np.testing.assert_array_equal(kept, want)


if __name__ == "__main__":
  absltest.main()
