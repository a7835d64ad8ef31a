"""Pre-training of Point-BERT: what is learned, and what must not be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn
from scipy.special import log_softmax
from scipy.stats import norm

from bertjax import optim, train_state, train_step
from bertjax.layers.batch_norm import batch_norm
from bertjax.models import MODELS
from bertjax.models.point_bert import PointTokenizer
from bertjax.objectives import build_objective
from bertjax.objectives.masked_points import (
  ContrastHead,
  MaskedPoints,
  Options,
)
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch
from tests import jitted

B, N, G, M, V = 16, 24, 9, 4, 6
_OPTIONS = dict(contrast_dim=5, queue_size=48, contrast=True, momentum=0.5)
_PLAIN = dict(contrast=False, mixed_contrast=False, mixed_tokens=False)


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
  return {"points": jax.device_put(points.astype(np.float32))}


def init(made):
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  return nn.meta.unbox(made.init(rngs, clouds(), train=False))


@functools.cache
def variables():
  # Those of all objectives: mixtures have none of their own.
  made = objective(mixed_tokens=False, mixed_contrast=False)
  return jax.device_get(jax.jit(lambda: init(made))())


def alike(shapes, variables):
  """The part of `variables` that `shapes` has."""
  if not isinstance(shapes, dict):
    return variables
  return {k: alike(v, variables[k]) for k, v in shapes.items()}


def watched(made, variables, batch, *, train, rngs=None):
  """What an objective says, its new state, and what its encoders were asked.

  The last are triples: the batch, whether in training mode, and final states.
  """
  seen = []

  def watch(call, arguments, options, context):
    found = call(*arguments, **options)
    if hasattr(found, "hidden"):
      seen.append((*arguments, options["train"], found.hidden))
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


def trained(made, variables):
  """What an objective says in training, and its new state."""
  return made.apply(
    variables,
    clouds(),
    train=True,
    rngs={"dropout": jax.random.key(3)},
    mutable=list(state_only(variables)),
  )


def state_only(tree):
  return {k: v for k, v in tree.items() if k != "params"}


class ObjectiveTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.objective = objective()
    cls.variables = variables()
    cls.evaluate = staticmethod(
      jax.jit(functools.partial(watched, cls.objective, train=False))
    )

    def loss(params, extra, batch, key):
      (sums, metrics), extra, seen = watched(
        cls.objective,
        {"params": params, **extra},
        batch,
        train=True,
        rngs={"dropout": key},
      )
      return sum(sums.values()), (sums, metrics, extra, seen)

    cls.gradient = staticmethod(jax.jit(jax.grad(loss, has_aux=True)))

  def trained(self, seed=0, **changed):
    v = {**self.variables, **changed}
    return self.gradient(
      v["params"], state_only(v), clouds(), jax.random.key(seed)
    )

  def test_everything_is_learned_but_the_frozen_and_the_slow(self):
    slopes, (sums, metrics, extra, _) = self.trained()
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
    _, (sums, metrics, *_) = self.trained()
    for name in ("tokens", "mixed_tokens"):
      # Logits of 0.02 times unit states: small.
      self.assertAlmostEqual(sums[name] / B, np.log(V), delta=0.05)
      total, count = metrics[f"{name}_loss"]
      self.assertAlmostEqual(total / count, sums[name] / B, places=5)
      self.assertBetween(count, 2 * B, 4 * B)

  @parameterized.parameters(0.0, 0.4)
  def test_codes_are_asked_of_hidden_and_exchanged_patches(self, rate):
    v = self.variables
    evaluate = self.evaluate
    if rate:
      made = objective(replace_rate=rate)
      evaluate = jax.jit(functools.partial(watched, made, train=False))
    (_, metrics), _, seen = evaluate(v, clouds())
    head = v["params"]["token_head"]
    for name, (batch, _, hidden) in zip(
      ("tokens", "mixed_tokens"), seen, strict=True
    ):
      batch = jax.device_get(batch)
      centres, asked = batch["patches"].centres, batch["masked"].copy()
      # Of mixtures, too: a code goes with its patch.
      codes = np.concatenate([centres, -centres], -1).argmax(-1)
      if rate:
        own = np.arange(B * G).reshape(B, G)
        moved = batch["sources"] != own
        self.assertBetween(moved.sum() / (~asked).sum(), rate - 0.2, rate + 0.2)
        asked |= moved
      logits = np.array(hidden)[:, 1:] @ head["kernel"] + head["bias"]
      log_probs = log_softmax(logits, axis=-1)[asked]
      total, count = metrics[f"{name}_loss"]
      self.assertEqual(count, asked.sum())
      own = np.take_along_axis(log_probs, codes[asked][:, None], 1)
      np.testing.assert_allclose(total, -own.sum(), rtol=1e-5)
      hits, _ = metrics[f"{name}_accuracy"]
      self.assertEqual(hits, (log_probs.argmax(1) == codes[asked]).sum())

  def test_keys_are_of_the_slow_encoder_which_sees_masks_and_drops_rows(self):
    slow = {
      name: jax.tree.map(
        lambda x: np.float32(1.5) * x, self.variables["params"][name]
      )
      for name in ("encoder", "contrast_head")
    }
    slow = {"slow": {"params": slow, "updated": np.int32(0)}}
    _, (*_, extra, seen) = self.trained(momentum=slow)
    (first, *_), _, (batch, trains, hidden) = seen
    self.assertTrue(trains)
    masked = np.array(batch["masked"])
    self.assertBetween(masked.sum(1).min(), 2, 4)
    self.assertGreater((masked != np.array(first["masked"])).mean(), 0.1)
    moved = extra["momentum"]["slow"]["params"]
    head, fast = moved["contrast_head"], self.variables["params"]
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, 1.25 * y, rtol=1e-6),
      head,
      fast["contrast_head"],
    )
    found = jitted.apply(
      ContrastHead(_OPTIONS["contrast_dim"]), {"params": head}, hidden[:, 0]
    )
    np.testing.assert_allclose(
      extra["queue"]["queue"]["keys"][:B], found, atol=1e-5
    )

  def test_the_most_frequent_code_is_what_a_bias_can_learn(self):
    best = 0.0
    for code in range(V):
      head = self.variables["params"]["token_head"]
      head = head | {"bias": np.float32(99) * (np.arange(V) == code)}
      params = {**self.variables["params"], "token_head": head}
      v = {**self.variables, "params": params}
      (_, metrics), *_ = self.evaluate(v, clouds())
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
    head = self.variables["params"]["contrast_head"]
    inner = np.array(hidden)[:, 0] @ head["dense"]["kernel"]
    inner = inner + head["dense"]["bias"]
    inner = inner * norm.cdf(inner)  # GELU
    outer = inner @ head["output"]["kernel"] + head["output"]["bias"]
    expected = outer / np.linalg.norm(outer, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)

  def test_evaluation_repeats_changes_nothing_and_contrasts_nothing(self):
    (sums, metrics), extra, _ = self.evaluate(self.variables, clouds())
    self.assertEqual(set(sums), {"tokens", "mixed_tokens"})
    jax.tree.map(
      np.testing.assert_array_equal, extra, state_only(self.variables)
    )
    made = objective(batch_statistics=True)  # which evaluation has none of
    _, again = jitted.apply(made, self.variables, clouds(), train=False)
    for name, pair in metrics.items():
      np.testing.assert_allclose(pair, again[name], rtol=1e-5)

  def test_rows_that_fill_a_batch_weigh_nothing(self):
    index = np.where(np.arange(B) < B // 2, np.arange(B), -1)
    batch = clouds() | {"index": jax.device_put(index)}
    self.assertEqual(self.objective.weights(batch)["tokens"], B // 2)
    (_, metrics), *_ = self.evaluate(self.variables, batch)
    self.assertBetween(metrics["tokens_loss"][1], B, 2 * B)
    # In a mixture only what comes from real clouds is asked about.
    self.assertBetween(metrics["mixed_tokens_loss"][1], 0.5 * B, 3 * B)

  def test_the_tokenizer_normalises_as_it_is_told(self):
    frozen = self.variables["frozen"]["tokenizer"]["variables"]
    mean = np.float32([99, 0, 0])  # of averages: all centres lie at -x
    stats = {"norm": {"mean": mean, "var": np.ones(3, np.float32)}}
    moved = {"tokenizer": {"variables": frozen | {"batch_stats": stats}}}
    _, (_, metrics, *_) = self.trained(frozen=moved)
    self.assertEqual(*metrics["frequent_code_share"])
    v = {**self.variables, "frozen": moved}
    (_, metrics), _ = jitted.apply(
      objective(batch_statistics=True, **_PLAIN),
      v,
      clouds(),
      train=True,
      rngs={"dropout": jax.random.key(0)},
      mutable=("batch_stats", "frozen"),
    )
    self.assertLess(*metrics["frequent_code_share"])
    made = objective(batch_statistics=True)
    _, metrics = jitted.apply(made, v, clouds(), train=False)
    self.assertEqual(*metrics["frequent_code_share"])

  @parameterized.named_parameters(
    ("none", _PLAIN),
    ("plain", dict(mixed_contrast=False)),
    ("random", dict(masking="random", contrast=False)),
    ("replaced", dict(replace_rate=0.5)),
  )
  def test_switches(self, options):
    made = objective(**options)
    v = alike(jax.eval_shape(lambda: init(made)), self.variables)
    (sums, _), _ = jax.eval_shape(lambda v: trained(made, v), v)
    self.assertEqual(set(sums), set(made.options.terms))
    contrasts = made.options.contrast or made.options.mixed_contrast
    self.assertEqual("contrast_head" in v["params"], contrasts)
    self.assertEqual("queue" in v, contrasts)
    # Mixtures and contrasts ask about nothing more.
    made = objective(**options | _PLAIN)
    (_, metrics), _ = jax.jit(lambda v: trained(made, v))(v)
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

  @parameterized.named_parameters(
    (
      "rates",
      dict(patches=2),
      dict(),
      r"mask_rates=\(0.25, 0.45\) of model.patches=2 never hide",
    ),
    ("replaced", dict(patches=2), dict(replace_rate=0.1), None),
    ("random", dict(patches=2), dict(masking="random"), None),
    (
      "kind",
      dict(),
      dict(tokenizer=dict(name="bert", vocab_size=8)),
      "objective.tokenizer.name='bert' gives a .*choose 'point_tokenizer'",
    ),
    (
      "size",
      dict(),
      dict(tokenizer=dict(name="point_tokenizer", patch_size=8)),
      "objective.tokenizer.patch_size=8 differs from model.patch_size=4",
    ),
  )
  def test_encoders_that_do_not_fit_are_refused(self, model, options, message):
    sizes = dict(patch_size=4, attend="reference") | model
    tokenizer = dict(name="point_tokenizer", patch_size=4)
    spec = dict(name="masked_points", tokenizer=tokenizer) | options

    def build():
      return build_objective(spec, MODELS["point_bert"](**sizes))

    if message is None:
      build()
      return
    with self.assertRaisesRegex(ValueError, message):
      build()

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
def steps(num_devices=1, microbatches=1, **options):
  """States and metrics of two steps."""
  mesh = make_mesh(devices=jax.devices()[:num_devices])
  made, key = objective(**options), jax.random.key(0)
  spec = jax.eval_shape(lambda b: b, clouds())
  params, axes = train_state.abstract_params(made, spec)
  optimizer = optim.build_optimizer(
    dict(name="adamw", learning_rate=1e-3),
    total_steps=9,
    params=params,
    logical_axes=axes,
  )
  _, shardings = train_state.state_shardings(
    made, optimizer.transform, spec, mesh, key
  )
  step = train_step.compile_step(
    made, optimizer, mesh, shardings, spec, microbatches
  )
  params = variables()["params"]
  state = train_state.TrainState(
    step=np.int32(0),
    params=params,
    opt_state=jax.jit(optimizer.transform.init)(params),
    key=key,
    extra=state_only(variables()),
  )
  state = jax.device_put(state, shardings)
  found = []
  for seed in range(2):
    batch = put_batch(jax.device_get(clouds(seed=seed)), mesh)
    state, metrics = step(state, batch)
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
    # Mixtures have no part in it.
    parts = steps(microbatches=2, mixed_tokens=False, mixed_contrast=False)
    for (_, a, _), (_, b, _), n in zip(steps(), parts, (1, 2)):
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
