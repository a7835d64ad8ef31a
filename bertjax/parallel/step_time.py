"""Whether sending less makes a data-parallel step faster, and by how much.

    step = computation + what of the exchange does not hide + coding

An estimate from bytes, a network's bandwidth and latency; nothing is measured.
Compression pays where the full-precision exchange takes longer than coding does
and does not hide behind computation: on slow networks, with few rows a worker.
"""

import dataclasses
from collections.abc import Sequence

from bertjax.parallel import wire
from bertjax.parallel.grids import Compression


@dataclasses.dataclass(frozen=True)
class Network:
  """What connects the workers.

  Attributes:
    bandwidth: bytes per second that a worker sends, in one direction.
    latency_s: of a message.
  """

  bandwidth: float
  latency_s: float = 0.0

  def __post_init__(self):
    if not self.bandwidth > 0:
      raise ValueError(f"bandwidth={self.bandwidth} must be positive.")
    if self.latency_s < 0:
      raise ValueError(f"latency_s={self.latency_s} must not be negative.")

  def exchange_s(self, sent_bytes: float, workers: int) -> float:
    """Seconds of an all-reduce: 2 (n - 1) messages of a worker, in turn."""
    return sent_bytes / self.bandwidth + 2 * (workers - 1) * self.latency_s


@dataclasses.dataclass(frozen=True)
class Step:
  """A step of every worker.

  Attributes:
    shapes: of the tensors averaged, on one device.
    compute_s: seconds without exchange.
    hidden_s: of that, what a full-precision exchange hides behind: gradients
      of later layers can leave during the backward pass. Momentum is compressed
      after it and hides behind nothing.
    coding_s: seconds of packing, unpacking and the errors, if compressed.
    bits: of a number in full precision.
  """

  shapes: Sequence[Sequence[int]]
  compute_s: float
  hidden_s: float = 0.0
  coding_s: float = 0.0
  bits: int = 16

  def __post_init__(self):
    if not self.compute_s > 0:
      raise ValueError(f"compute_s={self.compute_s} must be positive.")
    if not 0 <= self.hidden_s <= self.compute_s:
      raise ValueError(
        f"hidden_s={self.hidden_s} must be between 0 and the computation's"
        f" {self.compute_s} seconds."
      )
    if self.coding_s < 0:
      raise ValueError(f"coding_s={self.coding_s} must not be negative.")

  def full_s(self, workers: int, network: Network) -> float:
    """Seconds of a step that averages gradients in full precision."""
    sent = wire.ring_bytes(self.shapes, workers, self.bits)
    exposed = network.exchange_s(sent, workers) - self.hidden_s
    return self.compute_s + max(0.0, exposed)

  def compressed_s(
    self,
    workers: int,
    network: Network,
    compression: Compression = Compression(),  # noqa: B008 frozen
  ) -> float:
    """Seconds of a step that averages momentum in one bit."""
    sent = wire.compressed_bytes(self.shapes, workers, compression)
    exchange = network.exchange_s(sent, workers)
    return self.compute_s + exchange + self.coding_s

  def speedup(
    self,
    workers: int,
    network: Network,
    compression: Compression = Compression(),  # noqa: B008 frozen
    full_share: float = 0.0,
  ) -> float:
    """How many times faster steps are on average; below 1 they are slower.

    Args:
      workers: that average.
      network: between them.
      compression: scales.
      full_share: of all steps, those still taken in full precision.
    """
    if not 0 <= full_share <= 1:
      raise ValueError(f"full_share={full_share} must be in [0, 1].")
    full = self.full_s(workers, network)
    compressed = self.compressed_s(workers, network, compression)
    return full / (full_share * full + (1 - full_share) * compressed)
