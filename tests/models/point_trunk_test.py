"""Point-BERT's Transformer equals a transcription in PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import absltest, parameterized
from flax import linen as nn

from bertjax import points
from bertjax.interop import point_bert as point_names
from bertjax.interop.names import NameMap
from bertjax.models import MODELS
from bertjax.models.encoder import stack_layers, unstack_layers
from bertjax.models.point_bert import inputs
from tests import jitted
from tests.models import torch_point_bert as theirs

B, N, G, M, E, H, F, L = 3, 40, 7, 5, 24, 4, 10, 3
SIZES = dict(
  patches=G,
  patch_size=M,
  num_layers=L,
  emb_dim=E,
  num_heads=H,
  patch_features=F,
  attend="reference",  # "flash" traces the kernels of all platforms
)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def initialised(encoder, batch, key=0):
  rngs = {"params": jax.random.key(key), "dropout": jax.random.key(1)}
  return nn.meta.unbox(jitted.init(encoder, rngs, batch, train=False))


class TrunkTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    cls.cloud = rng.normal(size=(B, N, 3)).astype(np.float32)
    cls.patches = points.group(cls.cloud, G, M)
    cls.encoder = MODELS["point_bert"](**SIZES, keep_layers=True)
    cls.torch = theirs.shaken(theirs.TorchTrunk(L, E, H, F)).eval()
    batch = {"points": cls.cloud}
    shapes = {"params": {}, "batch_stats": {}}
    for name, tree in initialised(cls.encoder, batch).items():
      shapes[name] = {"encoder": tree}
    rows = point_names.KINDS["classifier"].table.rows
    table = NameMap(
      tuple(r for r in rows if r.ours.startswith("encoder/")),
      ignored=("num_batches",),
    )
    found = theirs.loaded(theirs.state_of(cls.torch), table, shapes, L)
    cls.variables = {k: v["encoder"] for k, v in found.items()}
    cls.apply = staticmethod(
      jax.jit(
        functools.partial(cls.encoder.apply, train=False),
      )
    )

  def expected(self, cloud=None):
    patches = self.patches if cloud is None else points.group(cloud, G, M)
    with torch.no_grad():
      return self.torch.states(
        torch.from_numpy(np.array(patches.points)),
        torch.from_numpy(np.array(patches.centres)),
      )

  def test_every_block_equals_the_transcription(self):
    found = self.apply(self.variables, {"points": self.cloud})
    states = self.expected()
    for mine, other in zip(found.layers[1:], states, strict=True):
      np.testing.assert_allclose(mine, other, atol=1e-4)
    normed = self.torch.norm(states[-1]).detach()
    np.testing.assert_allclose(found.hidden, normed, atol=1e-4)
    self.assertGreater(np.abs(np.diff(found.layers, axis=0)).mean(), 0.1)

  def test_the_norm_of_an_earlier_block_is_the_last_norm(self):
    found = self.apply(self.variables, {"points": self.cloud})
    mine = jitted.apply(
      self.encoder, self.variables, found.layers[2], method="normed"
    )
    other = self.torch.norm(self.expected()[1]).detach()
    np.testing.assert_allclose(mine, other, atol=1e-4)

  def test_unscanned_layers_are_the_same_model(self):
    apart = self.encoder.clone(scan=False)
    variables = {
      **self.variables,
      "params": unstack_layers(self.variables["params"], L),
    }
    for name in ("hidden", "layers"):
      np.testing.assert_allclose(
        getattr(apart.apply(variables, {"points": self.cloud}), name),
        getattr(self.apply(self.variables, {"points": self.cloud}), name),
        atol=1e-5,
      )
    back = stack_layers(variables["params"], L)
    jax.tree.map(np.testing.assert_array_equal, back, self.variables["params"])

  def test_order_of_points_but_the_first_does_not_matter(self):
    order = np.concatenate(
      [[0], 1 + np.random.default_rng(1).permutation(N - 1)]
    )
    turned = self.apply(self.variables, {"points": self.cloud[:, order]})
    found = self.apply(self.variables, {"points": self.cloud})
    np.testing.assert_allclose(turned.hidden, found.hidden, atol=1e-5)
    # Another first point gives other patches.
    other = self.apply(self.variables, {"points": self.cloud[:, ::-1]})
    self.assertGreater(np.abs(other.hidden - found.hidden).max(), 1e-2)

  def test_moved_clouds_differ_in_their_positions_alone(self):
    moved = points.group(self.cloud + np.float32(0.5), G, M)
    np.testing.assert_allclose(moved.points, self.patches.points, atol=1e-6)
    still = moved._replace(centres=self.patches.centres)
    found = self.apply(self.variables, {"points": self.cloud}).hidden
    np.testing.assert_allclose(
      self.apply(self.variables, {"patches": still}).hidden, found, atol=1e-4
    )
    elsewhere = self.apply(self.variables, {"patches": moved}).hidden
    self.assertGreater(np.abs(elsewhere - found).max(), 1e-2)

  def test_rows_do_not_mix(self):
    found = self.apply(self.variables, {"points": self.cloud}).hidden
    other = self.cloud.copy()
    other[1] = 0.1 * np.arange(N * 3, dtype=np.float32).reshape(N, 3)
    changed = self.apply(self.variables, {"points": other}).hidden
    np.testing.assert_allclose(changed[::2], found[::2], atol=1e-6)

  def test_published_sizes(self):
    encoder = MODELS["point_bert"](attend="reference")
    batch = {"points": jax.ShapeDtypeStruct((2, 64, 3), jnp.float32)}
    shapes = jax.eval_shape(lambda b: initialised(encoder, b), batch)
    # The classifier's 22,065,960 but for its head of 40 classes.
    self.assertEqual(count(shapes["params"]), 22_065_960 - 207_144)

  @parameterized.named_parameters(
    ("pretraining", "pretraining", 0.02, 0.02),
    ("classifier", "classifier", 0.0, 1.0),
  )
  def test_initial_values(self, start, cls, position):
    encoder = MODELS["point_bert"](**SIZES | dict(emb_dim=200), start=start)
    params = initialised(encoder, {"points": self.cloud})["params"]
    first, second = params["embeddings"]["cls"], params["positions"]["cls"]
    self.assertAlmostEqual(first.std(), cls, delta=0.2 * cls)
    self.assertAlmostEqual(second.std(), position, delta=0.2 * position)
    kernels = {
      jax.tree_util.keystr(path): leaf.std()
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
      if "kernel" in jax.tree_util.keystr(path)
    }
    self.assertLen(kernels, 4 + 1 + 2 + 6)
    for name, deviation in kernels.items():
      # 384 draws at the least: 5 standard errors
      self.assertAlmostEqual(deviation, 0.02, delta=0.02 * 0.2, msg=name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      if "bias" in (name := jax.tree_util.keystr(path)):
        np.testing.assert_array_equal(leaf, 0, name)

  def test_masked_patches_are_read_from_their_position_alone(self):
    masked = np.zeros((B, G), bool)
    masked[:, 2] = True
    batch = {"patches": self.patches, "masked": masked}
    encoder = self.encoder.clone(keep_layers=False)
    variables = initialised(encoder, batch)
    self.assertIn("mask", variables["params"]["embeddings"])
    self.assertNotIn("mask", self.variables["params"]["embeddings"])
    found = jitted.apply(encoder, variables, batch).hidden
    other = self.patches._replace(points=self.patches.points.at[:, 2].set(9.0))
    hidden = jitted.apply(
      encoder, variables, {**batch, "patches": other}
    ).hidden
    np.testing.assert_array_equal(hidden, found)
    other = self.patches._replace(
      centres=self.patches.centres.at[:, 2].set(9.0)
    )
    placed = jitted.apply(
      encoder, variables, {**batch, "patches": other}
    ).hidden
    self.assertGreater(np.abs(placed - found).max(), 1e-3)

  @parameterized.named_parameters(
    ("patches", dict(patches=41), "patches=41 of model.patch_size=5 .* of 40"),
    ("size", dict(patch_size=0), "patch_size=0 must be at least 1"),
    ("width", dict(emb_dim=0), "emb_dim=0 must be at least 1"),
    ("unroll", dict(unroll=0), "unroll=0 must be at least 1"),
    (
      "heads",
      dict(num_heads=5),
      "num_heads=5 does not divide model.emb_dim=24",
    ),
    (
      "rate",
      dict(drop_path_rate=1.0),
      r"drop_path_rate=1.0 must lie in \[0, 1",
    ),
    (
      "shrink",
      dict(shrink=300),
      "shrink=300 must be a power of 2, at most 32",
    ),
    ("start", dict(start="zero"), "model.start='zero' is unknown"),
  )
  def test_bad_options_are_named(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      initialised(
        MODELS["point_bert"](**{**SIZES, **options}), {"points": self.cloud}
      )

  def test_text_is_refused(self):
    with self.assertRaisesRegex(ValueError, "a batch of tokens has no points"):
      initialised(self.encoder, {"tokens": np.zeros((2, 3), np.int32)})


class RematTest(parameterized.TestCase):
  @parameterized.parameters(
    ("products", 0),
    ("full", 2),  # attention_norm and mlp_norm
  )
  def test_a_loop_that_keeps_products_keeps_statistics(self, remat, again):
    cloud = np.random.default_rng(0).normal(size=(B, N, 3)).astype(np.float32)
    batch = {"points": cloud}
    variables = initialised(MODELS["point_bert"](**SIZES), batch)

    def count(remat):
      encoder = MODELS["point_bert"](**SIZES, remat=remat)

      def loss(params):
        found = encoder.apply(
          {**variables, "params": params}, batch, train=False
        )
        return (found.hidden**2).sum()

      made = jax.make_jaxpr(jax.grad(loss))(variables["params"])
      return str(made).count("rsqrt")

    self.assertEqual(count(remat) - count("none"), again)


class MovedTest(absltest.TestCase):
  def test_replaced_embeddings_have_no_gradient(self):
    x = jnp.arange(12.0).reshape(2, 3, 2)
    sources = jnp.array([[0, 5, 2], [3, 4, 1]])
    np.testing.assert_array_equal(
      inputs.moved(x, sources)[:, :, 0], [[0, 10, 4], [6, 8, 2]]
    )
    slope = jax.grad(lambda x: inputs.moved(x, sources).sum())(x)
    np.testing.assert_array_equal(slope[:, :, 0], [[1, 0, 1], [1, 1, 0]])


if __name__ == "__main__":
  absltest.main()
