"""Point-BERT's heads equal transcriptions in PyTorch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl.testing import absltest, parameterized
from flax import linen as nn

from bertjax import points
from bertjax.interop import point_bert as point_names
from bertjax.models import MODELS
from bertjax.objectives import OBJECTIVES
from bertjax.objectives.part_segmentation import Segmenter
from bertjax.objectives.point_classification import CloudHead, smoothed
from bertjax.objectives.step import clock
from tests import jitted
from tests.models import torch_point_bert as theirs

B, N, G, M, E, H, F, L = 3, 40, 7, 5, 24, 4, 10, 3
LEVELS = (20, 11)
PARTS = ((0, 1, 2), (3, 4))


def trunk(**options):
  # "flash" traces the kernels of all platforms.
  sizes = dict(
    num_layers=L, emb_dim=E, num_heads=H, patch_features=F, attend="reference"
  )
  return MODELS["point_bert"](patches=G, patch_size=M, **sizes | options)


def classifier(**options):
  return OBJECTIVES["point_classification"](
    encoder=trunk(), num_classes=6, **options
  )


def segmenter(**options):
  options = dict(class_parts=PARTS, levels=LEVELS) | options
  return OBJECTIVES["part_segmentation"](encoder=trunk(), **options)


def clouds():
  rng = np.random.default_rng(0)
  rows = {
    "points": rng.normal(size=(B, N, 3)).astype(np.float32),
    "labels": np.array([2, -1, 5], np.int32),
    "category": np.array([1, 0, 0], np.int32),
    "parts": rng.integers(-1, 5, (B, N), np.int32),
  }
  return jax.device_put(rows)


class TorchClassifier(theirs.TorchTrunk):
  def __init__(self):
    super().__init__(L, E, H, F)
    self.cls_head_finetune = torch.nn.Sequential(
      torch.nn.Linear(2 * E, 256),
      torch.nn.ReLU(),
      torch.nn.Dropout(0.5),
      torch.nn.Linear(256, 6),
    )

  def forward(self, patches, centres):
    x = self.norm(self.states(patches, centres)[-1])
    return self.cls_head_finetune(torch.cat([x[:, 0], x[:, 1:].amax(1)], 1))


class TorchCarry(torch.nn.Module):
  def __init__(self, width):
    super().__init__()
    widths = (width, 4 * E, E)
    self.mlp_convs = torch.nn.ModuleList(
      torch.nn.Conv1d(*pair, 1) for pair in itertools.pairwise(widths)
    )
    self.mlp_bns = torch.nn.ModuleList(
      torch.nn.BatchNorm1d(n) for n in widths[1:]
    )

  def forward(self, targets, own, centres, features):
    near = torch.cdist(targets, centres).square().topk(3, largest=False)
    weights = 1 / (near.values + 1e-8)
    weights = weights / weights.sum(-1, keepdim=True)
    found = torch.stack([f[i] for f, i in zip(features, near.indices)])
    carried = (found * weights[..., None]).sum(2)
    x = torch.cat([own, carried], -1).transpose(1, 2)
    for conv, norm in zip(self.mlp_convs, self.mlp_bns):
      x = norm(conv(x)).relu()
    return x.transpose(1, 2)


class TorchRefine(torch.nn.Module):
  def __init__(self):
    super().__init__()
    for i, (wide, narrow) in enumerate(((2 * E, 32), (64, E)), 1):
      layer = torch.nn.Sequential(
        torch.nn.Conv2d(wide, narrow, 1, bias=False),
        torch.nn.GroupNorm(4, narrow),
        torch.nn.LeakyReLU(0.2),
      )
      setattr(self, f"layer{i}", layer)

  def around(self, targets, own, centres, features):
    index = torch.cdist(targets, centres).topk(4, largest=False).indices
    found = torch.stack([f[i] for f, i in zip(features, index)])
    own = own[:, :, None].expand_as(found)
    return torch.cat([found - own, own], -1).permute(0, 3, 1, 2)

  def forward(self, targets, own, centres, features):
    x = self.layer1(self.around(targets, own, centres, features))
    x = x.amax(-1).transpose(1, 2)
    x = self.layer2(self.around(targets, x, targets, x))
    return x.amax(-1).transpose(1, 2)


class TorchSegmenter(theirs.TorchTrunk):
  def __init__(self):
    super().__init__(L, E, H, F)
    self.propagation_2, self.propagation_1 = (
      TorchCarry(E + 3),
      TorchCarry(E + 3),
    )
    self.propagation_0 = TorchCarry(E + 3 + 2)
    self.dgcnn_pro_1, self.dgcnn_pro_2 = TorchRefine(), TorchRefine()
    self.conv1 = torch.nn.Conv1d(E, 128, 1)
    self.bn1 = torch.nn.BatchNorm1d(128)
    self.conv2 = torch.nn.Conv1d(128, 5, 1)

  def forward(self, cloud, category, patches, centres, fine, coarse):
    low, middle, high = (
      self.norm(x)[:, 1:] for x in self.states(patches, centres)
    )
    at_coarse = self.propagation_2(coarse, coarse, centres, middle)
    at_fine = self.propagation_1(fine, fine, centres, low)
    at_coarse = self.dgcnn_pro_2(coarse, at_coarse, centres, high)
    at_fine = self.dgcnn_pro_1(fine, at_fine, coarse, at_coarse)
    kind = torch.nn.functional.one_hot(category.long(), 2).float()
    own = torch.cat([kind[:, None].expand(-1, N, -1), cloud], -1)
    x = self.propagation_0(cloud, own, fine, at_fine).transpose(1, 2)
    x = self.bn1(self.conv1(x)).relu()
    return self.conv2(x).transpose(1, 2)


def shapes(objective, batch):
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  return jax.eval_shape(
    lambda b: nn.meta.unbox(objective.init(rngs, b, train=False)), batch
  )


@functools.partial(jax.jit, static_argnums=1)
def sampled(cloud, skip):
  """The points of both levels."""
  sample = functools.partial(
    points.farthest_point_sampling, skip_near_origin=skip
  )
  return [points.gather(cloud, sample(cloud, count)) for count in LEVELS]


@functools.cache
def pair(name):
  """Our objective, its variables, and PyTorch's model with the same ones."""
  torch.manual_seed(0)
  objective = {"classifier": classifier, "segmenter": segmenter}[name]()
  module = {"classifier": TorchClassifier, "segmenter": TorchSegmenter}[name]()
  module = theirs.shaken(module).eval()
  table = point_names.KINDS[name].table
  found = theirs.loaded(
    theirs.state_of(module), table, shapes(objective, clouds()), L
  )
  return objective, found, module


