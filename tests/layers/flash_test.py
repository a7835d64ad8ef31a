"""BERT with kernels for attention: the same losses, no layout left behind."""

import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from bertjax.layers import flash
from bertjax.layers.attention import ATTENTION, Attend, SelfAttention
from bertjax.layers.flash import FlashAttend, mesh_sharding
from bertjax.models import bert, left_to_right_bert
from bertjax.objectives import masked_lm
from bertjax.parallel.mesh import make_mesh
from kernels.flash_attention.backend import RESIDUALS
from tests import jitted

V, E, H, F, L, T = 53, 24, 3, 40, 2, 40
REFERENCE = FlashAttend("reference", "bthd")
KERNELS = {
  "gpu": FlashAttend("gpu", "bhtd", interpret=True),
  "blockwise": FlashAttend("blockwise", "bthd", "counter"),
  "tpu": FlashAttend("tpu", "bhdt", "counter", interpret=True),
}


def objective(attend, **options):
  dims = dict(vocab_size=V, emb_dim=E, num_heads=H, mlp_dim=F, num_layers=L)
  encoder = bert(**dims, max_positions=T, attend=attend, **options)
  return masked_lm(encoder=encoder)


def batch_of(segment_ids):
  segment_ids = np.asarray(segment_ids, np.int32)
  rows, length = segment_ids.shape
  rng = np.random.default_rng(0)
  batch = {
    "tokens": rng.integers(5, V, (rows, length), np.int32),
    "segment_ids": segment_ids,
    "type_ids": np.zeros((rows, length), np.int32),
    "masked_positions": np.array([[1, 5], [2, 8]], np.int32)[:rows],
    "labels": np.array([[7, 9], [50, -1]], np.int32)[:rows],
  }
  return jax.device_put(batch)


def gradient_of(attend, remat, **options):
  """The jaxpr of the gradient of a loss, as text."""
  batch = batch_of(PACKED)
  model = objective(attend, remat=remat, scan=False, **options)

  def loss(p):
    return model.apply({"params": p}, batch, train=False)[0]["mlm"]

  shapes = jax.eval_shape(
    lambda k: nn.meta.unbox(model.init(k, batch, train=False)["params"]),
    jax.random.key(0),
  )
  return str(jax.make_jaxpr(jax.grad(loss))(shapes))


@functools.cache
def params(**options):
  model, batch = objective("reference", **options), batch_of(np.ones((2, T)))

  @jax.jit
  def init(key):
    found = nn.meta.unbox(model.init(key, batch, train=False)["params"])
    # Larger weights than at the start, so that attention is felt.
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, found)

  return init(jax.random.key(0))


def solve(attend, batch, *, train, **options):
  """Loss and gradients."""
  model = objective(attend, **options)

  def loss(p):
    rngs = {"dropout": jax.random.key(3)} if train else {}
    return model.apply({"params": p}, batch, train=train, rngs=rngs)[0]["mlm"]

  return jax.jit(jax.value_and_grad(loss))(params())


@functools.cache
def train(attend, steps=4, **options):
  """The first gradients, and the losses of a few steps of Adam."""
  rates = dict(dropout_rate=0.1, attention_dropout_rate=0.3)
  model = objective(attend, **rates, **options)
  batch, optimizer = batch_of(PACKED), optax.adam(3e-3)

  @jax.jit
  def step(p, state, key):
    def loss(p):
      rngs = {"dropout": key}
      return model.apply({"params": p}, batch, train=True, rngs=rngs)[0]["mlm"]

    value, grads = jax.value_and_grad(loss)(p)
    updates, state = optimizer.update(grads, state, p)
    return optax.apply_updates(p, updates), state, value, grads

  p, losses, first = params(**options), [], None
  state = jax.jit(optimizer.init)(p)
  for _ in range(steps):
    # One key for all steps: what falls is the loss, not the luck.
    p, state, value, grads = step(p, state, jax.random.key(3))
    first = grads if first is None else first
    losses.append(float(value))
  return first, losses


PADDED = np.arange(T) < np.array([[31], [T]])
PACKED = np.stack([np.repeat([1, 2, 0], [17, 20, 3]), np.repeat([1, 2], 20)])


def assert_close(found, want, atol=2e-5):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    scale = max(1.0, np.abs(b).max())
    np.testing.assert_allclose(a, b, atol=atol * scale)


