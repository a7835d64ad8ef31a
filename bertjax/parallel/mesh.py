"""The device mesh: one helper, four named axes."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "model", "seq")


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  model: int = 1,
  seq: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over `devices` (all of them by default) with Auto axes.

  Args:
    data: shards of the batch with replicated parameters.
    fsdp: shards of the batch that also shard the parameters.
    model: shards of heads, feed-forward width and vocabulary.
    seq: shards of the sequence length.
    devices: what to lay out. One axis may be -1: whatever is left.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(zip(AXES, (data, fsdp, model, seq)))
  written = ", ".join(f"{k}={v}" for k, v in sizes.items())
  free = [k for k, v in sizes.items() if v == -1]
  if len(free) > 1 or any(v < 1 and v != -1 for v in sizes.values()):
    raise ValueError(
      f"mesh: {written}; sizes are positive and at most one may be -1."
    )
  fixed = math.prod(v for v in sizes.values() if v != -1)
  if free:
    sizes[free[0]] = max(1, len(devices) // fixed)
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f"mesh: {written} does not divide {len(devices)} devices; the sizes"
      f" must multiply to {len(devices)} (or leave one at -1 and make the"
      f" others divide {len(devices)})."
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices,
  )
