"""What the vendors publish about accelerators, and what follows from it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator chip; a JAX device of ours is always a whole chip.

  Attributes:
    name: as in topology names.
    platform: of `jax.experimental.topologies`: "tpu" or "cuda".
    clock: cycles per second.
    hbm_bandwidth: bytes per second.
    hbm_bytes: capacity.
    vmem_bytes: on-chip memory that a TPU kernel addresses, per core; for a GPU
      the shared memory that one block may take.
    peak_flops: dense bfloat16 FLOP/s.
    ring_bandwidth: bytes per second that a chip sends around a ring of
      neighbours, both directions together.
    cores: that share the work of a device.
    matmul_cycles: for which one matrix instruction on a full register of
      packed operands occupies a matrix unit; 0: unknown.
  """

  name: str
  platform: str
  clock: float
  hbm_bandwidth: float
  hbm_bytes: float
  vmem_bytes: int
  peak_flops: float
  ring_bandwidth: float
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

# Data sheets (cloud.google.com/tpu/docs, nvidia.com); ring bandwidths are two
# links of Austin et al. 2025, "How to Scale Your Model", and NVLink 4's 450
# GB/s each way. matmul_cycles: a matrix unit of v4 and v5 takes one of the 16
# rows of a bfloat16 register per cycle, that of v6e two.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      platform="tpu",
      clock=1.05e9,
      hbm_bandwidth=1228e9,
      hbm_bytes=32 * _GIB,
      vmem_bytes=16 * _MIB,
      peak_flops=275e12,
      ring_bandwidth=90e9,
      cores=2,
      matmul_cycles=16,
    ),
    Chip(
      name="v5e",
      platform="tpu",
      clock=1.5e9,
      hbm_bandwidth=819e9,
      hbm_bytes=16 * _GIB,
      vmem_bytes=128 * _MIB,
      peak_flops=197e12,
      ring_bandwidth=90e9,
      matmul_cycles=16,
    ),
    Chip(
      name="v5p",
      platform="tpu",
      clock=1.75e9,
      hbm_bandwidth=2765e9,
      hbm_bytes=95 * _GIB,
      vmem_bytes=64 * _MIB,
      peak_flops=459e12,
      ring_bandwidth=180e9,
      cores=2,
      matmul_cycles=16,
    ),
    Chip(
      name="v6e",
      platform="tpu",
      clock=1.75e9,
      hbm_bandwidth=1640e9,
      hbm_bytes=32 * _GIB,
      vmem_bytes=128 * _MIB,
      peak_flops=918e12,
      ring_bandwidth=180e9,
      matmul_cycles=8,
    ),
    Chip(
      name="h100",
      platform="cuda",
      clock=1.98e9,
      hbm_bandwidth=3352e9,
      hbm_bytes=80 * _GIB,
      vmem_bytes=232_448,
      peak_flops=989e12,
      ring_bandwidth=450e9,
    ),
  )
}
