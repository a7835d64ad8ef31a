"""Every backend against float64, the reference's gradients and invariances."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.test_util import check_grads

from kernels.flash_attention import BACKENDS, flash_attention
from kernels.flash_attention.dropout import keep_mask, make_seed
from tests.draws import normal
from tests.kernels.flash_attention.cases import (
  CASES,
  DIFFERENTIABLE,
  qkv,
)
from tests.kernels.flash_attention.oracle import softmax_attention

# Scores of size 1-10 in float32 sums of at most 300 products.
ATOL = 2e-5
FUSED = tuple(
  name
  for name in BACKENDS
  if name != "reference"
  and importlib.util.find_spec(f"kernels.flash_attention.{name}")
)
ALL = ("reference", *FUSED)


def run(backend, *args, **kwargs):
  interpret = backend in ("gpu", "tpu")
  return flash_attention(*args, backend=backend, interpret=interpret, **kwargs)


def compiled(backend, **static):
  """`run` as one program."""
  return jax.jit(functools.partial(run, backend, **static))


@functools.cache
def solve(backend, name, **more):
  """(out, lse) and the gradients of a case's arrays, by name."""
  case = CASES[name]
  arguments = case.arguments | more
  diff = {key: arguments.pop(key) for key in DIFFERENTIABLE if key in arguments}
  if case.traced:
    traced = jax.device_put(arguments.pop("block_mask"))
  else:
    traced = None
  q, k, v, out_weights, lse_weights = qkv(case.sizes)

  def loss(diff, mask):
    arguments_ = arguments | ({} if mask is None else {"block_mask": mask})
    q, k, v = (diff[key] for key in "qkv")
    rest = {key: x for key, x in diff.items() if key not in "qkv"}
    out, lse = run(backend, q, k, v, return_lse=True, **rest, **arguments_)
    finite = jnp.where(lse == -jnp.inf, 0.0, lse * lse_weights)
    return (out * out_weights).sum() + finite.sum(), (out, lse)

  grad = jax.jit(jax.grad(loss, has_aux=True))
  grads, (out, lse) = grad({"q": q, "k": k, "v": v, **diff}, traced)
  return jax.device_get((out, lse, grads))


def pairs(backends):
  """Backends and the names of the cases that they do not refuse."""
  return [
    (backend, name)
    for backend in backends
    for name in CASES
    # The Triton kernels have no terms of relative positions.
    if backend != "gpu" or not name.startswith("relative")
  ]


