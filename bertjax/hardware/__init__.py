"""Compile for accelerators that nobody here has, and read what it will cost.

The compilers of TPUs and GPUs run on any Linux machine.

  def lowered(devices, *, size):
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16,
                             sharding=SingleDeviceSharding(devices[0]))
    return jax.jit(jnp.dot).lower(x, x)

  program = compile_for("v5e:2x2", lowered, size=4096)
  price(program).seconds              # of one run
  price(program).top(10)              # rows: cycles, bytes, source lines
  read_collectives(program.module)         # bytes, mesh axes

The model of a TPU: an operation takes the longest of its instruction bundles
(one per cycle, loops included), its matrix units' work, and its HBM bytes at
the full bandwidth; operations follow one another. Its limits:

* The latency of transfers, and stalls inside an operation, are not modelled.
* Asynchronous copies and collectives count as hidden behind other work; what
  collectives would add is for the caller to add.
* A predicated region counts as always taken, a conditional as all its branches,
  a loop with a bound known only at run time as one iteration.
* Clocks and bandwidths are the data sheets'.

So use it for ratios between programs compiled for the same topology first, and
for absolute times with a grain of salt. For a GPU there is no such model; what
the assembler reports per kernel is in `Program.kernels`.
"""

from bertjax.hardware.chips import CHIPS, Chip
from bertjax.hardware.collectives import Collective, read_collectives
from bertjax.hardware.compiling import (
  FAILURES,
  CompilerEnded,
  Memory,
  OutOfMemory,
  Program,
  compile_for,
)
from bertjax.hardware.cost import Cost, Row, price_module
from bertjax.hardware.topologies import CompilerMissing, Topology, parse

__all__ = [
  "CHIPS",
  "FAILURES",
  "Chip",
  "Collective",
  "CompilerEnded",
  "CompilerMissing",
  "Cost",
  "Memory",
  "OutOfMemory",
  "Program",
  "Row",
  "Topology",
  "compile_for",
  "parse",
  "price",
  "price_module",
  "read_collectives",
]


def price(program: Program) -> Cost:
  """What a TPU program costs, operation by operation.

  Raises:
    ValueError: it is a GPU program.
  """
  chip = program.topology.chip
  if chip.platform != "tpu":
    raise ValueError(
      f"topology={program.topology.name!r}: only TPU programs have a cost"
      " model; see Program.kernels."
    )
  return price_module(program.module, program.schedules, chip)
