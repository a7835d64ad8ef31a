"""The device mesh: one helper, four named axes."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
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
    devices: what to lay out. One axis may be -1: whatever is left. Slices of
      TPUs, between which the network is slow, part "data", or else "fsdp".

  Raises:
    ValueError: the axes do not multiply to the number of devices, or the slices
      divide neither data nor fsdp.
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
  shape, axis_types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1:
    laid = _over_slices(sizes, slices, devices)
    return Mesh(laid, AXES, axis_types=axis_types)
  try:
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
  except NotImplementedError:  # fsdp=4 is no product of sides of an 8 x 8 torus
    laid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
    return Mesh(laid, AXES, axis_types=axis_types)


def sliced_axis(sizes: Mapping[str, int], slices: int) -> str:
  """The axis whose outermost steps are slices of TPUs.

  Raises:
    ValueError: the slices divide neither data nor fsdp.
  """
  for name in ("data", "fsdp"):
    if sizes[name] % slices == 0:
      return name
  raise ValueError(
    f"mesh: data={sizes['data']}, fsdp={sizes['fsdp']}: the {slices} slices"
    " of TPUs must divide one of them, for the network between slices is too"
    " slow for the other axes."
  )


def _over_slices(
  sizes: Mapping[str, int], slices: int, devices: Sequence[jax.Device]
) -> np.ndarray:
  """The devices of several slices; the outermost steps of an axis are slices.

  `jax.make_mesh` refuses them.
  """
  parted = sliced_axis(sizes, slices)
  across = {name: slices if name == parted else 1 for name in sizes}
  return mesh_utils.create_hybrid_device_mesh(
    [sizes[name] // across[name] for name in sizes],
    list(across.values()),
    devices,
    allow_split_physical_axes=True,
  )