class BertTest(parameterized.TestCase):
  def test_every_row_of_the_table_keeps_the_contract(self):
    for attend in ATTENTION.values():
      self.assertIsInstance(attend, Attend)
    with self.assertRaisesRegex(ValueError, "model.attend='flush'.*'flash'"):
      objective("flush")

  @parameterized.product(kernel=tuple(KERNELS))
  def test_trains_to_the_losses_of_the_reference(self, kernel):
    # Padded and packed, with dropout: the counter draws the same masks.
    found_grads, found = train(KERNELS[kernel])
    grads, losses = train(REFERENCE)
    assert_close(found_grads, grads)
    # Adam's steps divide rounding errors by the gradients' own size.
    np.testing.assert_allclose(found, losses, rtol=1e-3)
    self.assertLess(losses[-1], losses[0])

  # Kernels and encoders by themselves: `kernels/flash_attention`,
  # `models/encoder_test.py`.
  @pytest.mark.slow
  def test_relative_positions_train_alike(self):
    self._assert_relative_alike("tpu", "relative")

  @pytest.mark.slow
  def test_both_kinds_of_positions_train_alike(self):
    self._assert_relative_alike("blockwise", "both")

  def _assert_relative_alike(self, kernel, positions):
    more = dict(positions=positions, relative_buckets=8, relative_distance=20)
    found_grads, found = train(KERNELS[kernel], **more)
    grads, losses = train(REFERENCE, **more)
    assert_close(found_grads, grads)
    np.testing.assert_allclose(found, losses, rtol=1e-3)
    # Every bucket is felt, but that of later keys at distance 0.
    table = grads["encoder"]["relative_bias"]["embedding"]
    felt = (np.abs(table) > 1e-6).all(1)
    np.testing.assert_array_equal(felt, np.arange(8) != 4)

  def test_evaluation_equals_the_plain_reference(self):
    batch = batch_of(PADDED)
    want = solve("reference", batch, train=False)
    # It is "blockwise" on a CPU, and one of a program's branches.
    assert_close(solve("flash", batch, train=False), want)

  def test_packed_rows_equal_separate_sequences(self):
    encoder = objective("blockwise").encoder
    batch = jax.device_get(batch_of(PACKED))
    batch["positions"] = np.where(
      PACKED == 2,
      np.arange(T) - np.argmax(PACKED == 2, 1)[:, None],
      np.arange(T),
    )

    def apply(batch):
      variables = {"params": params()["encoder"]}
      return np.array(jitted.apply(encoder, variables, batch).hidden)

    packed = apply(batch)
    for ids in (1, 2):
      place = np.flatnonzero(PACKED[0] == ids)
      alone = {k: x[:1, place] for k, x in batch.items() if x.shape[1] == T}
      np.testing.assert_allclose(packed[:1, place], apply(alone), atol=2e-5)

  def test_remat_attention_does_not_run_the_kernel_again(self):

    def forward_kernels(remat):
      jaxpr = gradient_of("flash", remat, dtype="bfloat16")
      return jaxpr.count("name=flash_attention_forward")

    # The branch of GPUs is in the program whatever it is compiled for.
    self.assertEqual(forward_kernels("none"), L)
    self.assertEqual(forward_kernels("attention"), L)
    self.assertEqual(forward_kernels("full"), 2 * L)

  def test_remat_products_computes_no_product_again(self):
    none, products, full = (
      gradient_of(ATTENTION["blockwise"], remat, activation="gelu").count(
        "dot_general"
      )
      for remat in ("none", "products", "full")
    )
    self.assertEqual(products, none)
    self.assertGreater(full, none)

  def test_remat_products_does_compute_activations_again(self):
    none, products = (
      gradient_of(ATTENTION["blockwise"], remat, activation="gelu").count(
        "= erf"
      )
      for remat in ("none", "products")
    )
    self.assertEqual(products, none + L)

  def test_remat_changes_no_gradient(self):
    batch, options = batch_of(PACKED), dict(train=True, dropout_rate=0.1)
    want = solve("flash", batch, **options)
    found = solve("flash", batch, remat="attention", **options)
    assert_close(found, want)

  @parameterized.parameters("reference", "blockwise")
  def test_outputs_have_names_whoever_attends(self, backend):
    attend, x = FlashAttend(backend, "bthd", "counter"), jnp.ones((1, 5, 2, 16))
    gradient = jax.grad(lambda q: attend(q, x, x).sum())
    jaxpr = str(jax.make_jaxpr(gradient)(x))
    for name in RESIDUALS:
      self.assertIn(f"name={name}", jaxpr)


