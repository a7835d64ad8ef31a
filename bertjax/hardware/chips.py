"""What the vendors publish about accelerators, and what follows from it."""

import dataclasses
import functools


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator chip; a JAX device of ours is always a whole chip.

  Attributes:
    name: as in topology names.
    device_kinds: beginnings of `jax.Device.device_kind`.
    platform: of `jax.experimental.topologies`: "tpu" or "cuda".
    dimensions: of the torus that the chips of a slice form; 1: one host's.
    clock: cycles per second.
    hbm_bandwidth: bytes per second.
    hbm_bytes: capacity.
    vmem_bytes: on-chip memory that a TPU kernel addresses, per core; for a GPU
      the shared memory that one block may take.
    peak_flops: dense bfloat16 FLOP/s.
    ring_bandwidth: bytes per second that a chip sends around a ring of
      neighbours, both directions together.
    network_bandwidth: bytes per second that a chip sends to another slice; 0:
      not published.
    cores: that share the work of a device.
    matmul_cycles: for which one matrix instruction on a full register of
      packed operands occupies a matrix unit; 0: unknown.
  """

  name: str
  device_kinds: tuple[str, ...]
  platform: str
  dimensions: int
  clock: float
  hbm_bandwidth: float
  hbm_bytes: float
  vmem_bytes: int
  peak_flops: float
  ring_bandwidth: float
  network_bandwidth: float = 0
  cores: int = 1
  matmul_cycles: int = 0

  @property
  def hbm_bytes_per_cycle(self) -> float:
    """What HBM delivers while one instruction bundle issues."""
    return self.hbm_bandwidth / self.clock

  @property
  def flops_per_cycle(self) -> float:
    """bfloat16 FLOP that the matrix units of all cores do in a cycle."""
    return self.peak_flops / self.clock


_MIB = 2**20
_GIB = 2**30

_tpu = functools.partial(Chip, platform="tpu", matmul_cycles=16)

# Data sheets (cloud.google.com/tpu/docs, nvidia.com); ring bandwidths are two
# links of Austin et al. 2025, "How to Scale Your Model", and NVLink 4's 450
# GB/s each way. network_bandwidth: 6.4 Tbit/s of a v5e pod of 256, 25.6 of a
# v6e pod, 50 Gbit/s of a v5p chip. matmul_cycles: a matrix unit of v4 and v5
# takes one of the 16 rows of a bfloat16 register per cycle, that of v6e two.
# "H100" without further words is the SXM form, whose memory is what its driver
# reports.
_ROWS = (
  _tpu(
    "v4",
    ("TPU v4",),
    dimensions=3,
    cores=2,
    clock=1.05e9,
    peak_flops=275e12,
    hbm_bandwidth=1228e9,
    hbm_bytes=32 * _GIB,
    vmem_bytes=16 * _MIB,
    ring_bandwidth=90e9,
  ),
  _tpu(
    "v5e",
    ("TPU v5 lite", "TPU v5e"),
    dimensions=2,
    clock=1.5e9,
    peak_flops=197e12,
    hbm_bandwidth=819e9,
    hbm_bytes=16 * _GIB,
    vmem_bytes=128 * _MIB,
    ring_bandwidth=90e9,
    network_bandwidth=6.4e12 / 8 / 256,
  ),
  _tpu(
    "v5p",
    ("TPU v5", "TPU v5p"),
    dimensions=3,
    cores=2,
    clock=1.75e9,
    peak_flops=459e12,
    hbm_bandwidth=2765e9,
    hbm_bytes=95 * _GIB,
    vmem_bytes=64 * _MIB,
    ring_bandwidth=180e9,
    network_bandwidth=50e9 / 8,
  ),
  _tpu(
    "v6e",
    ("TPU v6 lite", "TPU v6e"),
    dimensions=2,
    clock=1.75e9,
    peak_flops=918e12,
    hbm_bandwidth=1640e9,
    hbm_bytes=32 * _GIB,
    vmem_bytes=128 * _MIB,
    ring_bandwidth=180e9,
    network_bandwidth=25.6e12 / 8 / 256,
    matmul_cycles=8,
  ),
  Chip(
    "h100",
    ("NVIDIA H100",),
    platform="cuda",
    dimensions=1,
    clock=1.98e9,
    peak_flops=989e12,
    hbm_bandwidth=3352e9,
    hbm_bytes=84_942_979_072,
    vmem_bytes=232_448,
    ring_bandwidth=450e9,
  ),
)
CHIPS = {chip.name: chip for chip in _ROWS}

# Dense bfloat16 FLOP/s of one JAX device by the beginning of its
# `device_kind`; some run that nothing here is compiled for in advance.
_PEAK_FLOPS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100 PCIe": 756e12,
} | {kind: chip.peak_flops for chip in _ROWS for kind in chip.device_kinds}


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device; None if it is not known.

  Args:
    device_kind: of `jax.Device`; the longest known beginning of it counts.
  """
  known = [kind for kind in _PEAK_FLOPS if device_kind.startswith(kind)]
  return _PEAK_FLOPS[max(known, key=len)] if known else None
