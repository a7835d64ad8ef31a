"""The kinds of steps that one program runs."""

import dataclasses
import math
from collections.abc import Iterator, Sequence, Set

from bertjax import hardware
from bertjax.planning import links

_OTHER = -1  # the index of a branch in which nothing is known to stand


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
  both in one program; one that exchanges something every tenth step has a
  branch for it and one without. Conditionals are told apart by their nesting
  only, and those that exchange nothing count with all of their branches.

  Args:
    topology: of the devices.
    collectives: of the program.
    work: of the program.

  Returns:
    At least one, the longest first; what stands outside of conditionals is in
    each.
  """
  branches = {collective.branch for collective in collectives}
  rows = {row.branch for row in work.rows} if work else set()
  found: list[Kind] = []
  for branch in _taken(branches, rows):
    own = [c for c in collectives if branch[: len(c.branch)] == c.branch]
    taken = work.taking(branch) if work else None
    kind = Kind(own, taken, links.seconds(topology, own))
    if kind not in found:
      found.append(kind)
  return sorted(found, key=_seconds, reverse=True)


def _taken(
  branches: Set[tuple[int, ...]],
  rows: Set[tuple[int, ...]],
  parent: tuple[int, ...] = (),
) -> Iterator[tuple[int, ...]]:
  """The branches that steps may end up in.

  Args:
    branches: in which collectives stand.
    rows: in which other operations stand.
    parent: of which those further inside are asked for.
  """
  depth = len(parent)

  def inside(among: Set[tuple[int, ...]]) -> set[int]:
    return {b[depth] for b in among if len(b) > depth and b[:depth] == parent}

  exchanging = inside(branches)
  if not exchanging:
    yield parent
    return
  for index in sorted(exchanging):
    yield from _taken(branches, rows, (*parent, index))
  others = inside(rows) - exchanging
  if len(exchanging) == 1:  # a conditional has two branches or more
    others = others or {_OTHER}
  for index in sorted(others):
    yield *parent, index


def _seconds(kind: Kind) -> tuple[float, float]:
  """Of a step, and of one in which nothing hides."""
  if kind.exchange_s is None:
    return math.inf, math.inf
  compute = kind.compute_s or 0.0
  return max(compute, kind.exchange_s), compute + kind.exchange_s