class LayoutTest(parameterized.TestCase):
  def test_projections_write_what_the_kernel_reads(self):
    seen = []

    class Spy:
      layout = "bhdt"

      def __call__(self, q, k, v, **options):
        seen.append(q.shape)
        return v

    x = jnp.ones((2, 5, 12))
    for attend in (Spy(), ATTENTION["reference"]):
      layer = SelfAttention(num_heads=3, head_dim=4, attend=attend)
      variables = jitted.init(layer, jax.random.key(0), x, None, train=False)
      shape = variables["params"]["query"]["kernel"].unbox().shape
      self.assertEqual(shape, (12, 3, 4))
    self.assertEqual(seen, [(2, 3, 4, 5)])

  def test_a_causal_encoder_is_causal_whatever_attends(self):
    dims = dict(vocab_size=V, emb_dim=16, num_heads=2, num_layers=1)
    batch = batch_of(np.ones((2, T)))
    outs = {}
    for attend in ("blockwise", "reference"):
      encoder = left_to_right_bert(**dims, max_positions=T, attend=attend)
      variables = jitted.init(encoder, jax.random.key(0), batch)
      out = jitted.apply(encoder, variables, batch)
      outs[attend] = np.array(out.hidden)
    np.testing.assert_allclose(outs["blockwise"], outs["reference"], atol=1e-5)
    tokens = np.where(np.arange(T) < 9, batch["tokens"], 1)
    later = batch | {"tokens": tokens}
    moved = np.array(jitted.apply(encoder, variables, later).hidden)
    want = outs["blockwise"][:, :9]
    np.testing.assert_allclose(moved[:, :9], want, atol=1e-5)

  @parameterized.parameters(
    ("float32", 256, "dense"),  # the faster one on a CPU, as measured
    ("float32", 257, None),
    ("bfloat16", 256, None),
  )
  def test_the_default_on_a_cpu_is_the_faster_one(self, dtype, length, want):
    q, k = (jnp.ones((1, t, 1, 16), dtype) for t in (7, length))
    self.assertEqual(FlashAttend().backend_for(q, k), want)
    self.assertEqual(FlashAttend().backend_for(k, q), want)
    self.assertEqual(FlashAttend("tpu").backend_for(q, k), "tpu")
    with mock.patch.object(flash, "platform", return_value="tpu"):
      q, k = (x.swapaxes(1, 3) for x in (q, k))
      self.assertIsNone(FlashAttend().backend_for(q, k))

  def test_layouts_give_one_layer(self):
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    outs = []
    for layout in ("bthd", "bhtd", "bhdt"):
      attend = FlashAttend("blockwise", layout)
      layer = SelfAttention(num_heads=3, head_dim=4, attend=attend)
      variables = jitted.init(layer, jax.random.key(1), x, None, train=False)
      variables = jax.tree.map(  # biases count
        lambda p: np.array(p) + np.float32(0.1), variables
      )
      outs.append(jitted.apply(layer, variables, x, None, train=False))
    np.testing.assert_allclose(outs[1], outs[0], atol=1e-5)
    np.testing.assert_allclose(outs[2], outs[0], atol=1e-5)


class MeshTest(absltest.TestCase):
  def test_axes_are_those_of_the_rules(self):
    self.assertIsNone(mesh_sharding())
    mesh = make_mesh(data=2, model=2, seq=2)
    with jax.set_mesh(mesh):
      sharding = mesh_sharding()
    self.assertEqual(sharding.axes, ("data", "model", "seq"))

  def test_a_mesh_tells_whose_kernels_are_traced(self):
    def traced():
      x = jnp.zeros((1, 8, 2, 8), jnp.bfloat16)
      return str(jax.make_jaxpr(lambda x: FlashAttend()(x, x, x))(x))

    self.assertIn("pallas_call", traced())
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
      self.assertNotIn("pallas_call", traced())

  def test_a_sharded_encoder_equals_the_whole(self):
    dims = dict(vocab_size=V, emb_dim=32, num_heads=4, num_layers=1)
    batch = batch_of(PACKED)
    encoder = bert(
      **dims,
      max_positions=T,
      attend="blockwise",
      dropout_rate=0.0,
      attention_dropout_rate=0.3,
    )
    variables = nn.meta.unbox(
      jax.jit(lambda k: encoder.init(k, batch))(jax.random.key(0))
    )

    def loss(variables):
      out = encoder.apply(
        variables, batch, train=True, rngs={"dropout": jax.random.key(1)}
      )
      return (out.hidden**3).sum()

    want = jax.jit(jax.value_and_grad(loss))(variables)
    with jax.set_mesh(make_mesh(data=2, model=2, seq=2)):
      found = jax.jit(jax.value_and_grad(loss))(variables)
    assert_close(found, want, atol=1e-4)


if __name__ == "__main__":
  absltest.main()
