"""Names of machines, and the devices that their compilers compile for.

v5e:4x4      one slice of 16 chips        v5p:8x8x8    512 chips
2xv5e:16x16  two slices of 256 chips      h100:8       8 GPUs of one host
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from bertjax.hardware.chips import CHIPS, Chip

_NAME = re.compile(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)")
_EXAMPLES = "v5e:4x4, v5p:4x4x4, 2xv5e:16x16 (two slices) or h100:8"


class CompilerMissing(ImportError):
  """The compiler for a chip is not installed; the message names the extra."""


@dataclasses.dataclass(frozen=True)
class Topology:
  """Identical slices of chips.

  Attributes:
    chip: of which all are.
    shape: of one slice: chips per torus dimension, or GPUs of the host.
    slices: how many.
  """

  chip: Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """What `parse` reads."""
    many = f"{self.slices}x" if self.slices > 1 else ""
    return f"{many}{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def num_devices(self) -> int:
    """Chips of all slices."""
    return self.slices * math.prod(self.shape)


def parse(name: str) -> Topology:
  """The topology of a name such as "v5e:4x4".

  Raises:
    ValueError: a name that says no such machine.
  """
  match = _NAME.fullmatch(name)
  if match is None or match[2] not in CHIPS:
    raise ValueError(
      f"topology={name!r} is unknown; write chip:shape with a chip of"
      f" {', '.join(CHIPS)}, as {_EXAMPLES}."
    )
  slices, chip = int(match[1] or 1), CHIPS[match[2]]
  shape = tuple(map(int, match[3].split("x")))
  if len(shape) != chip.dimensions or min(*shape, slices) < 1:
    raise ValueError(
      f"topology={name!r}: {chip.name} has {chip.dimensions} positive"
      f" dimension(s), as {_EXAMPLES}."
    )
  if chip.platform == "cuda" and slices > 1:
    raise ValueError(
      f"topology={name!r}: write {chip.name}:{slices * shape[0]}."
    )
  odd = [size for size in shape[:2] if size % 2]
  if chip.platform == "tpu" and odd and math.prod(shape) > 1:
    raise ValueError(
      f"topology={name!r}: TPU hosts hold 2x2 chips, so {odd[0]} must be even;"
      " only a single chip is an exception."
    )
  return Topology(chip, shape, slices)


def require_compiler(chip: Chip) -> None:
  """Refuses to go on without the chip's compiler.

  Raises:
    CompilerMissing: it is not installed.
  """
  modules, extra = {
    "tpu": (("libtpu",), "tpu"),
    "cuda": (("jax_cuda13_plugin", "jax_plugins.xla_cuda13"), "gpu-compiler"),
  }[chip.platform]
  for module in modules:
    if not _installed(module):
      raise CompilerMissing(
        f"Compiling for {chip.name} needs {module}, which is not installed;"
        f" pip install 'bertjax[{extra}]' (no {chip.name} is needed)."
      )


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # its parent is missing
    return False


def devices(topology: Topology) -> Sequence[Any]:
  """Devices to compile for, not to run on; for a mesh and shardings.

  Loads the compiler into this process, so call it where `compile_for` does, or
  with the platform of JAX itself pinned to the CPU.

  Raises:
    CompilerMissing: it is not installed.
  """
  require_compiler(topology.chip)
  if topology.chip.platform == "cuda":
    from bertjax.hardware import gpu

    return gpu.devices(topology.shape[0])
  return _tpu_devices(topology)


def _tpu_devices(topology: Topology) -> Sequence[Any]:
  # libtpu asks the cloud what machine this is, unless it is told.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  # It locks the machine against a second process; nothing is shared here.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  shape = topology.shape + (1,) * (3 - len(topology.shape))
  options: dict[str, Any] = {
    "chips_per_host_bounds": [min(2, shape[0]), min(2, shape[1]), 1],
  }
  if topology.chip.cores > 1:
    options["chip_config_name"] = "megacore"  # one device per chip
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
  return topologies.get_topology_desc(
    platform="tpu", topology_name=name, **options
  ).devices
