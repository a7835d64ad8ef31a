"""What a compiled training step keeps of its forward pass for its backward one.

The compiler reports temporaries as one number. Which of them are activations
the program tells: values that operations of the forward pass write to HBM and
operations of the backward pass read. JAX names both kinds.
"""

import re
from collections.abc import Iterator

from bertjax.hardware.hlo import Computation, Instruction, Module

# Names as in "jit(step)/jvp(MaskedLM)/..." and ".../transpose(jvp(MaskedLM))".
_BACKWARD, _FORWARD = "transpose(", "jvp("
# They hand on what they get; some of them to another memory.
_THROUGH = frozenset(
  "bitcast copy copy-start copy-done opt-barrier reshape".split()
)
_INDEX = re.compile(r"\bindex=(\d+)")


def kept_bytes(module: Module) -> int:
  """Bytes of HBM per device that wait for the backward pass, each value once.

  What is computed again (`model.remat`), and what stays in on-chip memory, does
  not count. 0 if nothing is differentiated.

  Args:
    module: the optimized HLO.
  """
  computations = {id(e.computation): e.computation for e in module.executed()}
  found: dict[tuple[int, str], int] = {}
  for key, computation in computations.items():
    for instruction in computation.instructions:
      if instruction.opcode in _THROUGH or instruction.opcode == "tuple":
        continue
      if _BACKWARD not in instruction.op_name:
        continue
      for name in instruction.operands:
        for value, producer in _origins(module, computation, name):
          if _is_forward(producer):
            found[key, value.name] = value.hbm_bytes
  return sum(found.values())


def _is_forward(instruction: Instruction) -> bool:
  name = instruction.op_name
  if instruction.opcode == "constant":
    return False
  return _FORWARD in name and _BACKWARD not in name


def _origins(
  module: Module, computation: Computation, name: str
) -> Iterator[tuple[Instruction, Instruction]]:
  """What a value is, before it was handed on: (value, operation it is of)."""
  value = computation.by_name.get(name)
  if value is None:
    return
  if value.opcode == "tuple":
    for part in value.operands:
      yield from _origins(module, computation, part)
  elif value.opcode in _THROUGH:
    yield from _origins(module, computation, value.operands[0])
  elif value.opcode == "get-tuple-element":
    index = int(_INDEX.search(value.attributes)[1])
    producer = computation.by_name[value.operands[0]]
    inner = _element(module, computation, producer, index)
    if inner is None:
      yield value, producer
    else:
      yield from _origins(module, computation, inner)
  else:
    yield value, value


def _element(
  module: Module, computation: Computation, producer: Instruction, index: int
) -> str | None:
  """Of a tuple's element, the value that it holds; None if it is a new one."""
  while producer.opcode == "opt-barrier":
    producer = computation.by_name[producer.operands[0]]
  if producer.opcode == "tuple":
    return producer.operands[index]
  if producer.opcode != "while":
    return None
  body = module.computations[producer.called("body")]
  if not _carries(body, index):
    return None
  before = computation.by_name[producer.operands[0]]
  return before.operands[index] if before.opcode == "tuple" else None


def _carries(body: Computation, index: int) -> bool:
  """Whether a loop leaves an element of its state as it is."""
  if body.root is None or body.root.opcode != "tuple":
    return False
  last = body.by_name[body.root.operands[index]]
  while last.opcode in _THROUGH:
    last = body.by_name[last.operands[0]]
  if last.opcode != "get-tuple-element":
    return False
  same = int(_INDEX.search(last.attributes)[1]) == index
  return same and body.by_name[last.operands[0]].opcode == "parameter"
