"""The kinds of steps that one program runs."""

import dataclasses
import math
from collections.abc import Sequence

from bertjax import hardware
from bertjax.planning import links


@dataclasses.dataclass(frozen=True)
class Kind:
  """What steps of one kind do.

  Attributes:
    collectives: that they run.
    work: other operations; None where nothing prices them.
    exchange_s: seconds of the collectives; None if a bandwidth is unknown.
  """

  collectives: Sequence[hardware.Collective]
  work: hardware.Cost | None
  exchange_s: float | None

  @property
  def compute_s(self) -> float | None:
    """Seconds of the other operations."""
    return self.work.seconds if self.work else None

  @property
  def step_s(self) -> float | None:
    """Seconds of a step in which the shorter of the two hides."""
    if self.compute_s is None or self.exchange_s is None:
      return None
    return max(self.compute_s, self.exchange_s)


def kinds(
  topology: hardware.Topology,
  collectives: Sequence[hardware.Collective],
  work: hardware.Cost | None,
) -> list[Kind]:
  """What different steps do, if a conditional decides what they exchange.

  An optimizer that sends full gradients first and compressed ones later has
  both in one program. Conditionals are told apart by their nesting only, and
  those that exchange nothing count with all of their branches.

  Args:
    topology: of the devices.
    collectives: of the program.
    work: of the program.

  Returns:
    At least one, the longest first; what stands outside of conditionals is in
    each.
  """
  branches = {collective.branch for collective in collectives}
  last = [
    branch
    for branch in sorted(branches)
    if not any(other[: len(branch)] == branch != other for other in branches)
  ]
  found = []
  for branch in last or [()]:
    own = [c for c in collectives if branch[: len(c.branch)] == c.branch]
    taken = work.taking(branch) if work else None
    found.append(Kind(own, taken, links.seconds(topology, own)))
  return sorted(found, key=_seconds, reverse=True)


def _seconds(kind: Kind) -> tuple[float, float]:
  """Of a step, and of one in which nothing hides."""
  if kind.exchange_s is None:
    return math.inf, math.inf
  compute = kind.compute_s or 0.0
  return max(compute, kind.exchange_s), compute + kind.exchange_s
