"""Farthest point sampling and grouping on this CPU, against PyTorch.

  python -m benchmarks.points [--json FILE]

32 clouds of 1,024 points in 64 patches of 32, and the gradient of the Chamfer
distance of 2,048 points, each as one would write it in PyTorch without kernels.
"""

import argparse
import json
import statistics

import jax
import numpy as np

from benchmarks import output
from benchmarks.bert_base import Call, alternate
from benchmarks.history import cores
from bertjax import points

_CLOUDS, _POINTS, _PATCHES, _SIZE, _CHAMFER = 32, 1024, 64, 32, 2048


def _ours(cloud: np.ndarray, other: np.ndarray) -> tuple[Call, Call]:
  grouped = jax.jit(lambda x: points.group(x, _PATCHES, _SIZE))
  slope = jax.jit(jax.grad(lambda a, b: points.chamfer(a, b).l1.sum()))
  large = cloud[:4, : _CHAMFER // 2].repeat(2, 1) + other
  return (
    lambda: jax.block_until_ready(grouped(cloud)),
    lambda: jax.block_until_ready(slope(large, other)),
  )


def _theirs(
  cloud: np.ndarray, other: np.ndarray, threads: int
) -> tuple[Call, Call]:
  import torch

  torch.set_num_threads(threads)
  xyz, second = torch.from_numpy(cloud), torch.from_numpy(other)

  @torch.no_grad()
  def group():
    batch = torch.arange(_CLOUDS)
    far = torch.zeros(_CLOUDS, dtype=torch.long)
    distance = torch.full((_CLOUDS, _POINTS), torch.inf)
    chosen = torch.zeros(_CLOUDS, _PATCHES, dtype=torch.long)
    for i in range(_PATCHES):
      chosen[:, i] = far
      centre = xyz[batch, far][:, None]
      distance = torch.minimum(distance, ((xyz - centre) ** 2).sum(-1))
      far = distance.argmax(-1)
    centres = xyz[batch[:, None], chosen]
    near = torch.cdist(centres, xyz).topk(_SIZE, largest=False).indices
    return xyz[batch[:, None, None], near] - centres[:, :, None]

  large = torch.from_numpy(
    cloud[:4, : _CHAMFER // 2].repeat(2, 1) + other
  ).requires_grad_()

  def chamfer():
    large.grad = None
    table = torch.cdist(large, second)
    (table.amin(2).mean(1) + table.amin(1).mean(1)).sum().backward()

  return group, chamfer


def measure(rounds: int = 10) -> dict[str, float]:
  """Of the rounds' ratios of PyTorch's time to ours: median and ends.

  And the threads that PyTorch has: all cores, as XLA.
  """
  rng = np.random.default_rng(0)
  cloud = rng.normal(size=(_CLOUDS, _POINTS, 3)).astype(np.float32)
  other = rng.normal(size=(4, _CHAMFER, 3)).astype(np.float32)
  found: dict[str, float] = {"threads": cores()}
  for name, mine, theirs in zip(
    ("group", "chamfer"), _ours(cloud, other), _theirs(cloud, other, cores())
  ):
    a, b = alternate(mine, theirs, rounds)
    ratios = [y / x for x, y in zip(a, b)]
    found[f"{name} ratio"] = statistics.median(ratios)
    found[f"{name} least"], found[f"{name} most"] = min(ratios), max(ratios)
    print(
      f"{name:8s} bertjax {statistics.median(a) * 1e3:7.1f} ms  pytorch"
      f" {statistics.median(b) * 1e3:7.1f} ms"
      f"  ratio {found[f'{name} ratio']:.2f}"
      f" ({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)"
    )
  return found


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.points")
  parser.add_argument("--json", type=output.path, help="file for the ratios")
  options = parser.parse_args()
  found = measure()
  if options.json:
    options.json.write_text(json.dumps(found))


if __name__ == "__main__":
  main()
