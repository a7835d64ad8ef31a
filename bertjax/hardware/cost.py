"""What a compiled TPU program costs, operation by operation."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from bertjax.hardware import traffic
from bertjax.hardware.bundles import Schedule
from bertjax.hardware.chips import Chip
from bertjax.hardware.hlo import Computation, Executed, Instruction, Module

_INCIDENTAL = re.compile(
  r",?\s*(metadata|backend_config|calls|to_apply|sharding)=\S*.*"
)
_SPACE = re.compile(r"S\(\d+\)")


@dataclasses.dataclass(frozen=True)
class Row:
  """One operation of a program.

  Attributes:
    name: of the HLO instruction.
    opcode: of the HLO instruction.
    times: runs per run of the program: the trip counts around it.
    cycles: bundles that one run issues; None if the dump has none.
    mxu_cycles: for which one run occupies the matrix units.
    hbm_bytes: that one run moves.
    vmem_bytes: of on-chip memory that it reserves for itself.
    estimate: cycles of all runs.
    op_name: the JAX operation behind it, with its scopes.
    source: `file:line` behind it.
    branch: of the conditionals around it, outermost first, which branch it
      stands in; () if it runs in any case.
  """

  name: str
  opcode: str
  times: int
  cycles: int | None
  mxu_cycles: float
  hbm_bytes: int
  vmem_bytes: int
  estimate: float
  op_name: str
  source: str
  branch: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cost:
  """The rows of a program and their sums.

  Attributes:
    chip: that it was compiled for.
    rows: in the order of execution.
  """

  chip: Chip
  rows: Sequence[Row]

  @property
  def cycles(self) -> float:
    """Of one run: the sum of the rows' estimates."""
    return sum(row.estimate for row in self.rows)

  @property
  def seconds(self) -> float:
    """Of one run."""
    return self.cycles / self.chip.clock

  @property
  def compute_cycles(self) -> int:
    """Bundles issued in one run."""
    return sum(row.times * (row.cycles or 0) for row in self.rows)

  @property
  def mxu_cycles(self) -> float:
    """For which one run occupies the matrix units."""
    return sum(row.times * row.mxu_cycles for row in self.rows)

  @property
  def hbm_bytes(self) -> int:
    """That one run moves."""
    return sum(row.times * row.hbm_bytes for row in self.rows)

  @property
  def vmem_bytes(self) -> int:
    """The most on-chip memory that an operation reserves for itself."""
    return max((row.vmem_bytes for row in self.rows), default=0)

  @property
  def missing(self) -> list[str]:
    """Operations whose cycles are unknown; only their bytes count."""
    return [row.name for row in self.rows if row.cycles is None]

  def taking(self, branch: tuple[int, ...]) -> "Cost":
    """Of a run that takes this branch of its conditionals.

    Conditionals are told apart by their nesting only; of those further inside
    all branches stay.
    """
    return Cost(
      self.chip,
      [
        row
        for row in self.rows
        if all(a == b for a, b in zip(row.branch, branch))
      ],
    )

  def top(self, count: int) -> list[Row]:
    """The costliest operations, the first one leading."""
    return sorted(self.rows, key=lambda row: -row.estimate)[:count]


def price_module(
  module: Module, schedules: Mapping[str, Schedule], chip: Chip
) -> Cost:
  """Prices a module: an operation takes what its slowest resource needs.

      estimate = times * max(cycles, mxu_cycles, hbm_bytes / bytes per cycle)

  Args:
    module: the optimized HLO.
    schedules: by operation, from `bundles.read_dump`.
    chip: whose HBM it runs against.
  """
  known = _Schedules(module, schedules)
  rows = []
  for executed in module.executed():
    instruction = executed.instruction
    if traffic.costs_nothing(instruction, executed.computation, module):
      continue
    schedule = known.of(executed)
    moved = traffic.hbm_bytes(instruction, executed.computation, module)
    busy = schedule.bound if schedule else 0
    rows.append(
      Row(
        name=instruction.name,
        opcode=instruction.opcode,
        times=executed.times,
        cycles=schedule.cycles if schedule else None,
        mxu_cycles=schedule.mxu_cycles if schedule else 0,
        hbm_bytes=moved,
        vmem_bytes=traffic.vmem_bytes(instruction),
        estimate=executed.times * max(busy, moved / chip.hbm_bytes_per_cycle),
        op_name=instruction.op_name,
        source=module.source(instruction),
        branch=executed.branch,
      )
    )
  return Cost(chip, rows)


class _Schedules:
  """Schedules by operation; of equal operations the compiler builds one."""

  def __init__(self, module: Module, schedules: Mapping[str, Schedule]):
    self._module, self._by_name = module, schedules
    self._twins: dict[tuple, Schedule] = {}
    self._near_twins: dict[tuple, Schedule] = {}
    for computation in module.computations.values():
      for instruction in computation.instructions:
        schedule = schedules.get(instruction.name)
        if schedule and not traffic.costs_nothing(
          instruction, computation, module
        ):
          exact = self._form(instruction, computation, spaces=True)
          near = self._form(instruction, computation, spaces=False)
          self._twins[exact] = schedule
          self._near_twins.setdefault(near, schedule)

  def of(self, executed: Executed) -> Schedule | None:
    instruction, computation = executed.instruction, executed.computation
    if instruction.name in self._by_name:
      return self._by_name[instruction.name]
    exact = self._form(instruction, computation, spaces=True)
    if exact in self._twins:
      return self._twins[exact]
    return self._near_twins.get(
      self._form(instruction, computation, spaces=False)
    )

  def _form(
    self, instruction: Instruction, computation: Computation, *, spaces: bool
  ) -> tuple:
    """What two operations share when one program serves both.

    Args:
      instruction: the operation.
      computation: where it stands.
      spaces: whether memory spaces must agree as well.
    """

    def clean(text):
      return text if spaces else _SPACE.sub("", text)

    callee = self._module.callee(instruction)
    body = callee.instructions if callee else ()
    number = {inner.name: str(i) for i, inner in enumerate(body)}
    lines = tuple(
      (
        inner.opcode,
        clean(inner.type),
        tuple(number.get(name, name) for name in inner.operands),
        inner.arguments if not inner.operands else "",
        _INCIDENTAL.sub("", inner.attributes),
      )
      for inner in body
    )
    operands = tuple(
      clean(computation.by_name[name].type)
      for name in instruction.operands
      if name in computation.by_name
    )
    target = traffic.custom_call_target(instruction)
    return instruction.opcode, clean(instruction.type), operands, lines, target
