"""Farthest point sampling on a TPU v5e, on paper: the kernel and XLA's loop.

  python -m benchmarks.farthest_points [--json FILE]

Sizes are those of a chip of v5e:2x2 with Point-BERT's batches. Cycles are the
compiler's, as `bertjax.hardware` reads them: no latency, no stalls.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import output
from bertjax import cli
from bertjax.hardware import compile_for, price
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import batch_sharding
from bertjax.points import farthest_point_sampling
from kernels import farthest_points

# Clouds, points, and how many of them are chosen.
SIZES = {
  "tokenizer": (16, 1024, 64),
  "pre-training": (32, 1024, 64),
  "segmentation": (4, 2048, 512),
}


def sampled(
  devices: Sequence[Any], *, clouds: int, points: int, count: int, kernel=True
) -> jax.stages.Lowered:
  """Farthest points of a batch that is split over all devices."""
  mesh = make_mesh(devices=devices)
  x = jax.ShapeDtypeStruct(
    (clouds, points, 3), jnp.float32, sharding=batch_sharding(mesh, 3)
  )
  fits = farthest_points.fits if kernel else lambda n: False
  with (
    jax.set_mesh(mesh),
    mock.patch.object(farthest_points, "fits", fits),
  ):
    return jax.jit(lambda x: farthest_point_sampling(x, count)).lower(x)


def measure() -> dict[str, dict[str, float]]:
  """Cycles of either by the name of a size."""
  found = {}
  for name, (clouds, points, count) in SIZES.items():
    sizes = dict(clouds=clouds, points=points, count=count)
    found[name] = {
      way: price(compile_for("v5e:1x1", sampled, kernel=kernel, **sizes)).cycles
      for way, kernel in (("kernel", True), ("loop", False))
    }
  return found


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.farthest_points")
  parser.add_argument("--json", type=output.path, help="file for all figures")
  options = parser.parse_args()
  with cli.clear_errors():
    found = measure()
  for name, cycles in found.items():
    ratio = cycles["loop"] / cycles["kernel"]
    print(
      f"{name:13} {SIZES[name]}: kernel {cycles['kernel']:,.0f} cycles, loop"
      f" {cycles['loop']:,.0f} ({ratio:.0f}x)"
    )
  if options.json:
    options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
