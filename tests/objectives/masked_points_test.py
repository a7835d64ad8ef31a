"""Pre-training of Point-BERT: what is learned, and what must not be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from bertjax import optim, train_state, train_step
from bertjax.layers.batch_norm import batch_norm
from bertjax.models import MODELS
from bertjax.models.point_bert import PointTokenizer
from bertjax.objectives.masked_points import (
  ContrastHead,
  MaskedPoints,
  Options,
)
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch
from tests import jitted

B, N, G, M, V = 16, 24, 9, 4, 6
_OPTIONS = dict(contrast_dim=5, queue_size=48, contrast=True)


class Octants(nn.Module):
  """A tokenizer: the axis along which a centre lies farthest out, signed."""

  vocab_size: int = V

  @nn.compact
  def codes(self, patches, *, train):
    shifted = batch_norm(train, "norm", jnp.float32)(patches.centres)
    scale = self.param("scale", nn.initializers.ones, (3,))
    sides = jnp.concatenate(
      [shifted * scale[None, None], -shifted * scale[None, None]], axis=-1
    )
    return sides.argmax(-1).astype(jnp.int32)


def encoder(**options):
  # "flash" traces the kernels of all platforms.
  sizes = dict(
    num_layers=2, emb_dim=12, num_heads=2, patch_features=8, attend="reference"
  )
  return MODELS["point_bert"](patches=G, patch_size=M, **sizes | options)


def objective(**options):
  return MaskedPoints(encoder(), Octants, V, Options(**_OPTIONS | options))


def clouds(rows=B, seed=0):
  rng = np.random.default_rng(seed)
  points = rng.normal(size=(rows, N, 3)) * rng.uniform(0.5, 2, (rows, 1, 3))
  return {"points": jnp.asarray(points, jnp.float32)}


@functools.cache
def variables(**options):
  made = objective(**options)
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  return nn.meta.unbox(
    jax.jit(lambda b: made.init(rngs, b, train=False))(clouds())
  )


def watched(made, variables, batch, *, train, rngs=None):
  """What an objective says, its new state, and what its encoders were asked.

  The last are triples: the batch, whether in training mode, and final states.
  """
  modes = []

  @jax.jit
  def run(variables):
    seen = []

    def watch(call, arguments, options, context):
      found = call(*arguments, **options)
      if hasattr(found, "hidden"):
        modes.append(options["train"])
        seen.append((*arguments, found.hidden))
      return found

    with nn.intercept_methods(watch):
      said, extra = made.apply(
        variables,
        batch,
        train=train,
        rngs=rngs,
        mutable=list(state_only(variables)),
      )
    return said, extra, seen

  said, extra, seen = run(variables)
  return said, extra, [(x, mode, y) for (x, y), mode in zip(seen, modes)]


def state_only(tree):
  return {k: v for k, v in tree.items() if k != "params"}


class ObjectiveTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.objective = objective()
    cls.variables = variables()
    cls.evaluate = staticmethod(
      jax.jit(lambda v, b: cls.objective.apply(v, b, train=False))
    )

    def loss(params, extra, batch, key):
      (sums, metrics), extra = cls.objective.apply(
        {"params": params, **extra},
        batch,
        train=True,
        rngs={"dropout": key},
        mutable=list(extra),
      )
      return sum(sums.values()), (sums, metrics, extra)

    cls.gradient = staticmethod(jax.jit(jax.grad(loss, has_aux=True)))

  def trained(self, seed=0, **changed):
    v = {**self.variables, **changed}
    return self.gradient(
      v["params"], state_only(v), clouds(), jax.random.key(seed)
    )

  def test_everything_is_learned_but_the_frozen_and_the_slow(self):
    slopes, (sums, metrics, extra) = self.trained()
    self.assertEqual(
      set(sums), {"tokens", "mixed_tokens", "contrast", "mixed_contrast"}
    )
    self.assertEqual(set(sums), set(self.objective.coefficients))
    self.assertEqual(set(sums), set(self.objective.weights(clouds())))
    for path, leaf in jax.tree_util.tree_leaves_with_path(slopes):
      self.assertGreater(np.abs(leaf).max(), 0, jax.tree_util.keystr(path))
    jax.tree.map(
      np.testing.assert_array_equal, extra["frozen"], self.variables["frozen"]
    )
    # The first step copies the encoder, which the keys then come from.
    for name, tree in extra["momentum"]["slow"]["params"].items():
      jax.tree.map(
        np.testing.assert_array_equal, tree, self.variables["params"][name]
      )
    queue = extra["queue"]["queue"]
    self.assertEqual(queue["next"], B)
    np.testing.assert_array_equal(
      queue["keys"][B:], self.variables["queue"]["queue"]["keys"][B:]
    )
    np.testing.assert_allclose(
      np.linalg.norm(queue["keys"][:B], axis=1), 1, rtol=1e-5
    )
    self.assertGreater(
      np.abs(queue["keys"] - self.variables["queue"]["queue"]["keys"]).max(),
      0.1,
    )
    self.assertNotEqual(metrics["tokens_loss"], metrics["mixed_tokens_loss"])

  def test_at_first_codes_are_guessed_evenly(self):
    _, (sums, metrics, _) = self.trained()
    for name in ("tokens", "mixed_tokens"):
      # Logits of 0.02 times unit states: small.
      self.assertAlmostEqual(sums[name] / B, np.log(V), delta=0.05)
      total, count = metrics[f"{name}_loss"]
      self.assertAlmostEqual(total / count, sums[name] / B, places=5)
      self.assertBetween(count, 2 * B, 4 * B)

  @parameterized.parameters(0.0, 0.4)
  def test_codes_are_asked_of_hidden_and_exchanged_patches(self, rate):
    v = self.variables
    (_, metrics), _, seen = watched(
      objective(replace_rate=rate), v, clouds(), train=False
    )
    head = v["params"]["token_head"]
    for name, (batch, _, hidden) in zip(
      ("tokens", "mixed_tokens"), seen, strict=True
    ):
      centres, asked = batch["patches"].centres, np.array(batch["masked"])
      # Of mixtures, too: a code goes with its patch.
      codes = np.concatenate([centres, -centres], -1).argmax(-1)
      if rate:
        own = np.arange(B * G).reshape(B, G)
        moved = np.array(batch["sources"]) != own
        self.assertBetween(moved.sum() / (~asked).sum(), rate - 0.2, rate + 0.2)
        asked |= moved
      logits = hidden[:, 1:] @ head["kernel"] + head["bias"][None, None]
      log_probs = np.array(jax.nn.log_softmax(logits))[asked]
      total, count = metrics[f"{name}_loss"]
      self.assertEqual(count, asked.sum())
      own = np.take_along_axis(log_probs, codes[asked][:, None], 1)
      np.testing.assert_allclose(total, -own.sum(), rtol=1e-5)
      hits, _ = metrics[f"{name}_accuracy"]
      self.assertEqual(hits, (log_probs.argmax(1) == codes[asked]).sum())

  def test_keys_are_of_the_slow_encoder_which_sees_masks_and_drops_rows(self):
    slow = {
      name: jax.tree.map(lambda x: 1.5 * x, self.variables["params"][name])
      for name in ("encoder", "contrast_head")
    }
    slow = {"slow": {"params": slow, "updated": jnp.int32(0)}}
    _, extra, seen = watched(
      objective(momentum=0.5),
      {**self.variables, "momentum": slow},
      clouds(),
      train=True,
      rngs={"dropout": jax.random.key(0)},
    )
    (first, *_), _, (batch, trains, hidden) = seen
    self.assertTrue(trains)
    masked = np.array(batch["masked"])
    self.assertBetween(masked.sum(1).min(), 2, 4)
    self.assertGreater((masked != first["masked"]).mean(), 0.1)
    moved = extra["momentum"]["slow"]["params"]
    head, fast = moved["contrast_head"], self.variables["params"]
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, 1.25 * y, rtol=1e-6),
      head,
      fast["contrast_head"],
    )
    found = ContrastHead(_OPTIONS["contrast_dim"]).apply(
      {"params": head}, hidden[:, 0]
    )
    np.testing.assert_allclose(
      extra["queue"]["queue"]["keys"][:B], found, atol=1e-5
    )

  def test_the_most_frequent_code_is_what_a_bias_can_learn(self):
    best = 0.0
    for code in range(V):
      head = self.variables["params"]["token_head"]
      head = head | {"bias": jnp.where(jnp.arange(V) == code, 99.0, 0)}
      params = {**self.variables["params"], "token_head": head}
      _, metrics = self.evaluate({**self.variables, "params": params}, clouds())
      correct, count = metrics["tokens_accuracy"]
      best = max(best, float(correct / count))
    most, count = metrics["frequent_code_share"]
    self.assertAlmostEqual(best, float(most / count), places=6)
    self.assertLess(best, 0.6)

  def test_projections_are_those_of_the_contrast(self):
    batch = clouds()
    found, hidden = (
      jitted.apply(self.objective, self.variables, batch, method=method)
      for method in ("project", "encode")
    )
    cls = hidden[:, 0]
    head = self.variables["params"]["contrast_head"]
    inner = jax.nn.gelu(
      cls @ head["dense"]["kernel"] + head["dense"]["bias"][None],
      approximate=False,
    )
    outer = inner @ head["output"]["kernel"] + head["output"]["bias"][None]
    expected = outer / np.linalg.norm(outer, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)

  def test_evaluation_repeats_changes_nothing_and_contrasts_nothing(self):
    (sums, metrics), extra = jitted.apply(
      self.objective,
      self.variables,
      clouds(),
      train=False,
      mutable=tuple(state_only(self.variables)),
    )
    self.assertEqual(set(sums), {"tokens", "mixed_tokens"})
    jax.tree.map(
      np.testing.assert_array_equal, extra, state_only(self.variables)
    )
    again = self.evaluate(self.variables, clouds())[1]
    for name, pair in metrics.items():
      np.testing.assert_allclose(pair, again[name], rtol=1e-5)

  def test_rows_that_fill_a_batch_weigh_nothing(self):
    index = np.where(np.arange(B) < B // 2, np.arange(B), -1)
    batch = clouds() | {"index": jnp.asarray(index)}
    self.assertEqual(self.objective.weights(batch)["tokens"], B // 2)
    _, metrics = self.evaluate(self.variables, batch)
    self.assertBetween(metrics["tokens_loss"][1], B, 2 * B)
    # In a mixture only what comes from real clouds is asked about.
    self.assertBetween(metrics["mixed_tokens_loss"][1], 0.5 * B, 3 * B)

  def test_the_tokenizer_normalises_as_it_is_told(self):
    frozen = self.variables["frozen"]["tokenizer"]["variables"]
    mean = jnp.array([99.0, 0, 0])  # of averages: all centres lie at -x
    stats = {"norm": {"mean": mean, "var": jnp.ones(3)}}
    moved = {"tokenizer": {"variables": frozen | {"batch_stats": stats}}}
    for own in (True, False):
      made = objective(batch_statistics=not own)
      _, metrics = jitted.apply(
        made,
        {**self.variables, "frozen": moved},
        clouds(),
        train=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=tuple(state_only(self.variables)),
      )[0]
      most, count = metrics["frequent_code_share"]
      self.assertEqual(bool(most == count), own)
    _, metrics = jitted.apply(
      objective(batch_statistics=True),
      {**self.variables, "frozen": moved},
      clouds(),
      train=False,
    )
    self.assertEqual(*metrics["frequent_code_share"])

  @parameterized.named_parameters(
    ("none", dict(contrast=False, mixed_contrast=False, mixed_tokens=False)),
    ("plain", dict(mixed_contrast=False)),
    ("random", dict(masking="random", contrast=False)),
    ("replaced", dict(replace_rate=0.5)),
  )
  def test_switches(self, options):
    made, v = objective(**options), variables(**options)
    (sums, metrics), _ = made.apply(
      v,
      clouds(),
      train=True,
      rngs={"dropout": jax.random.key(3)},
      mutable=list(state_only(v)),
    )
    self.assertEqual(set(sums), set(made.options.terms))
    contrasts = made.options.contrast or made.options.mixed_contrast
    self.assertEqual("contrast_head" in v["params"], contrasts)
    self.assertEqual("queue" in v, contrasts)
    count = metrics["tokens_loss"][1]
    if "replace_rate" in options:
      # A third is hidden and half of the others are exchanged.
      self.assertBetween(count, 0.5 * B * G, 0.8 * B * G)
    else:
      self.assertBetween(count, 0.1 * B * G, 0.6 * B * G)

  def test_published_sizes(self):
    published = MaskedPoints(
      MODELS["point_bert"](attend="reference"), PointTokenizer, 8192, Options()
    )
    batch = {"points": jax.ShapeDtypeStruct((2, 64, 3), jnp.float32)}
    shapes = jax.eval_shape(
      lambda key, b: nn.meta.unbox(
        published.init({"params": key, "dropout": key}, b, train=False)
      ),
      jax.random.key(0),
      batch,
    )
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    self.assertEqual(count, 25_472_896)
    self.assertEqual(shapes["queue"]["queue"]["keys"].shape, (16_384, 512))

  @parameterized.named_parameters(
    ("rates", dict(mask_rates=(0.5, 0.2)), r"mask_rates=\(0.5, 0.2\) must be"),
    ("masking", dict(masking="blocks"), "masking='blocks' is unknown.*'block'"),
    ("momentum", dict(momentum=1.5), r"momentum=1.5 must lie in \[0, 1\]"),
    ("size", dict(queue_size=0), "queue_size=0 must be positive"),
  )
  def test_bad_options_are_named(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      Options(**options)

  def test_a_queue_that_batches_do_not_divide(self):
    made = objective(queue_size=50)
    with self.assertRaisesRegex(
      ValueError, "queue_size=50 must be a multiple of the 16 clouds"
    ):
      jax.eval_shape(
        lambda k: made.init({"params": k}, clouds(), train=False),
        jax.random.key(0),
      )


@functools.cache
def steps(num_devices=1, microbatches=1):
  """States and metrics of two steps."""
  mesh = make_mesh(devices=jax.devices()[:num_devices])
  made, batches = objective(momentum=0.5), [clouds(), clouds(seed=1)]
  spec = {
    k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batches[0].items()
  }
  params, axes = train_state.abstract_params(made, spec)
  optimizer = optim.build_optimizer(
    dict(name="adamw", learning_rate=1e-3),
    total_steps=9,
    params=params,
    logical_axes=axes,
  )
  key = jax.random.key(0)
  _, shardings = train_state.state_shardings(
    made, optimizer.transform, spec, mesh, key
  )
  step = train_step.compile_step(
    made, optimizer, mesh, shardings, spec, microbatches
  )
  with jax.set_mesh(mesh):
    state = jax.jit(
      functools.partial(
        train_state.init_state, made, optimizer.transform, spec
      ),
      out_shardings=shardings,
    )(key)
  found = []
  for batch in batches:
    batch = {k: np.asarray(v) for k, v in batch.items()}
    state, metrics = step(state, put_batch(batch, mesh))
    found.append(jax.device_get((state.params, state.extra, metrics)))
  return found


class StepTest(parameterized.TestCase):
  def test_devices_share_keys_partners_and_statistics(self):
    for alone, together in zip(steps(), steps(num_devices=8)):
      for name, pair in alone[2].items():
        np.testing.assert_allclose(
          together[2][name], pair, rtol=2e-3, atol=1e-4, err_msg=name
        )
      np.testing.assert_allclose(
        together[1]["queue"]["queue"]["keys"],
        alone[1]["queue"]["queue"]["keys"],
        atol=2e-3,
      )
    # Adam's first steps go by the sign of gradients that are nothing but noise.

  def test_microbatches_move_the_slow_encoder_once(self):
    whole, parts = steps(), steps(microbatches=2)
    for (_, a, _), (_, b, _), n in zip(whole, parts, (1, 2)):
      self.assertEqual(a["queue"]["queue"]["next"], n * B)
      self.assertEqual(b["queue"]["queue"]["next"], n * B)
      self.assertEqual(b["momentum"]["slow"]["updated"], n - 1)
    (before, first, _), (_, second, _) = parts
    old, new = (x["momentum"]["slow"]["params"] for x in (first, second))
    jax.tree.map(
      lambda x, y, fast: np.testing.assert_allclose(
        y, 0.5 * x + 0.5 * fast, atol=1e-6
      ),
      old,
      new,
      {name: before[name] for name in old},
    )


if __name__ == "__main__":
  absltest.main()
