"""The tokenizer's loss and evaluation against sums done by hand."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy.spatial import cKDTree

from bertjax.data.shapes.dataset import PointDataset, Reading
from bertjax.data.shapes.sources import Procedural
from bertjax.evals import reconstruction
from bertjax.metrics import flops, meters
from bertjax.models import bert, point_tokenizer
from bertjax.objectives import build_objective, masked_lm
from bertjax.objectives.step import clock, streams
from bertjax.parallel.mesh import make_mesh
from tests import jitted

B, N, G, M, V = 4, 40, 5, 8, 12
_SPEC = dict(name="point_reconstruction", kl_weight=0.3, kl_delay=10,
             kl_steps=10, temperature_steps=20)  # fmt: skip


def distances(a, b):
  """Of every point of `a` to the nearest of `b`, and the other way round."""
  return cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]


def cd_l1(a, b):
  forward, backward = distances(a, b)
  return (forward.mean() + backward.mean()) / 2


class ReconstructionTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    encoder = point_tokenizer(
      patches=G, patch_size=M, vocab_size=V, features=8, shrink=32
    )
    cls.objective = build_objective(_SPEC, encoder)
    rng = np.random.default_rng(0)
    cls.batch = {
      "points": rng.normal(size=(B, N, 3)).astype(np.float32),
      "index": np.arange(B, dtype=np.int32),
      "labels": np.array([0, 2, 2, 0], np.int32),
    }
    cls.batch = jax.tree.map(jnp.asarray, cls.batch)
    cls.variables = jitted.init(
      cls.objective, jax.random.key(0), cls.batch, train=False
    )
    cls.found = jitted.apply(
      cls.objective, cls.variables, cls.batch, method="outputs"
    )
    cls.patches = encoder.group(cls.batch["points"])

  def apply(self, batch=None):
    return jitted.apply(
      self.objective, self.variables, batch or self.batch, train=False
    )

  def training(self, step, seed=0):
    """Terms and metrics of a training step."""
    (terms, metrics), _ = jitted.apply(
      self.objective,
      {**self.variables, **clock(jnp.int32(step))},
      self.batch,
      train=True,
      rngs=streams(jax.random.key(seed)),
      mutable=("batch_stats",),
    )
    return terms, metrics

  def test_the_loss_is_the_distance_of_decoded_patches(self):
    parts = jitted.apply(
      self.objective.encoder,
      {k: v["encoder"] for k, v in self.variables.items()},
      self.patches,
      train=False,
      hard=True,
    )
    wanted = sum(
      cd_l1(decoded[b, g], self.patches.points[b, g]) / G
      for decoded in map(np.asarray, (parts.coarse, parts.fine))
      for b in range(B)
      for g in range(G)
    )
    shares = np.asarray(jax.nn.softmax(parts.logits)).mean(1)
    kl = (np.log(1 / V) - np.log(shares)).mean(1).sum()
    terms, metrics = self.apply()
    np.testing.assert_allclose(terms["reconstruction"], wanted, rtol=1e-5)
    np.testing.assert_allclose(terms["kl"], 0.3 * kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"][0], kl, rtol=1e-4)

  def test_whole_clouds_are_compared(self):
    found = np.asarray(self.found["points"])
    self.assertEqual(found.shape, (B, G * M, 3))
    pairs = [distances(a, b) for a, b in zip(found, self.batch["points"])]
    clouds, counts = jitted.apply(
      self.objective, self.variables, self.batch, method="measure"
    )
    l1 = [1000 * (f.mean() + g.mean()) / 2 for f, g in pairs]
    l2 = [1000 * ((f**2).mean() + (g**2).mean()) for f, g in pairs]
    np.testing.assert_allclose(clouds["cd_l1"], l1, rtol=1e-5)
    np.testing.assert_allclose(clouds["cd_l2"], l2, rtol=1e-5)
    _, metrics = self.apply()
    np.testing.assert_allclose(metrics["cd_l2"][0], sum(l2), rtol=1e-5)
    used = np.bincount(np.ravel(self.found["codes"]), minlength=V)
    np.testing.assert_array_equal(counts, used)

  def test_near_points_are_hits(self):
    strict, mild = (
      jitted.apply(
        build_objective(_SPEC | dict(threshold=t), self.objective.encoder),
        self.variables,
        self.batch,
        method="measure",
      )[0]["f_score"]
      for t in (0.01, 0.9)
    )
    f, g = distances(self.found["points"][1], self.batch["points"][1])
    p, r = (f < 0.9).mean(), (g < 0.9).mean()
    np.testing.assert_allclose(mild[1], 2 * p * r / (p + r), rtol=1e-5)
    self.assertLess(strict[1], mild[1])

  def test_rows_that_fill_a_batch_count_nothing(self):
    filled = {
      k: jnp.concatenate([v, jnp.full_like(v[:3], 0 if k == "points" else -1)])
      for k, v in self.batch.items()
    }
    terms, metrics = self.apply()
    more, also = self.apply(filled)
    for name, value in terms.items():
      np.testing.assert_allclose(more[name], value, rtol=1e-6)
    for name, pair in metrics.items():
      np.testing.assert_allclose(also[name], pair, rtol=1e-6)
    for weights in map(self.objective.weights, (self.batch, filled)):
      self.assertEqual({k: float(v) for k, v in weights.items()},
                       dict(reconstruction=4, kl=4))  # fmt: skip

  def test_training_draws_codes_anew_and_evaluation_does_not(self):
    noisy = [float(self.training(5, s)[0]["reconstruction"]) for s in (0, 1)]
    self.assertNotAlmostEqual(*noisy, places=4)
    still = [float(self.apply()[0]["reconstruction"]) for _ in range(2)]
    self.assertEqual(*still)

  @parameterized.parameters(
    (0, 1, 0), (10, 0.53125, 0), (15, None, 0.15), (20, 0.0625, 0.3),
    (900, 0.0625, 0.3),
  )  # fmt: skip
  def test_schedules_follow_the_step(self, step, temperature, weight):
    terms, metrics = self.training(step)
    if temperature is not None:
      self.assertAlmostEqual(metrics["temperature"][0], temperature, places=6)
    self.assertAlmostEqual(metrics["kl_weight"][0], weight, places=6)
    np.testing.assert_allclose(
      terms["kl"], weight * metrics["kl"][0], rtol=1e-5
    )

  def test_schedules_are_by_default_the_authors(self):
    built = build_objective(
      dict(name="point_reconstruction"), self.objective.encoder
    )
    n = np.array([0, 5_000, 10_000, 60_000, 1e5, 1.1e5, 3e5])
    tau = (
      0.0625 + (1 - 0.0625) * (1 + np.cos(np.pi * np.minimum(n, 1e5) / 1e5)) / 2
    )
    late = np.clip((n - 1e4) / 1e5, 0, 1)
    np.testing.assert_allclose(built.temperature(n), tau, rtol=1e-5)
    np.testing.assert_allclose(
      built.kl_weight(n), 0.1 * (1 - np.cos(np.pi * late)) / 2, atol=1e-7
    )

  @parameterized.parameters(
    (dict(temperature_end=0), "objective.temperature_end=0 must be positive"),
    (dict(kl_weight=-1), "objective.kl_weight=-1 must not be negative"),
  )
  def test_bad_schedules(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      build_objective(_SPEC | changes, self.objective.encoder)

  def test_model_and_objective_must_be_of_one_kind(self):
    text = bert(vocab_size=9, num_layers=1, emb_dim=4, num_heads=1)
    with self.assertRaisesRegex(ValueError, "kind PointTokenizer; .*Encoder"):
      build_objective(_SPEC, text)
    with self.assertRaisesRegex(ValueError, "kind Encoder; .*PointTokenizer"):
      build_objective(dict(name="masked_lm"), self.objective.encoder)

  def test_an_evaluator_averages_by_class_and_counts_codes(self):
    clouds = Procedural(sizes=dict(train=5), points=N).open("train")
    dataset = PointDataset(clouds, Reading(num_points=N))
    data = types.SimpleNamespace(dataset=lambda split: dataset, batch_size=2)
    mesh = make_mesh(devices=jax.devices()[:1])
    values = reconstruction(
      objective=self.objective, data=data, mesh=mesh, split="train"
    )(self.variables, jax.random.key(0))
    rows = [
      jax.tree.map(jnp.asarray, row) for row in dataset.evaluation_batches(1)
    ]
    each = [
      jitted.apply(self.objective, self.variables, row, method="measure")
      for row in rows
    ]
    l2 = {int(row["labels"][0]): float(c["cd_l2"][0])
          for row, (c, _) in zip(rows, each)}  # fmt: skip
    self.assertAlmostEqual(values["cd_l2"], np.mean([*l2.values()]), places=1)
    for label, value in l2.items():
      name = clouds.classes[label]
      np.testing.assert_allclose(values[f"cd_l2/{name}"], value, rtol=1e-5)
    self.assertNotIn("cd_l2/bottle", values)
    counts = sum(np.asarray(c) for _, c in each)
    self.assertEqual(values["code_usage"], (counts > 0).mean())
    share = counts[counts > 0] / counts.sum()
    np.testing.assert_allclose(
      values["code_perplexity"], np.prod(share**-share), rtol=1e-5
    )
    with self.assertRaisesRegex(ValueError, "needs objective.name='point_rec"):
      reconstruction(objective=None, data=data, mesh=mesh)


class FlopsTest(absltest.TestCase):
  def test_loops_count_as_often_as_they_turn(self):
    a, b = jnp.zeros((3, 5)), jnp.zeros((5, 5))

    def looped(x):
      x, _ = jax.lax.scan(lambda x, _: (x @ b, None), x, length=7)
      return jax.lax.cond(x[0, 0] > 0, lambda x: x @ b @ b, lambda x: x, x)

    self.assertEqual(flops.products(jax.jit(looped), a), 9 * 2 * 3 * 5 * 5)

  def test_a_text_encoder_says_what_is_counted(self):
    encoder = bert(
      vocab_size=23,
      num_layers=3,
      emb_dim=8,
      num_heads=2,
      mlp_dim=20,
      attend="reference",
    )
    objective = masked_lm(encoder=encoder)
    batch = {
      name: jnp.zeros(shape, jnp.int32)
      for name, shape in dict(
        tokens=(1, 9), masked_positions=(1, 4), labels=(1, 4)
      ).items()
    }
    variables = nn.meta.unbox(
      jitted.init(objective, jax.random.key(0), batch, train=False)
    )
    counted = flops.products(
      lambda v: objective.apply(v, batch, train=False), variables
    )
    spec = jax.eval_shape(lambda x: x, batch)
    self.assertEqual(objective.row_flops(variables["params"], spec), counted)
    self.assertEqual(
      meters.train_flops(
        num_layers=3, emb_dim=8, mlp_dim=20, seq_len=9, vocab_size=23,
        max_masked=4,
      ),
      meters.TRAINING * counted,
    )  # fmt: skip

  def test_the_tokenizer_counts_its_patches(self):
    def count(patches):
      encoder = point_tokenizer(
        patches=patches, patch_size=M, vocab_size=V, features=8, shrink=32
      )
      spec = {"points": jax.ShapeDtypeStruct((7, N, 3), jnp.float32)}
      return build_objective(_SPEC, encoder).row_flops(None, spec)

    self.assertGreater(count(5), 0)
    self.assertEqual(count(10), 2 * count(5))


if __name__ == "__main__":
  absltest.main()
