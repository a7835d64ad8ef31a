"""What compiling a training step told: sizes, exchanges, time."""

import dataclasses
from typing import Any

from bertjax import hardware
from bertjax.planning.advice import Suggestion
from bertjax.planning.kinds import Kind, kinds
from bertjax.planning.step import StepFacts


@dataclasses.dataclass(frozen=True)
class Plan:
  """One stage on one topology.

  Attributes:
    topology: what it was compiled for.
    facts: sizes of model, batch and state.
    steps: that the stage takes; 0 if only the data know.
    needed_bytes: per device; None if the compiler does not say.
    available_bytes: per device, by the compiler that found no room; None if it
      did, or does not say.
    memory: per device, when it fits.
    activation_bytes: per device, of what the forward pass keeps for the
      backward pass; part of the memory's temporaries.
    collectives: exchanges of a step, when it fits.
    cost: of the program on a TPU, when it fits, all branches included.
    traffic: of it on a GPU, when it fits: bytes, and no cycles.
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
  available_bytes: float | None = None

  @property
  def fits(self) -> bool:
    """Whether the compiler found room."""
    return self.memory is not None

  @property
  def kinds(self) -> list[Kind]:
    """Of steps, the longest first; all that follows is of that one."""
    work = self.cost or self.traffic
    return kinds(self.topology, self.collectives, work)

  @property
  def longest(self) -> Kind:
    """The first of `kinds`."""
    return self.kinds[0]

  @property
  def compute_s(self) -> float | None:
    """Seconds of a step's computation."""
    return self.longest.compute_s if self.cost else None

  @property
  def exchange_s(self) -> float | None:
    """Seconds of its collectives; None if a bandwidth is unknown."""
    return self.longest.exchange_s

  @property
  def step_s(self) -> float | None:
    """Seconds of a step in which the shorter of the two hides."""
    return self.longest.step_s if self.cost else None

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
    work = self.longest.work
    if work is None:
      return None
    return work.hbm_bytes / self.topology.chip.hbm_bandwidth

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
    """Of all steps, if one knows how many; taken to be of the longest kind."""
    if self.step_s is None or not self.steps:
      return None
    return self.steps * self.step_s / 3600

  @property
  def chip_hours(self) -> float | None:
    """The same, summed over chips."""
    if self.hours is None:
      return None
    return self.hours * self.topology.num_devices
