"""Collectives of a compiled program: bytes, mesh axes, ring traffic."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping

import numpy as np

from bertjax.hardware.hlo import Computation, Executed, Instruction, Module
from bertjax.hardware.traffic import custom_call_target

# Where a collective stands: by itself, in the fusion that begins or ends an
# asynchronous one, or in another fusion.
_ALONE, _BEGIN, _END, _FUSED = "alone", "begin", "end", "fused"

# What a device of n sends, as a share of its operand; three kinds in a ring.
_SENT = {
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-gather": lambda n: n - 1,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_LISTS = re.compile(r"\breplica_groups=\{(\{[0-9,{}]*\})\}")
_IOTA = re.compile(
  r"\breplica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?"
)
# Devices laid out as a mesh with named axes, and the axes along which it runs;
# 'a':(2)4 is the part of axis a that has 4 places and 2 before it.
_MESH = re.compile(
  r"\breplica_groups=mesh\[([^\]]*)\]"
  r"(?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? ?\{([^}]*)\}"
)
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_MESH_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"\bsource_target_pairs=\{([0-9,{}]*)\}")
# The program of a slice hands over to the host what crosses slices.
_BETWEEN = re.compile(
  r'_xla_megascale_target="\{([0-9,:]+)\}.*'
  r'_xla_megascale_transfer_type="([A-Z_]+)"'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices.

  Attributes:
    kind: for example "all-reduce".
    operand_bytes: what one device puts in, each time.
    groups: devices that exchange with each other (for a collective-permute:
      pairs of source and target), by their index in the mesh of a slice;
      between slices: those.
    times: how often in one run.
    op_name: the JAX operation that it comes from.
    source: `file:line`.
    branch: of the conditionals around it, outermost first, which branch it
      stands in; () if it runs in any case.
    slices: of TPUs that it joins; 1 if it stays inside one.
  """

  kind: str
  operand_bytes: int
  groups: tuple[tuple[int, ...], ...]
  times: int
  op_name: str
  source: str
  branch: tuple[int, ...] = ()
  slices: int = 1

  @property
  def group_size(self) -> int:
    """Devices that exchange with each other."""
    return max(map(len, self.groups), default=1)

  @property
  def sent_bytes(self) -> float:
    """What one device sends in all runs; reductions and gathers go in rings."""
    share = _SENT[self.kind](self.group_size)
    return self.times * self.operand_bytes * share

  def axes(self, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the mesh axes along which it runs; () if it follows none.

    Args:
      mesh_shape: size of each axis, in the mesh's order.
    """
    ids = np.arange(int(np.prod(list(mesh_shape.values())))).reshape(
      tuple(mesh_shape.values())
    )
    split = [name for name, size in mesh_shape.items() if size > 1]
    for count in range(1, len(split) + 1):
      for names in itertools.combinations(split, count):
        if self._runs_along(ids, names, list(mesh_shape)):
          return names
    return ()

  def _runs_along(self, ids, names, order) -> bool:
    where = [order.index(name) for name in names]
    moved = np.moveaxis(ids, where, range(-len(where), 0))
    lines = moved.reshape(-1, int(np.prod(moved.shape[-len(where) :])))
    expected = [frozenset(line.tolist()) for line in lines]
    mine = [frozenset(group) for group in self.groups]
    if self.kind == "collective-permute":
      return all(any(pair <= line for line in expected) for pair in mine)
    return set(mine) == set(expected)


def read_collectives(module: Module) -> list[Collective]:
  """Every collective of a module, each once.

  A TPU splits an asynchronous one over several fusions, which all name it; it
  counts where it starts.
  """
  devices = _num_devices(module)
  found = []
  started: set[tuple] = set()
  for executed in module.executed():
    for instruction, computation, role in _inside(module, executed):
      kind = _kind(instruction)
      if kind is None or role == _END:
        continue
      key = _same(instruction, executed)
      if role == _BEGIN:
        started.add(key)
      elif role == _FUSED and key in started:
        continue
      operands = [computation.by_name[name] for name in instruction.operands]
      slices = _slices(instruction)
      groups = (slices,) if slices else _groups(instruction, devices)
      if role == _FUSED and _scatters(instruction, computation, groups):
        kind = "reduce-scatter"
      found.append(
        Collective(
          kind=kind,
          operand_bytes=sum(operand.bytes for operand in operands),
          groups=groups,
          slices=max(1, len(slices)),
          times=executed.times,
          op_name=instruction.op_name,
          source=module.source(instruction),
          branch=executed.branch,
        )
      )
  return found


def _kind(instruction: Instruction) -> str | None:
  between = _BETWEEN.search(instruction.attributes)
  if instruction.opcode == "send" and between is not None:
    kind = between[2].lower().replace("_", "-")
    return kind if kind in _SENT else "collective-permute"
  kind = instruction.opcode.removesuffix("-start")
  return kind if kind in _SENT else None


def _scatters(
  instruction: Instruction,
  computation: Computation,
  groups: tuple[tuple[int, ...], ...],
) -> bool:
  """Whether of an all-reduce in a fusion each device keeps its part only.

  A TPU's compiler joins an all-reduce and slices of it to such a fusion.
  """
  if instruction.opcode != "all-reduce":
    return False
  kept = _kept_bytes(instruction, computation)
  return 0 < kept <= instruction.bytes / len(groups[0])


def _kept_bytes(value: Instruction, computation: Computation) -> int:
  """Bytes of a value in a fusion that are used there, or returned."""
  kept = value.bytes if value.is_root else 0
  for user, _ in computation.users[value.name]:
    if user.opcode in ("get-tuple-element", "bitcast"):
      kept += _kept_bytes(user, computation)
    else:
      slices = user.opcode in ("dynamic-slice", "slice")
      kept += user.bytes if slices else value.bytes
  return kept


def _slices(instruction: Instruction) -> tuple[int, ...]:
  """The slices that it joins; () if it stays inside one."""
  between = _BETWEEN.search(instruction.attributes)
  if between is None:
    return ()
  slices: list[int] = []
  for part in between[1].split(","):
    first, _, last = part.partition(":")
    slices += range(int(first), int(last or first) + 1)
  return tuple(slices)


def _same(instruction: Instruction, executed: Executed) -> tuple:
  """What the parts of one asynchronous collective share."""
  channel = _CHANNEL.search(instruction.attributes)
  # It may go on in the body of a loop, so where it stands tells nothing.
  return (
    channel[1] if channel else id(executed.computation),
    instruction.opcode,
    tuple((array.dtype, array.shape) for array in instruction.arrays),
  )


def _inside(
  module: Module, executed: Executed
) -> Iterator[tuple[Instruction, Computation, str]]:
  """The instruction, or what its fusion consists of, and in what role."""
  stack = [(executed.instruction, executed.computation, _ALONE)]
  while stack:
    instruction, computation, role = stack.pop()
    yield instruction, computation, role
    callee = module.callee(instruction)
    if callee is not None:
      role = _role(callee)
      stack += [(inner, callee, role) for inner in callee.instructions]


def _role(computation: Computation) -> str:
  targets = {custom_call_target(i) for i in computation.instructions}
  if "AsyncCollectiveStart" in targets:
    return _BEGIN
  return _END if "AsyncCollectiveDone" in targets else _FUSED


def _num_devices(module: Module) -> int:
  match = re.search(r"\bnum_partitions=(\d+)", module.header)
  return int(match[1]) if match else 1


def _groups(
  instruction: Instruction, devices: int
) -> tuple[tuple[int, ...], ...]:
  text = instruction.attributes
  if match := _PAIRS.search(text) or _LISTS.search(text):
    rows = re.findall(r"\{([0-9,]+)\}", match[1])
    return tuple(tuple(map(int, row.split(","))) for row in rows)
  if match := _IOTA.search(text):
    ids = _iota(match[2], match[3])
    return tuple(map(tuple, ids.reshape(_numbers(match[1])).tolist()))
  if match := _MESH.search(text):
    return _mesh_groups(*match.groups())
  return (tuple(range(devices)),)


def _numbers(text: str | None) -> list[int]:
  return [int(n) for n in (text or "").split(",") if n]


def _iota(dims: str, order: str | None) -> np.ndarray:
  ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
  return ids.transpose(_numbers(order)) if order else ids


def _mesh_groups(
  axes: str, dims: str | None, order: str | None, along: str
) -> tuple[tuple[int, ...], ...]:
  """Groups of devices that differ only in their places on the axes `along`."""
  sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
  parts = {
    name: (int(before or 1), int(size or sizes[name]))
    for name, before, size in _MESH_PART.findall(along)
  }
  shape, moved = [], []
  for name, size in sizes.items():
    before, own = parts.get(name, (1, 1))
    if name in parts:
      moved.append(len(shape) + 1)
    shape += [before, own, size // before // own]
  count = str(int(np.prod(list(sizes.values()))))
  ids = _iota(dims or count, order).reshape(shape)
  ids = np.moveaxis(ids, moved, range(-len(moved), 0))
  length = int(np.prod([shape[i] for i in moved]))
  return tuple(map(tuple, ids.reshape(-1, length).tolist()))
