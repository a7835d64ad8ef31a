"""Point-BERT's networks in PyTorch, under the names of its checkpoints."""

import jax
import numpy as np
import torch
from torch import nn

from bertjax.interop import names, point_bert


class TorchPatches(nn.Module):
  """[b, g, m, 3] -> [b, g, e]."""

  def __init__(self, width):
    super().__init__()
    self.first_conv = nn.Sequential(
      nn.Conv1d(3, 128, 1),
      nn.BatchNorm1d(128),
      nn.ReLU(),
      nn.Conv1d(128, 256, 1),
    )
    self.second_conv = nn.Sequential(
      nn.Conv1d(512, 512, 1),
      nn.BatchNorm1d(512),
      nn.ReLU(),
      nn.Conv1d(512, width, 1),
    )

  def forward(self, x):
    b, g, m, _ = x.shape
    x = self.first_conv(x.reshape(b * g, m, 3).transpose(1, 2))
    whole = x.amax(2, keepdim=True).expand_as(x)
    x = self.second_conv(torch.cat([whole, x], 1))
    return x.amax(2).reshape(b, g, -1)


class TorchAttention(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width, bias=False)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    b, t, e = x.shape
    q, k, v = (
      part.reshape(b, t, self.heads, -1).transpose(1, 2)
      for part in self.qkv(x).split(e, -1)
    )
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.proj(mixed.transpose(1, 2).reshape(b, t, e))


class TorchFeedForward(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.fc1 = nn.Linear(width, 4 * width)
    self.fc2 = nn.Linear(4 * width, width)

  def forward(self, x):
    return self.fc2(nn.functional.gelu(self.fc1(x)))


class TorchBlock(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attn = TorchAttention(width, heads)
    self.mlp = TorchFeedForward(width)

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class TorchBlocks(nn.Module):
  def __init__(self, layers, width, heads):
    super().__init__()
    self.blocks = nn.ModuleList(TorchBlock(width, heads) for _ in range(layers))


class TorchTrunk(nn.Module):
  """Patches and centres -> states of all blocks, unnormed.

  Args:
    layers: depth.
    width: of the model.
    heads: of attention.
    features: width of a patch's vector.
    mask: whether there is a mask vector.
  """

  def __init__(self, layers, width, heads, features, mask=False):
    super().__init__()
    self.encoder = TorchPatches(features)
    self.reduce_dim = nn.Linear(features, width)
    self.cls_token = nn.Parameter(torch.randn(1, 1, width))
    self.cls_pos = nn.Parameter(torch.randn(1, 1, width))
    if mask:
      self.mask_token = nn.Parameter(torch.randn(1, 1, width))
    self.pos_embed = nn.Sequential(
      nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width)
    )
    self.blocks = TorchBlocks(layers, width, heads)
    self.norm = nn.LayerNorm(width)

  def states(self, patches, centres, masked=None):
    x = self.reduce_dim(self.encoder(patches))
    if masked is not None:
      x = torch.where(masked[..., None], self.mask_token, x)
    b = len(x)
    x = torch.cat([self.cls_token.expand(b, -1, -1), x], 1)
    position = torch.cat(
      [self.cls_pos.expand(b, -1, -1), self.pos_embed(centres)], 1
    )
    found = []
    for block in self.blocks.blocks:
      x = block(x + position)
      found.append(x)
    return found


def shaken(module):
  """Every norm away from ones and zeros, running averages too."""
  with torch.no_grad():
    for child in module.modules():
      if isinstance(child, (nn.BatchNorm1d, nn.GroupNorm, nn.LayerNorm)):
        child.weight.uniform_(0.5, 1.5)
        child.bias.uniform_(-0.5, 0.5)
      if isinstance(child, nn.BatchNorm1d):
        child.running_mean.uniform_(-0.5, 0.5)
        child.running_var.uniform_(0.5, 1.5)
  return module


def state_of(module):
  """State dict as numpy arrays."""
  return {k: v.detach().numpy().copy() for k, v in module.state_dict().items()}


def shapes_of(variables):
  """Of parameters and averages by name, layers apart."""
  shapes = {}
  for tree in (variables["params"], variables.get("batch_stats", {})):
    for name, leaf in names.flatten(tree).items():
      if name.startswith("encoder/layers/"):
        for i in range(leaf.shape[0]):
          apart = name.replace("layers/", f"layers_{i}/", 1)
          shapes[apart] = tuple(leaf.shape[1:])
      else:
        shapes[name] = tuple(leaf.shape)
  return shapes


def loaded(state, table, variables, num_layers=0):
  """Our variables from a state dict; `variables` only for their shapes."""
  found = point_bert.to_ours(
    point_bert.plain(state), table, shapes_of(variables), num_layers=num_layers
  )
  return jax.tree.map(np.asarray, found)
