"""Cycles of a TPU program from its final instruction bundles.

A TensorCore issues one VLIW bundle per cycle, so the bundles of an operation,
times the trip counts of the loops around them, are its cycles if nothing
stalls. A schedule can be denser than the matrix units are fast; their own busy
cycles are counted beside it, and the slower of the two holds.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable

from bertjax.hardware.chips import Chip

_BUNDLE = re.compile(
  r"\s*(?:0x[0-9a-f]+|0)\s*"
  r"(?P<marks>[A-Z]{2}(?:,? ?[A-Z]{2})*)?\s*:\s*(?P<depth>[> ]*)\{"
)
_EMPTY = re.compile(r"\{\s*\}")
_LOOP_HEADER = "LB"
_EXIT_TEST = re.compile(
  r"scmp\.\w+\.s32\.totalorder [^,]+, (\d+) /\* loop exit test \*/"
)
_PIPELINED = "iteration index, stage ="
# A pipelined loop runs the first and the last of its stages (fetch, compute,
# store) alone, so that the middle one does nothing in two of the iterations.
_FILL_AND_DRAIN = 2
_MATMUL = re.compile(r"\bvmatmul\.((?:\w+\.)*)mxu(\d)")
_FILE = re.compile(r"\d+-(?P<op>.+?)-\d+-final_bundles\.txt")
_ANALYSIS = "schedule-analysis"


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One operation as it is issued on one core.

  Attributes:
    bundles: in the program.
    cycles: bundles issued, loops included.
    mxu_cycles: for which the busiest matrix unit is occupied.
  """

  bundles: int
  cycles: int
  mxu_cycles: float

  @property
  def bound(self) -> float:
    """Cycles that the operation takes at least."""
    return max(self.cycles, self.mxu_cycles)


@dataclasses.dataclass
class _Bundle:
  depth: int
  header: bool
  pipelined: bool
  exit_bound: int | None
  matmuls: dict[str, float]
  times: int = 1
  matmul_times: int = 1


@dataclasses.dataclass
class _Loop:
  start: int
  stop: int
  depth: int
  pipelined: bool
  trips: int = 1


def read_schedule(lines: Iterable[str], chip: Chip) -> Schedule:
  """Counts one `final_bundles` dump.

  A loop whose bound is not a constant counts as one iteration, and a predicated
  region as always taken.
  """
  bundles = _parse(lines)
  for loop in _loops(bundles):
    work = loop.trips - _FILL_AND_DRAIN if loop.pipelined else loop.trips
    for bundle in bundles[loop.start : loop.stop]:
      bundle.times *= loop.trips
      bundle.matmul_times *= max(work, 1)
  busy: dict[str, float] = {}
  for bundle in bundles:
    for unit, count in bundle.matmuls.items():
      busy[unit] = busy.get(unit, 0) + bundle.matmul_times * count
  return Schedule(
    bundles=len(bundles),
    cycles=sum(b.times for b in bundles),
    mxu_cycles=chip.matmul_cycles * max(busy.values(), default=0),
  )


def _parse(lines: Iterable[str]) -> list[_Bundle]:
  bundles: list[_Bundle] = []
  for line in lines:
    match = _BUNDLE.match(line)
    if match is None:
      continue
    depth = match["depth"].count(">")
    if depth == 0 and bundles and _EMPTY.search(line):
      depth = bundles[-1].depth  # empty bundles are printed without a depth
    bound = _EXIT_TEST.search(line)
    matmuls: dict[str, float] = {}
    for form, unit in _MATMUL.findall(line):
      # A register holds 8 rows of float32, and 16 of bfloat16; those that the
      # transposing unit hands over ("lmr") are 8 as well.
      share = 0.5 if {"f32", "lmr"} & set(form.split(".")) else 1.0
      matmuls[unit] = matmuls.get(unit, 0) + share
    bundles.append(
      _Bundle(
        depth=depth,
        header=_LOOP_HEADER in (match["marks"] or ""),
        pipelined=_PIPELINED in line,
        exit_bound=int(bound[1]) if bound else None,
        matmuls=matmuls,
      )
    )
  return bundles


def _loops(bundles: list[_Bundle]) -> list[_Loop]:
  """Loops from their headers, nesting depths and exit tests."""
  found: list[_Loop] = []
  stack: list[_Loop] = []
  for index, bundle in enumerate(bundles):
    while stack and (
      bundle.depth < stack[-1].depth
      or (bundle.header and bundle.depth <= stack[-1].depth)
    ):
      stack.pop().stop = index
    if bundle.header:
      loop = _Loop(index, len(bundles), bundle.depth, bundle.pipelined)
      found.append(loop)
      stack.append(loop)
    if bundle.exit_bound is not None and stack:
      stack[-1].trips = bundle.exit_bound
  return found


def read_dump(folder: pathlib.Path, chip: Chip) -> dict[str, Schedule]:
  """By the name of the HLO operation, the schedules in a dump folder."""
  found: dict[str, Schedule] = {}
  for path in sorted(folder.glob("*final_bundles.txt")):
    match = _FILE.fullmatch(path.name)
    if match is None or _ANALYSIS in path.name:
      continue
    with path.open(errors="replace") as lines:
      schedule = read_schedule(lines, chip)
    known = found.get(match["op"])
    if known is None or known.bound < schedule.bound:
      found[match["op"]] = schedule
  return found
