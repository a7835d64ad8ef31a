"""Gradient of a bias, summed in float32 over what the bias is broadcast over.

A kernel of its own: the axes that are summed become the grid's innermost loops,
so that an output tile stays in VMEM until its sum is complete. It recomputes
the weights from two products; where nobody asks for the gradient, the compiler
drops the call.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.options import Extras
from kernels.flash_attention.tpu.backward import Residuals, Weights
from kernels.flash_attention.tpu.items import items
from kernels.flash_attention.tpu.launch import (
  GROUP,
  VISIT,
  B,
  Operand,
  Step,
  launch,
)
from kernels.flash_attention.tpu.pipeline import (
  Sums,
  pipeline,
  when_visited,
)
from kernels.flash_attention.tpu.problem import LANES, Problem
from kernels.flash_attention.tpu.schedule import COL_FIRST, COL_LAST, Schedule
from kernels.flash_attention.tpu.tiles import Tiles


class _Kernel:
  """The kernel of one call; called with a step and its refs."""

  def __init__(self, problem: Problem, tiles: Tiles, schedule: Schedule):
    self.problem, self.tiles, self.schedule = problem, tiles, schedule
    axes = (n > 1 for n in problem.bias[:3])
    self.per_example, self.per_head, self.per_query = axes
    self.heads = tiles.heads if self.per_head else 1

  @property
  def kept(self) -> tuple[int, ...]:
    """The grid's loops over different outputs."""
    loops = ((B, self.per_example), (GROUP, self.per_head))
    return tuple(axis for axis, differs in loops if differs)

  @property
  def summed(self) -> tuple[int, ...]:
    """The grid's loops over terms of one output."""
    return tuple(axis for axis in (B, GROUP) if axis not in self.kept)

  def scratch(self) -> dict[str, tuple[int, ...]]:
    """Sums by key keep 128 lanes apart until all have come."""
    if self.per_query:
      return {}
    return {"by_key": (self.heads, self.tiles.s, LANES)}

  def __call__(self, step: Step, refs: Any) -> None:
    sums = refs.dbias.at[0] if self.per_query else refs.by_key
    starts, ends = self._bounds(step)

    @pl.when(starts)
    def _():
      sums[...] = jnp.zeros(sums.shape, jnp.float32)

    when_visited(
      self.schedule,
      step.visit,
      lambda masked: self._run(step, refs, sums, masked),
    )
    if self.per_query:
      return

    @pl.when(ends)
    def _():
      for head in range(self.heads):
        refs.dbias[0, head] = sums[head].T.sum(0, keepdims=True)

  def _bounds(self, step: Step) -> tuple[Any, Any]:
    """Whether this step is the first, the last term of its output."""
    starts, ends = jnp.bool_(True), jnp.bool_(True)
    sizes = {B: self.problem.b, GROUP: self.problem.h // self.tiles.heads}
    for axis in self.summed:
      place = step.b if axis == B else step.group
      starts, ends = starts & (place == 0), ends & (place == sizes[axis] - 1)
    if not self.per_query:
      starts = starts & step.visit.has(COL_FIRST)
      ends = ends & step.visit.has(COL_LAST)
    return starts, ends

  def _run(self, step: Step, refs: Any, sums: Any, masked: bool) -> None:
    tiles = self.tiles
    weights = Weights(self.problem, tiles, step, refs, masked)

    def done(key, value):
      head, s, t = key
      lanes = slice(None) if t is None else pl.ds(t, tiles.t_item)
      place = (head, pl.ds(s, tiles.s_item), lanes)
      sums[place] = sums[place] + value

    terms = 1 if self.per_head else tiles.heads
    if not self.per_query:
      terms *= tiles.t // tiles.t_item
    total = Sums(terms, done)

    def gradient(item, products):
      _, ds = weights(item, *products)
      ds = ds * (1.0 / (1.0 - self.problem.options.dropout_rate))
      head = item.head if self.per_head else 0
      if self.per_query:
        total.add((head, item.s, item.t), ds)
      else:
        total.add((head, item.s, None), _lane_sums(ds))

    pipeline(items(tiles), tiles.ahead, weights.products, gradient)


def _lane_sums(x: jax.Array) -> jax.Array:
  """[keys, queries] to [keys, 128]: columns that are 128 apart are added."""
  width = x.shape[1]
  if width < LANES:
    return jnp.pad(x, ((0, 0), (0, LANES - width)))
  return sum(x[:, n : n + LANES] for n in range(0, width, LANES))


def bias_gradient(
  residuals: Residuals,
  extras: Extras,
  problem: Problem,
  tiles: Tiles,
  schedule: Schedule,
) -> jax.Array:
  """Float32 gradient of the bias, in its shape.

  Args:
    residuals: arrays of the forward pass and cotangents.
    extras: optional arrays.
    problem: the call.
    tiles: its tiles.
    schedule: its visits by column, every tile among them.
  """
  kernel = _Kernel(problem, tiles, schedule)
  b, h, t, _ = problem.bias
  if kernel.per_query:
    shape = (b, h, tiles.s_pad, tiles.t_pad)
    block = (1, kernel.heads, tiles.s, tiles.t)
  else:
    shape, block = (b, h, 1, tiles.s_pad), (1, kernel.heads, 1, tiles.s)

  def index(b, group, visit):
    place = (visit.j, visit.i) if kernel.per_query else (0, visit.j)
    example = b if kernel.per_example else 0
    return (example, group if kernel.per_head else 0, *place)

  result = launch(
    kernel,
    name="flash_attention_tpu_bias_gradient",
    problem=problem,
    tiles=tiles,
    schedule=schedule,
    inputs=residuals.operands(extras, problem, tiles),
    outputs={
      "dbias": Operand(jax.ShapeDtypeStruct(shape, jnp.float32), block, index)
    },
    scratch=kernel.scratch(),
    # Visits come by column: sums by key find their terms together, too.
    order=(*kernel.kept, VISIT, *kernel.summed),
    parallel=kernel.kept,
  )["dbias"]
  if kernel.per_query:
    result = result.swapaxes(2, 3)
  return result[:, :, : problem.t if t > 1 else 1, : problem.s]