class HeadsTest(parameterized.TestCase):
  def patches(self, cloud=None, **options):
    cloud = clouds()["points"] if cloud is None else cloud
    patches = jitted.group(cloud, G, M, **options)
    return [torch.from_numpy(np.array(x)) for x in patches[:2]]

  def test_classes(self):
    objective, variables, module = pair("classifier")
    found = jitted.apply(objective, variables, clouds(), method="logits")
    with torch.no_grad():
      expected = module(*self.patches())
    np.testing.assert_allclose(found, expected, atol=1e-5)

  @parameterized.parameters(False, True)
  def test_parts(self, skip):
    objective, variables, module = pair("segmenter")
    objective = objective.clone(
      encoder=objective.encoder.clone(skip_near_origin=skip)
    )
    batch = clouds()
    # One of these is far from all others: the levels have it, or skip it.
    near = (np.arange(N) % 9 == 4)[None, :, None]
    cloud = np.array(batch["points"])
    cloud = np.where(near, 0.001 * cloud + 0.01, cloud + np.sign(cloud))
    batch["points"] = jax.device_put(cloud)
    found = jitted.apply(objective, variables, batch, method="logits")
    levels = [np.array(x) for x in sampled(cloud, skip)]
    inside = [bool(((x**2).sum(-1) <= 1e-3).any(1).all()) for x in levels]
    self.assertEqual(inside, [not skip] * 2)
    with torch.no_grad():
      expected = module(
        torch.from_numpy(cloud),
        torch.from_numpy(np.array(batch["category"])),
        *self.patches(cloud, skip_near_origin=skip),
        *map(torch.from_numpy, levels),
      )
    # Points of a cloud differ by some 1e-2, float32 sums by some 1e-7.
    np.testing.assert_allclose(found, expected, atol=1e-5)

  @parameterized.parameters("classifier", "segmenter")
  def test_heads_drop_half_before_their_last_map(self, name):
    """Which is linear, so that what is left out is right on the average."""
    batch, rng = clouds(), np.random.default_rng(0)
    if name == "classifier":
      head = CloudHead(6)
      inputs = (rng.normal(size=(B, G + 1, E)).astype(np.float32),)
    else:
      head = Segmenter(5, 2, LEVELS, E)
      centres, *states = rng.normal(size=(4, B, G, E)).astype(np.float32)
      inputs = batch["points"], batch["category"], centres[..., :3], *states
    inputs = jax.device_put(inputs)

    @jax.jit
    def views(keys):
      variables = jitted.init(head, keys[0], *inputs, train=False)

      def said(head, key):
        options = dict(train=True, rngs={"dropout": key}, mutable="batch_stats")
        return head.apply(variables, *inputs, **options)[0]

      whole = said(head.clone(dropout_rate=0.0), keys[0])
      return jax.vmap(functools.partial(said, head))(keys), whole

    found, whole = map(
      np.array, views(jax.random.split(jax.random.key(1), 400))
    )
    deviation = found.std(0)
    self.assertGreater(deviation.min(), 0)
    gaps = np.abs(found.mean(0) - whole) / (deviation / 20)
    self.assertLess(gaps.max(), 5)  # standard errors, of 600 numbers at most

  @parameterized.parameters("classifier", "segmenter")
  def test_released_tensors_are_made_again(self, name):
    _, variables, module = pair(name)
    table = point_names.KINDS[name].table
    found = point_names.to_theirs(variables, table, num_layers=L)
    expected = {
      k: x
      for k, x in theirs.state_of(module).items()
      if not k.endswith("num_batches_tracked")
    }
    self.assertEqual(set(found), set(expected))
    for key, x in expected.items():
      self.assertEqual(found[key].shape, x.shape, key)
      np.testing.assert_array_equal(found[key], x)

  def test_losses_leave_out_what_has_no_label(self):
    batch = clouds()
    for name, labels in (("classifier", "labels"), ("segmenter", "parts")):
      objective, variables, _ = pair(name)
      sums, metrics = jitted.apply(objective, variables, batch, train=False)
      logits = np.array(
        jitted.apply(objective, variables, batch, method="logits")
      )
      batch_labels = np.array(batch[labels])
      known = torch.from_numpy(batch_labels).long()
      expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).reshape(-1, logits.shape[-1]),
        known.reshape(-1),
        ignore_index=-1,
        reduction="sum",
      )
      (term,) = sums
      np.testing.assert_allclose(sums[term], expected, rtol=1e-4)
      weight = objective.weights(batch)[term]
      self.assertEqual(weight, (batch_labels >= 0).sum())
      right = (logits.argmax(-1) == batch_labels).sum()
      self.assertEqual(metrics["accuracy"][0], right)

  @parameterized.parameters("classifier", "segmenter")
  def test_gradients_are_finite_whatever_the_compiler_repeats(self, name):
    objective, variables, _ = pair(name)
    for seed in range(2):

      def loss(params, objective=objective, seed=seed):
        (sums, _), _ = objective.apply(
          {**variables, "params": params},
          clouds(),
          train=True,
          rngs={"dropout": jax.random.key(seed)},
          mutable=["batch_stats"],
        )
        return sum(sums.values())

      slopes = jax.jit(jax.grad(loss))(variables["params"])
      for leaf in jax.tree.leaves(slopes):
        self.assertTrue(np.isfinite(np.array(leaf)).all())
      objective = objective.clone(dropout_rate=0.0)

  def test_averages_take_in_less_of_later_batches(self):
    momentum = dict(start=0.2, factor=0.5, every=10, floor=0.02)
    objective, variables, _ = pair("segmenter")
    scheduled = segmenter(batch_norm_momentum=momentum)

    def moved(objective, variables, clock):
      (_, metrics), extra = objective.apply(
        {**variables, **clock},
        clouds(),
        train=True,
        rngs={"dropout": jax.random.key(0)},
        mutable=["batch_stats"],
      )
      return metrics, jax.tree.map(
        jnp.subtract, extra["batch_stats"], variables["batch_stats"]
      )

    @jax.jit
    def moves(variables, step):
      metrics, change = moved(scheduled, variables, clock(step))
      # A tenth of the way to the batch; the same program is compiled once.
      _, plain = moved(objective, variables, {})
      return change, metrics["batch_norm_share"][0], plain

    for step, share in ((0, 0.2), (9, 0.2), (10, 0.1), (29, 0.05), (90, 0.02)):
      change, told, plain = jax.device_get(moves(variables, np.int32(step)))
      self.assertLen(jax.tree.leaves(plain), 2 * (2 + 3 * 2 + 1))
      self.assertAlmostEqual(float(told), share, places=6)
      for a, b in zip(jax.tree.leaves(change), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b * share / 0.1, atol=2e-5)
    # Outside training there is no clock and no schedule.
    _, metrics = jax.eval_shape(
      lambda v: scheduled.apply(v, clouds(), train=False), variables
    )
    self.assertNotIn("batch_norm_share", metrics)

  def test_smoothing_leaves_the_label_its_part(self):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 5)).astype(np.float32)
    labels = np.array([0, 3, -1, 4])
    log_probs = torch.from_numpy(logits).log_softmax(-1).numpy()
    expected = 0.0
    for row, label in enumerate(labels):
      if label >= 0:
        targets = np.full(5, 0.2 / 4)
        targets[label] = 0.8
        expected -= (targets * log_probs[row]).sum()
    np.testing.assert_allclose(
      jax.jit(functools.partial(smoothed, share=0.2))(logits, labels),
      expected,
      rtol=1e-5,
    )
    # It is for training alone.
    objective, variables, _ = pair("classifier")
    smooth = objective.clone(smoothing=0.2)
    plain, _ = jitted.apply(objective, variables, clouds(), train=False)
    same, _ = jitted.apply(smooth, variables, clouds(), train=False)
    self.assertEqual(plain["classification"], same["classification"])

    @jax.jit
    def losses(variables):
      return [
        o.apply(
          variables,
          clouds(),
          train=True,
          rngs={"dropout": jax.random.key(0)},
          mutable=["batch_stats"],
        )[0][0]["classification"]
        for o in (objective, smooth)
      ]

    self.assertNotAlmostEqual(*map(float, losses(variables)), places=3)

  def test_published_sizes(self):
    batch = {
      "points": np.zeros((2, 2048, 3), np.float32),
      "labels": np.zeros(2, np.int32),
      "category": np.zeros(2, np.int32),
      "parts": np.zeros((2, 2048), np.int32),
    }

    def count(objective):
      params = shapes(objective, batch)["params"]
      return sum(x.size for x in jax.tree.leaves(params))

    classes = OBJECTIVES["point_classification"](
      encoder=MODELS["point_bert"](attend="reference"), num_classes=40
    )
    self.assertEqual(count(classes), 22_065_960)
    parts = OBJECTIVES["part_segmentation"](
      encoder=MODELS["point_bert"](patches=128, attend="reference"),
      class_parts=np.arange(50).reshape(10, 5).tolist() + [[]] * 6,
    )
    carried = 2 * (387 * 1536 + 1536 * 384 + 3 * (1536 + 384))
    carried += 403 * 1536 + 1536 * 384 + 3 * (1536 + 384)
    refined = 2 * (768 * 512 + 1024 * 384 + 2 * (512 + 384))
    head = 384 * 128 + 3 * 128 + 128 * 50 + 50
    self.assertEqual(
      count(parts), 22_065_960 - 207_144 + carried + refined + head
    )
    self.assertEqual(parts.blocks, (4, 8, 12))

  @parameterized.named_parameters(
    ("classes", classifier, dict(smoothing=1.0), r"smoothing=1.0 must lie in"),
    (
      "labels",
      classifier,
      dict(labels=("a", "b")),
      "num_classes=6 differs from",
    ),
    (
      "parts",
      segmenter,
      dict(class_parts=((), ())),
      r"class_parts=\(\(\), \(\)\) must hold",
    ),
    (
      "blocks",
      segmenter,
      dict(blocks=(1, 2, 4)),
      r"blocks=\(1, 2, 4\) .* 1 to 3",
    ),
    ("levels", segmenter, dict(levels=(8, 9)), r"levels=\(8, 9\) must be"),
    (
      "names",
      segmenter,
      dict(labels=("a",)),
      r"labels=\('a',\) must name the 2",
    ),
    (
      "momentum",
      segmenter,
      dict(batch_norm_momentum=dict(start=0.1, factor=0.5, every=0, floor=0.1)),
      r"batch_norm_momentum=.*every >= 1",
    ),
  )
  def test_bad_options_are_named(self, build, options, message):
    with self.assertRaisesRegex(ValueError, message):
      build(**options)


if __name__ == "__main__":
  absltest.main()
