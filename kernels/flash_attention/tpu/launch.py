"""Builds a pallas_call from named operands, each with its block and index."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.flash_attention.tpu.problem import Problem
from kernels.flash_attention.tpu.schedule import Schedule, Visit
from kernels.flash_attention.tpu.tiles import Tiles

# Mosaic's default is a fraction of what the chips have.
VMEM_BYTES = 64 << 20
B, GROUP, VISIT = range(3)  # the grid's loops


@dataclasses.dataclass(frozen=True)
class Operand:
  """An input or output.

  Attributes:
    array: the input; of an output, its jax.ShapeDtypeStruct.
    block: shape of a block; None: the whole array in scalar memory.
    index: (b, group, visit) -> block indices.
    buffers: of the block; with 1 a change of the block is waited for.
    fusible: what makes the input may become a part of the kernel. So a layer's
      slice of what a scan has kept is read where it lies, not copied. Mosaic
      can do so only if no part of the block is addressed at run time.
  """

  array: Any
  block: tuple[int, ...] | None = None
  index: Callable[..., tuple] | None = None
  buffers: int = 2
  fusible: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
  """Where a grid step is.

  Attributes:
    b: example.
    group: of heads.
    visit: of a tile.
    first: whether it is the first visit of the example and group.
  """

  b: Any
  group: Any
  visit: Visit
  first: Any


def launch(
  body: Callable[[Step, Any], None],
  *,
  name: str,
  problem: Problem,
  tiles: Tiles,
  schedule: Schedule,
  inputs: dict[str, Operand],
  outputs: dict[str, Operand],
  scratch: dict[str, tuple[int, ...]],
  order: tuple[int, int, int] = (B, GROUP, VISIT),
  parallel: tuple[int, ...] = (B, GROUP),
) -> dict[str, jax.Array]:
  """Runs `body(step, refs)` over examples, groups of heads and visits.

  Args:
    body: the kernel; refs has the operands and float32 scratch as attributes.
    name: of the kernel, for profiles.
    problem: the call.
    tiles: its tiles.
    schedule: its visits.
    inputs: operands by name.
    outputs: likewise.
    scratch: shapes by name.
    order: of the grid's loops, outermost first.
    parallel: loops whose steps do not depend on each other.

  Returns:
    The outputs by name.
  """
  prefetch = [] if schedule.table is None else [jnp.asarray(schedule.table)]
  names = [*inputs, *outputs, *scratch]
  sizes = (problem.b, problem.h // tiles.heads, schedule.visits)

  def named(place):
    return [place[order.index(axis)] for axis in range(3)]

  def spec(operand):
    if operand.block is None:
      return pl.BlockSpec(memory_space=pltpu.SMEM)

    def index(*place):
      (b, group, visit), table = named(place[:3]), place[3:]
      entry = schedule.entry(group, visit, table[0] if table else None)
      return operand.index(b, group, entry)

    mode = None if operand.buffers == 2 else pl.Buffered(operand.buffers)
    return pl.BlockSpec(operand.block, index, pipeline_mode=mode)

  def kernel(*refs):
    table = refs[0] if prefetch else None
    refs = types.SimpleNamespace(**dict(zip(names, refs[len(prefetch) :])))
    b, group, visit = named([pl.program_id(axis) for axis in range(3)])
    entry = schedule.entry(group, visit, table)
    body(Step(b, group, entry, visit == 0), refs)

  call = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(prefetch),
      grid=tuple(sizes[axis] for axis in order),
      in_specs=[spec(x) for x in inputs.values()],
      out_specs=[spec(x) for x in outputs.values()],
      scratch_shapes=[
        pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()
      ],
    ),
    out_shape=[x.array for x in outputs.values()],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=tuple(
        "parallel" if axis in parallel else "arbitrary" for axis in order
      ),
      vmem_limit_bytes=VMEM_BYTES,
      allow_input_fusion=[
        *(False for _ in prefetch),
        *(x.fusible for x in inputs.values()),
      ],
    ),
    interpret=problem.options.interpret,
    name=name,
  )
  with jax.enable_x64(False):  # indices are 32 bits wide
    results = call(*prefetch, *(x.array for x in inputs.values()))
  return dict(zip(outputs, results))
