"""Point-BERT's tokenizer equals a transcription in PyTorch."""

import jax
import numpy as np
import torch
from absl.testing import absltest, parameterized
from torch import nn

from bertjax.metrics import flops
from bertjax.models import point_bert
from bertjax.models.point_bert.tokenizer import uniformity
from tests import jitted

B, N, G, M, E, V = 3, 60, 6, 8, 12, 20


class TorchPatches(nn.Module):
  """[b, g, m, 3] -> [b, g, e], in the layout of convolutions."""

  def __init__(self):
    super().__init__()
    self.point_in, self.point_norm = nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128)
    self.point_out = nn.Conv1d(128, 256, 1)
    self.patch_in, self.patch_norm = nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512)
    self.patch_out = nn.Conv1d(512, E, 1)

  def forward(self, x):
    b, g, m, _ = x.shape
    x = x.reshape(b * g, m, 3).transpose(2, 1)
    x = self.point_out(self.point_norm(self.point_in(x)).relu())
    whole = x.max(2, keepdim=True).values
    x = torch.cat([whole.expand(-1, -1, m), x], 1)
    x = self.patch_out(self.patch_norm(self.patch_in(x)).relu())
    return x.max(2).values.reshape(b, g, E)


class TorchGraph(nn.Module):
  """[b, g, c] and centres -> [b, g, out]."""

  def __init__(self, inside, out):
    super().__init__()
    self.input = nn.Conv1d(inside, 128, 1)
    widths = ((256, 256), (512, 512), (1024, 512), (1024, 1024))
    for i, (wide, narrow) in enumerate(widths):
      setattr(self, f"edge_{i}", nn.Conv2d(wide, narrow, 1, bias=False))
      setattr(self, f"edge_{i}_norm", nn.GroupNorm(4, narrow))
    self.output = nn.Conv1d(2304, out, 1, bias=False)
    self.output_norm = nn.GroupNorm(4, out)

  def forward(self, x, centres):
    index = torch.cdist(centres, centres).topk(4, largest=False).indices
    x = self.input(x.transpose(1, 2))
    kept = []
    for i in range(4):
      around = torch.stack([f[:, where] for f, where in zip(x, index)])
      middle = x[..., None].expand_as(around)
      edges = torch.cat([around - middle, middle], 1)
      edges = getattr(self, f"edge_{i}_norm")(getattr(self, f"edge_{i}")(edges))
      x = nn.functional.leaky_relu(edges, 0.2).max(-1).values
      kept.append(x)
    x = self.output_norm(self.output(torch.cat(kept, 1)))
    return nn.functional.leaky_relu(x, 0.2).transpose(1, 2)


class TorchFolding(nn.Module):
  """[b, g, e] -> coarse and fine patches."""

  def __init__(self):
    super().__init__()
    self.coarse_in, self.coarse_middle = (
      nn.Linear(E, 1024),
      nn.Linear(1024, 1024),
    )
    self.coarse_out = nn.Linear(1024, 3 * M // 4)
    self.fold_0, self.fold_norm_0 = (
      nn.Conv1d(E + 5, 512, 1),
      nn.BatchNorm1d(512),
    )
    self.fold_1, self.fold_norm_1 = nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512)
    self.fold_out = nn.Conv1d(512, 3, 1)

  def forward(self, features):
    x = features.reshape(B * G, E)
    x = self.coarse_middle(self.coarse_in(x).relu()).relu()
    coarse = self.coarse_out(x).reshape(B * G, M // 4, 3)
    anchors = coarse.repeat_interleave(4, 1).transpose(1, 2)
    side = torch.tensor([-0.05, 0.05])
    grid = torch.stack([side.repeat(2), side.repeat_interleave(2)])
    grid = grid.repeat(1, M // 4)[None].expand(B * G, -1, -1)
    whole = features.reshape(B * G, E, 1).expand(-1, -1, M)
    x = torch.cat([whole, grid, anchors], 1)
    x = self.fold_norm_0(self.fold_0(x)).relu()
    x = self.fold_norm_1(self.fold_1(x)).relu()
    fine = self.fold_out(x) + anchors
    shape = (B, G, -1, 3)
    return coarse.reshape(shape), fine.transpose(1, 2).reshape(shape)


def as_flax(module):
  """Parameters of a PyTorch module whose children have our names."""
  found = {}
  for name, child in module.named_children():
    weight = child.weight.detach().numpy()
    if isinstance(child, (nn.BatchNorm1d, nn.GroupNorm)):
      found[name] = {"scale": weight}
    else:
      found[name] = {"kernel": weight.reshape(*weight.shape[:2]).T}
    if child.bias is not None:
      found[name]["bias"] = child.bias.detach().numpy()
  return found


def averages(module):
  """Running statistics of a PyTorch module."""
  return {
    name: {
      "mean": child.running_mean.numpy().copy(),
      "var": child.running_var.numpy().copy(),
    }
    for name, child in module.named_children()
    if isinstance(child, nn.BatchNorm1d)
  }


def shaken(module):
  """Every parameter away from ones and zeros."""
  with torch.no_grad():
    for child in module.modules():
      if isinstance(child, (nn.BatchNorm1d, nn.GroupNorm)):
        child.weight.uniform_(0.5, 1.5)
        child.bias.uniform_(-0.5, 0.5)
  return module


class PartsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(B, N, 3)).astype(np.float32)
    cls.patches = jax.tree.map(np.array, jitted.group(cloud, G, M))
    cls.features = rng.normal(size=(B, G, E)).astype(np.float32)

  def compare(self, found, expected):
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-4)

  @parameterized.parameters(True, False)
  def test_patch_embedding(self, train):
    theirs = shaken(TorchPatches()).train(train)
    variables = {"params": as_flax(theirs), "batch_stats": averages(theirs)}
    mine, state = jitted.apply(
      point_bert.MiniPointNet(E),
      variables,
      self.patches.points,
      train=train,
      mutable=("batch_stats",),
    )
    self.compare(mine, theirs(torch.from_numpy(self.patches.points)))
    after = averages(theirs)
    for name, stats in state["batch_stats"].items():
      # PyTorch's variance divides by one less.
      np.testing.assert_allclose(stats["mean"], after[name]["mean"], atol=1e-5)
      np.testing.assert_allclose(stats["var"], after[name]["var"], rtol=1e-2)

  def test_what_a_set_shares_is_mapped_once(self):
    found = flops.products(
      lambda x: point_bert.MiniPointNet(E).init(
        jax.random.key(0), x, train=False
      ),
      self.patches.points,
    )
    points_ = 3 * 128 + 128 * 256 + 256 * 512 + 512 * E  # of each
    self.assertEqual(found, 2 * B * G * (M * points_ + 256 * 512))

  def test_graph(self):
    theirs = shaken(TorchGraph(E, V))
    mine = jitted.apply(
      point_bert.DGCNN(V),
      {"params": as_flax(theirs)},
      self.features,
      self.patches.centres,
    )
    self.compare(
      mine,
      theirs(
        torch.from_numpy(self.features), torch.from_numpy(self.patches.centres)
      ),
    )

  @parameterized.parameters(True, False)
  def test_folding(self, train):
    theirs = shaken(TorchFolding()).train(train)
    variables = {"params": as_flax(theirs), "batch_stats": averages(theirs)}
    mine, _ = jitted.apply(
      point_bert.Folding(M),
      variables,
      self.features,
      train=train,
      mutable=("batch_stats",),
    )
    for a, b in zip(mine, theirs(torch.from_numpy(self.features))):
      self.compare(a, b)

  def test_a_patch_that_is_no_multiple_of_four(self):
    with self.assertRaisesRegex(ValueError, "size=10: .* multiple of 4"):
      jitted.init(
        point_bert.Folding(10), jax.random.key(0), self.features, train=True
      )


class TokenizerTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(B, N, 3)).astype(np.float32)
    cls.patches = jax.tree.map(np.array, jitted.group(cloud, G, M))
    cls.model = point_bert.PointTokenizer(M, V, E)
    cls.variables = jitted.init(
      cls.model, jax.random.key(0), cls.patches, train=False
    )

  def apply(self, variables=None, **options):
    found = jitted.apply(
      self.model,
      variables or self.variables,
      self.patches,
      train=False,
      **options,
    )
    return jax.tree.map(np.array, found)

  def test_cold_mixtures_and_hard_ones_are_the_likeliest_code(self):
    cold, hard = self.apply(temperature=1e-4), self.apply(hard=True)
    self.assertEqual(cold.fine.shape, (B, G, M, 3))
    self.assertEqual(cold.coarse.shape, (B, G, M // 4, 3))
    np.testing.assert_allclose(hard.fine, cold.fine, atol=1e-4)
    soft = self.apply()
    self.assertGreater(np.abs(soft.fine - cold.fine).max(), 1e-3)
    codes = jitted.apply(
      self.model, self.variables, self.patches, method="codes"
    )
    np.testing.assert_array_equal(codes, soft.logits.argmax(-1))

  def test_hard_codes_have_the_gradient_of_soft_ones(self):
    def loss(params, patches):
      variables = {**self.variables, "params": params}
      found = self.model.apply(variables, patches, train=False, hard=True)
      return (found.fine**2).sum()

    slope = jax.device_get(
      jax.jit(jax.grad(loss))(self.variables["params"], self.patches)
    )
    self.assertGreater(np.abs(slope["embed"]["point_in"]["kernel"]).max(), 0)
    # Only codes that were chosen are decoded.
    codes = jitted.apply(
      self.model, self.variables, self.patches, method="codes"
    )
    rows = np.abs(slope["codebook"]).max(1) > 0
    self.assertEqual(set(np.flatnonzero(rows)), set(np.ravel(codes)))

  def test_noise_is_drawn_where_there_is_a_stream(self):
    noisy = [
      self.apply(rngs={"gumbel": jax.random.key(seed)}).fine for seed in (0, 1)
    ]
    self.assertGreater(np.abs(noisy[0] - noisy[1]).max(), 1e-4)

  def test_order_within_a_patch_does_not_matter(self):
    turned = self.patches._replace(points=self.patches.points[:, :, ::-1])
    logits = jitted.apply(self.model, self.variables, turned, method="logits")
    np.testing.assert_allclose(logits, self.apply().logits, atol=1e-5)

  def test_uniformity_vanishes_for_equal_use_alone(self):
    measured = jax.jit(uniformity)
    equal = np.zeros((B, G, V), np.float32)
    np.testing.assert_allclose(measured(equal), 0, atol=1e-6)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, G, V)).astype(np.float32)
    mean = torch.from_numpy(logits).softmax(-1).mean(1)
    expected = nn.functional.kl_div(
      mean.log(), torch.full((B, V), 1 / V), reduction="none"
    ).sum(-1)
    np.testing.assert_allclose(measured(logits), expected, rtol=1e-5)
    # Patches that differ but together use all codes are fine.
    each = 50 * np.eye(G, dtype=np.float32)[None]
    self.assertLess(measured(each)[0], 1e-3)


if __name__ == "__main__":
  absltest.main()
