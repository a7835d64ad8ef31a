"""Bytes that an HLO instruction moves between HBM and the core."""

import math
import re

from bertjax.hardware.hlo import Computation, Instruction, Module

# They rename or reorder what they get; the bytes are those of their user.
_THROUGH = ("bitcast", "reshape", "copy", "transpose")
# They name values, or make them on the fly.
_NAMES = frozenset(
  """parameter constant tuple get-tuple-element bitcast after-all partition-id
  replica-id iota opt-barrier""".split()
)
# They read as much of their first operand as they give.
_SLICES = ("dynamic-slice", "gather")
# Transfers beside the computation; collectives are reported by themselves.
_TRANSFERS = frozenset(
  """copy-start copy-done slice-start slice-done async-start async-update
  async-done all-reduce all-reduce-start all-reduce-done all-gather
  all-gather-start all-gather-done reduce-scatter reduce-scatter-start
  reduce-scatter-done all-to-all all-to-all-start all-to-all-done
  collective-permute collective-permute-start collective-permute-done send
  send-done recv recv-done""".split()
)
_BOOKKEEPING = (
  "AllocateBuffer",
  "AsyncCollectiveStart",
  "AsyncCollectiveDone",
  "ConcatBitcast",
)
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_RESERVED = re.compile(r'"used_scoped_memory_configs":\[([^\]]*)\]')
_VMEM = re.compile(r'"memory_space":"1","offset":"\d+","size":"(\d+)"')


def custom_call_target(instruction: Instruction) -> str:
  """What a custom call calls; "" for other instructions."""
  match = _TARGET.search(instruction.attributes)
  return match[1] if match else ""


def vmem_bytes(instruction: Instruction) -> int:
  """On-chip memory that a run of the instruction reserves for itself."""
  used = _RESERVED.search(instruction.attributes)
  return sum(map(int, _VMEM.findall(used[1]))) if used else 0


def costs_nothing(
  instruction: Instruction, computation: Computation, module: Module
) -> bool:
  """Whether no vector core works on it.

  That is bookkeeping, a transfer alongside, or arithmetic on single numbers.
  """
  if instruction.opcode in _NAMES | _TRANSFERS:
    return True
  callee = module.callee(instruction)
  last = callee.root if callee and callee.root else instruction
  if custom_call_target(last) in _BOOKKEEPING:
    return True
  operands = [
    computation.by_name[name]
    for name in instruction.operands
    if name in computation.by_name
  ]
  return callee is None and all(
    math.prod(array.shape) == 1
    for value in (instruction, *operands)
    for array in value.arrays
  )


def hbm_bytes(
  instruction: Instruction, computation: Computation, module: Module
) -> int:
  """Bytes read from and written to HBM by one run of the instruction.

  Of an operand that is only sliced or gathered from, the slices count; of a
  result that updates an operand in place, the update. Scratch memories of the
  chip are free.
  """
  callee = module.callee(instruction)
  if instruction.opcode == "dynamic-update-slice":
    return 2 * computation.by_name[instruction.operands[1]].hbm_bytes
  if instruction.opcode == "dynamic-slice":
    in_hbm = computation.by_name[instruction.operands[0]].hbm_bytes > 0
    return instruction.hbm_bytes + (instruction.bytes if in_hbm else 0)
  written = instruction.hbm_bytes - _workspace_bytes(instruction)
  if callee is not None and callee.root is not None and written:
    written = min(written, _written(callee, callee.root, module))
  read = 0
  for number, name in enumerate(instruction.operands):
    operand = computation.by_name.get(name)
    if operand is None or not operand.hbm_bytes:
      continue
    full = operand.hbm_bytes
    parameter = callee.parameter(number) if callee else None
    read += (
      full if parameter is None else _read(callee, parameter, full, module)
    )
  return written + read


def _workspace_bytes(instruction: Instruction) -> int:
  """Of a call of cuBLAS: the scratch memory that is its last result."""
  if not custom_call_target(instruction).startswith("__cublas"):
    return 0
  *results, last = instruction.arrays
  return last.bytes if results and last.dtype == "s8" else 0


def _read(
  computation: Computation, value: Instruction, full: int, module: Module
) -> int:
  """Bytes of `value`, `full` in all, that a fused computation reads."""
  total = 0
  for user, position in computation.users[value.name]:
    callee = module.callee(user)
    if user.opcode == "tuple":
      pass  # handed on in place
    elif user.opcode == "dynamic-update-slice" and position == 0:
      pass  # written in place
    elif user.opcode in _SLICES and position == 0:
      total += user.bytes
    elif user.opcode == "scatter" and len(user.operands) == 3 and not position:
      total += computation.by_name[user.operands[2]].bytes
    elif user.opcode in _THROUGH:
      total += _read(computation, user, full, module)
    elif callee is not None and (inner := callee.parameter(position)):
      total += _read(callee, inner, full, module)
    elif user.opcode not in _NAMES | _TRANSFERS:
      total += full
  return min(total, full)


def _written(
  computation: Computation, value: Instruction, module: Module
) -> int:
  """Bytes that computing `value` inside a fusion writes to HBM."""
  operands = [
    computation.by_name[name]
    for name in value.operands
    if name in computation.by_name
  ]
  if value.opcode == "tuple":
    return sum(_written(computation, part, module) for part in operands)
  if value.opcode == "parameter" or value.opcode in _TRANSFERS:
    return 0  # handed on in place
  if value.opcode in _THROUGH and operands:
    inner = operands[0]
    if inner.opcode == "parameter":
      return value.hbm_bytes
    return min(value.hbm_bytes, _written(computation, inner, module))
  if value.opcode == "dynamic-update-slice":
    return operands[1].bytes
  if value.opcode == "scatter" and len(operands) == 3:
    return min(value.hbm_bytes, operands[2].bytes)
  callee = module.callee(value)
  if callee is not None and callee.root is not None:
    return min(value.hbm_bytes, _written(callee, callee.root, module))
  return value.hbm_bytes