def assert_close(found, want, atol=5e-5):
  """Equal up to `atol` times the largest finite value, or 1."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    largest = np.abs(b, where=np.isfinite(b), out=np.zeros(b.shape)).max()
    np.testing.assert_allclose(a, b, atol=atol * max(1.0, largest))


class CasesTest(parameterized.TestCase):
  @parameterized.parameters(*pairs(ALL))
  def test_output_and_lse_equal_float64(self, backend, name):
    case = CASES[name]
    out, lse, _ = solve(backend, name)
    want_out, want_lse = softmax_attention(*qkv(case.sizes)[:3], **case.oracle)
    np.testing.assert_allclose(out, want_out, atol=ATOL)
    np.testing.assert_allclose(lse, want_lse, atol=ATOL)

  @parameterized.parameters(*pairs(FUSED))
  def test_gradients_equal_those_of_the_reference(self, backend, name):
    found, want = solve(backend, name)[2], solve("reference", name)[2]
    self.assertEqual(set(found), set(want))
    # Sums over up to 2 * 2 * 129 rows; slopes weigh distances up to 200.
    assert_close(found, want)


class DropoutTest(parameterized.TestCase):
  @parameterized.product(backend=ALL)
  def test_values_of_the_identity_recover_the_mask(self, backend):
    b, t, h, rate = 2, 40, 3, 0.3
    q, k = normal(0, b, t, h, 16), normal(1, b, t, h, 16)
    eye = np.eye(t, dtype=np.float32)[None, :, None]
    eye = np.broadcast_to(eye, (b, t, h, t))
    seed = np.array([3, 4], np.uint32)
    probs = compiled(backend, dropout_rate=rate)(q, k, eye, dropout_seed=seed)
    probs = np.swapaxes(probs, 1, 2)
    kept = np.array(
      jax.jit(lambda seed: keep_mask(make_seed(seed), b, h, t, t, rate))(seed)
    )
    np.testing.assert_array_equal(probs != 0, kept)
    plain = np.swapaxes(compiled(backend)(q, k, eye), 1, 2)
    np.testing.assert_allclose(probs, kept * plain / (1 - rate), atol=1e-6)

  @parameterized.product(backend=FUSED, name=("segments", "blocks_per_head"))
  def test_values_and_gradients_equal_the_reference(self, backend, name):
    more = dict(dropout_rate=0.4, dropout_seed=11)
    found, want = solve(backend, name, **more), solve("reference", name, **more)
    assert_close(found, want)

  @parameterized.product(backend=FUSED)
  def test_rate_zero_is_no_dropout_bit_for_bit(self, backend):
    q, k, v = qkv((1, 40, 33, 2, 2, 16, 16))[:3]
    np.testing.assert_array_equal(
      compiled(backend, dropout_rate=0.0, dropout_seed=1)(q, k, v),
      compiled(backend)(q, k, v),
    )

  def test_the_mean_over_seeds_is_the_output_without(self):
    q, k, v = qkv((1, 9, 17, 2, 2, 8, 8))[:3]
    drop = functools.partial(run, "blockwise", q, k, v, dropout_rate=0.25)
    means = jax.jit(
      lambda seeds: jax.lax.map(
        lambda seed: drop(dropout_seed=seed), seeds, batch_size=256
      ).mean(0)
    )
    # One output deviates by at most about 0.8 a draw: 5 sigma of 4096.
    np.testing.assert_allclose(
      means(np.arange(4096, dtype=np.uint32)),
      compiled("blockwise")(q, k, v),
      atol=0.06,
    )


def squared(attend):
  """Sum of the squares of an attention, and its gradients."""
  x = qkv((2, 40, 33, 4, 2, 16, 24))[:3]
  loss = jax.value_and_grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1))
  return jax.device_get(jax.jit(loss)(*x))


TILES = {
  "blockwise": ((129, 16), (24, 200), (8, 40)),
  "gpu": ((16, 64), (64, 16)),
}


class InvarianceTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (f"{backend}_{tiles[0]}_{tiles[1]}", backend, tiles)
    for backend in TILES
    for tiles in TILES[backend]
  )
  def test_tile_sizes_change_nothing(self, backend, tiles):
    more = dict(dropout_rate=0.2, dropout_seed=5)
    found = solve(backend, "everything", tiles=tiles, **more)
    assert_close(found, solve("reference", "everything", **more))

  @parameterized.parameters((24, 16), (127, 40))
  def test_tile_sizes_change_no_relative_position(self, *tiles):
    more = dict(dropout_rate=0.2, dropout_seed=5)
    name = "relative_causal_capped"
    found = solve("blockwise", name, tiles=tiles, **more)
    assert_close(found, solve("reference", name, **more))

  def test_a_relative_bias_is_a_bias_of_equal_diagonals(self):
    q, k, v = qkv((2, 40, 33, 2, 2, 16, 16))[:3]
    entries = normal(6, 1, 2, 72)
    diagonal = np.arange(33)[None] - np.arange(40)[:, None] + 39

    def with_bias(entries):
      return run("reference", q, k, v, bias=entries[..., diagonal])

    def relative(entries):
      return run("reference", q, k, v, relative_bias=entries)

    def solved(f):
      return jax.jit(jax.value_and_grad(lambda x: jnp.sin(f(x)).sum()))(entries)

    found, want = solved(relative), solved(with_bias)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], want[1], atol=1e-5)

  @parameterized.product(backend=ALL, layout=("bhtd", "bhdt"))
  def test_layouts_are_transpositions(self, backend, layout):
    order = ["bthd".index(c) for c in layout]
    back = [layout.index(c) for c in "bthd"]

    def other(*x):
      y = [a.transpose(order) for a in x]
      return run(backend, *y, layout=layout).transpose(back)

    found, want = squared(other), self.in_plain_layout()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

  @staticmethod
  @functools.cache
  def in_plain_layout():
    return squared(functools.partial(run, "reference"))

  @parameterized.named_parameters(
    ("blockwise", "blockwise", dict(tiles=(24, 40))),
    ("gpu", "gpu", {}),
    ("tpu", "tpu", {}),
  )
  def test_large_scores_do_not_reach_what_pads(self, backend, options):
    # exp(200) is infinite; the same bias everywhere changes no weight.
    found = self.biased(backend, 200.0, **options)
    want = self.biased("reference", 0.0)
    for a, b in zip(found, want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-3)  # float32 about 200

  @staticmethod
  @functools.cache
  def biased(backend, bias, **options):
    """Gradients under one bias of all scores."""
    bias = np.full((1, 1, 1, 40), bias, np.float32)

    def loss(*x):
      return (run(backend, *x, bias=bias, **options) ** 2).sum()

    x = qkv((1, 37, 40, 2, 2, 16, 16))[:3]
    return jax.device_get(jax.jit(jax.grad(loss, (0, 1, 2)))(*x))

  @parameterized.product(backend=ALL)
  def test_packed_sequences_equal_separate_ones(self, backend):
    x = [np.array(x) for x in qkv((1, 100, 100, 2, 2, 16, 16))[:3]]
    ids = np.repeat(np.array([1, 2, 0]), np.array([43, 43, 14]))[None]
    packed = np.array(compiled(backend)(*x, segment_ids=ids))
    for part in (slice(0, 43), slice(43, 86)):
      alone = self.plain(*(a[:, part] for a in x))
      np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
    np.testing.assert_array_equal(packed[:, 86:], 0.0)

  plain = staticmethod(compiled("reference"))
  plain_with_lse = staticmethod(compiled("reference", return_lse=True))

  @parameterized.product(backend=FUSED)
  def test_a_constant_per_row_changes_only_lse(self, backend):
    q, k, v = qkv((1, 40, 33, 2, 2, 16, 16))[:3]
    shift = np.broadcast_to(normal(5, 1, 2, 40, 1), (1, 2, 40, 33))
    attend = compiled(backend, return_lse=True)
    out, lse = map(np.array, self.plain_with_lse(q, k, v))
    moved, moved_lse = attend(q, k, v, bias=shift)
    np.testing.assert_allclose(moved, out, atol=1e-5)
    np.testing.assert_allclose(moved_lse, lse + shift[..., 0], atol=1e-5)

  @parameterized.product(backend=FUSED)
  def test_the_order_of_keys_does_not_matter(self, backend):
    q, k, v = map(np.array, qkv((1, 40, 129, 2, 2, 16, 16))[:3])
    order = np.random.default_rng(0).permutation(129)
    bias, ids = np.array(normal(6, 1, 1, 40, 129)), np.arange(129)[None] % 3
    ones, attend = np.ones((1, 40), int), compiled(backend)
    want = attend(q, k, v, bias=bias, segment_ids=(ones, ids))
    found = attend(
      q,
      k[:, order],
      v[:, order],
      bias=bias[..., order],
      segment_ids=(ones, ids[:, order]),
    )
    np.testing.assert_allclose(found, want, atol=1e-5)

  def test_finite_differences_of_the_reference(self):
    q, k, v = qkv((1, 5, 7, 2, 1, 4, 3))[:3]
    bias, slopes = normal(6, 1, 2, 1, 7), np.float32([0.1, 0.3])
    ids = np.array([[1, 1, 0, 2, 3]]), np.array([[1, 1, 1, 2, 2, 0, 1]])

    @jax.jit
    def f(q, k, v, bias, slopes):
      out, lse = run(
        "reference",
        q,
        k,
        v,
        bias=bias,
        alibi_slopes=slopes,
        segment_ids=ids,
        logit_softcap=4.0,
        return_lse=True,
      )
      return out, jnp.where(lse == -jnp.inf, 0.0, lse)

    # float32 differences: 1e-7 of values near 1 over steps of 1e-2.
    check_grads(
      f, (q, k, v, bias, slopes), 1, modes="rev", atol=2e-3, rtol=2e-3, eps=1e-2
    )


class PrecisionTest(parameterized.TestCase):
  @parameterized.product(backend=FUSED, dtype=(jnp.bfloat16, jnp.float16))
  def test_no_worse_than_the_plain_form(self, backend, dtype):
    # FlashAttention's own criterion: twice the error of dense attention in
    # the same dtype, three times for gradients.
    found = self.solved(functools.partial(run, backend), dtype)
    self.assertEqual(found[0].dtype, dtype)
    want = self.plainly(jnp.float32)
    for i, (a, n, w) in enumerate(zip(found, self.plainly(dtype), want)):
      a, n = a.astype(np.float32), n.astype(np.float32)
      allowed = (3 if i else 2) * np.abs(n - w).max()
      self.assertLess(np.abs(a - w).max(), allowed)

  @staticmethod
  def solved(attend, dtype):
    """An attention and its gradients."""

    def loss(*x):
      out = attend(*x)
      return (out.astype(jnp.float32) ** 2).sum(), out

    x = qkv((1, 129, 200, 2, 2, 32, 32), dtype)[:3]
    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*x)
    return jax.device_get((out, *grads))

  @classmethod
  @functools.cache
  def plainly(cls, dtype):
    def plain(q, k, v):
      logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
      probs = jax.nn.softmax(logits, axis=-1)
      return jnp.einsum("bhts,bshd->bthd", probs, v)

    return cls.solved(plain, dtype)


if __name__ == "__main__":
  absltest.main()
