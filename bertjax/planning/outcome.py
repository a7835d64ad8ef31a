"""What compiling a training step told: sizes, exchanges, time."""

import dataclasses
from typing import Any

from bertjax import hardware
from bertjax.planning import links
from bertjax.planning.advice import Suggestion
from bertjax.planning.step import StepFacts


@dataclasses.dataclass(frozen=True)
class Plan:
  """One stage on one topology.

  Attributes:
    topology: what it was compiled for.
    facts: sizes of model, batch and state.
    steps: that the stage takes; 0 if only the data know.
    needed_bytes: per device; None if the compiler does not say.
    memory: per device, when it fits.
    activation_bytes: per device, of what the forward pass keeps for the
      backward pass; part of the memory's temporaries.
    collectives: exchanges of a step, when it fits.
    cost: of a step on a TPU, when it fits.
    traffic: of a step on a GPU, when it fits: bytes, and no cycles.
    kernels: of a GPU program, when it fits.
    suggestion: change of the config that would make it fit, if one was found.
  """

  topology: hardware.Topology
  facts: StepFacts
  steps: int
  needed_bytes: float | None
  memory: hardware.Memory | None = None
  activation_bytes: int = 0
  collectives: tuple[hardware.Collective, ...] = ()
  cost: hardware.Cost | None = None
  traffic: hardware.Cost | None = None
  kernels: tuple[Any, ...] = ()
  suggestion: Suggestion | None = None

  @property
  def fits(self) -> bool:
    """Whether the compiler found room."""
    return self.memory is not None

  @property
  def compute_s(self) -> float | None:
    """Seconds of a step's computation."""
    return self.cost.seconds if self.cost else None

  @property
  def ways(self) -> list[list[hardware.Collective]]:
    """What different kinds of steps exchange; see `links.ways`."""
    return links.ways(self.collectives)

  @property
  def exchanges_s(self) -> list[float | None]:
    """Seconds of the collectives of each of `ways`."""
    return [links.seconds(self.topology, way) for way in self.ways]

  @property
  def exchange_s(self) -> float | None:
    """Those of the longest; None if a bandwidth is unknown."""
    found = [seconds for seconds in self.exchanges_s if seconds is not None]
    return max(found) if len(found) == len(self.exchanges_s) else None

  @property
  def step_s(self) -> float | None:
    """Seconds of a step in which the shorter of the two hides."""
    if self.compute_s is None or self.exchange_s is None:
      return None
    return max(self.compute_s, self.exchange_s)

  @property
  def arithmetic_s(self) -> float | None:
    """Seconds of the model's own FLOPs at the peak, if they are known."""
    if self.facts.model_flops is None:
      return None
    chips = self.topology.num_devices
    return self.facts.model_flops / chips / self.topology.chip.peak_flops

  @property
  def traffic_s(self) -> float | None:
    """Seconds of a step's HBM bytes at the full bandwidth."""
    found = self.cost or self.traffic
    if found is None:
      return None
    return found.hbm_bytes / self.topology.chip.hbm_bandwidth

  @property
  def tokens_per_s_per_chip(self) -> float | None:
    """Slots of a batch per second of a step and chip."""
    if self.step_s is None:
      return None
    return self.facts.tokens / self.step_s / self.topology.num_devices

  @property
  def mfu(self) -> float | None:
    """Share of the peak that the model's own FLOPs are, if they are known."""
    if self.step_s is None or self.arithmetic_s is None:
      return None
    return self.arithmetic_s / self.step_s

  @property
  def hours(self) -> float | None:
    """Of all steps, if their number is known."""
    if self.step_s is None or not self.steps:
      return None
    return self.steps * self.step_s / 3600

  @property
  def chip_hours(self) -> float | None:
    """The same, summed over chips."""
    if self.hours is None:
      return None
    return self.hours * self.topology.num_devices
