"""What a topology is made of where it is rented: hosts, types, labels.

  machine = machine_of(topologies.parse("v5e:4x4"))
  machine.hosts, machine.chips_per_host, machine.accelerator_type
  (4, 4, "v5litepod-16")

Names are those of Cloud TPU (queued resources), of GKE's node labels and of
Compute Engine; see cloud.google.com/tpu/docs and xpk's table of systems.
"""

import dataclasses
import math

from bertjax.hardware.topologies import Topology


@dataclasses.dataclass(frozen=True)
class _Family:
  """How one kind of chip is rented.

  Attributes:
    chips_per_host: of slices of several hosts.
    gke_accelerator: value of GKE's accelerator label.
    machine_types: Compute Engine's, by chips of a host.
    tpu_type: of Cloud TPU; an accelerator type is this and a number.
    counts_cores: whether that number counts TensorCores, two a chip.
    runtime_version: image of a TPU VM.
  """

  chips_per_host: int
  gke_accelerator: str
  machine_types: dict[int, str]
  tpu_type: str = ""
  counts_cores: bool = False
  runtime_version: str = ""


_FAMILIES = {
  "v4": _Family(
    4,
    "tpu-v4-podslice",
    {4: "ct4p-hightpu-4t"},
    tpu_type="v4",
    counts_cores=True,
    runtime_version="tpu-ubuntu2204-base",
  ),
  "v5e": _Family(
    4,
    "tpu-v5-lite-podslice",
    {1: "ct5lp-hightpu-1t", 4: "ct5lp-hightpu-4t", 8: "ct5lp-hightpu-8t"},
    tpu_type="v5litepod",
    runtime_version="v2-alpha-tpuv5-lite",
  ),
  "v5p": _Family(
    4,
    "tpu-v5p-slice",
    {4: "ct5p-hightpu-4t"},
    tpu_type="v5p",
    counts_cores=True,
    runtime_version="v2-alpha-tpuv5",
  ),
  "v6e": _Family(
    4,
    "tpu-v6e-slice",
    {1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"},
    tpu_type="v6e",
    runtime_version="v2-alpha-tpuv6e",
  ),
  "h100": _Family(8, "nvidia-h100-80gb", {8: "a3-highgpu-8g"}),
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """The hosts of a topology.

  Attributes:
    slices: groups of hosts that a fast network joins; of GPUs, one.
    hosts: of one slice.
    chips_per_host: accelerators that a host, and its one process, has.
    shape: of a slice, as "4x4".
    machine_type: of Compute Engine.
    gke_accelerator: value of GKE's accelerator label.
    tpu_type: of Cloud TPU; "" for GPUs, and so what follows.
    accelerator_type: of Cloud TPU, as "v5litepod-16".
    runtime_version: image of the TPU VMs.
  """

  slices: int
  hosts: int
  chips_per_host: int
  shape: str
  machine_type: str
  gke_accelerator: str
  tpu_type: str = ""
  accelerator_type: str = ""
  runtime_version: str = ""

  @property
  def on_tpu(self) -> bool:
    return bool(self.tpu_type)

  @property
  def num_hosts(self) -> int:
    """Of all slices: the processes of a run."""
    return self.slices * self.hosts


def machine_of(topology: Topology) -> Machine:
  """The hosts that make up a topology, whole ones.

  Raises:
    ValueError: nobody rents it, or not in whole hosts.
  """
  family = _FAMILIES[topology.chip.name]
  chips = math.prod(topology.shape)
  alone = chips in family.machine_types
  per_host = chips if alone else family.chips_per_host
  if chips % per_host or per_host not in family.machine_types:
    raise ValueError(
      f"topology={topology.name!r}: {topology.chip.name} comes in hosts of"
      f" {', '.join(map(str, family.machine_types))} chips, several hosts of"
      f" {family.chips_per_host} each; use a multiple."
    )
  number = chips * (2 if family.counts_cores else 1)
  tpu = family.tpu_type
  return Machine(
    slices=topology.slices,
    hosts=chips // per_host,
    chips_per_host=per_host,
    shape="x".join(map(str, topology.shape)),
    machine_type=family.machine_types[per_host],
    gke_accelerator=family.gke_accelerator,
    tpu_type=tpu,
    accelerator_type=f"{tpu}-{number}" if tpu else "",
    runtime_version=family.runtime_version,
  )
