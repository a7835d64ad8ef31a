"""Forward pass: softmax with running statistics over tiles of keys.

All is transposed, so that nothing needs to be: with q, k, v as [width, length]
the scores are S^T = K Q^T [keys, queries], whose statistics per query are row
vectors along the lanes, and the output is O^T = V P^T with P^T as the matrix
unit's stationary operand: its 128 x 128 tiles are full whatever the head width.
Only K is transposed on the way, an eighth of the scores' size at length 512.

Without dropout the sum of the weights comes from the matrix unit, for V gets
rows of ones: an addition less per score for the vector unit, and the sum of the
very numbers that are multiplied by V.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.options import Extras
from kernels.flash_attention.tpu import operands, relative
from kernels.flash_attention.tpu.items import Item, items, multiple
from kernels.flash_attention.tpu.launch import Operand, Step, launch
from kernels.flash_attention.tpu.pipeline import dot, pipeline, when_visited
from kernels.flash_attention.tpu.problem import LANES, LOG2E, Problem
from kernels.flash_attention.tpu.schedule import (
  COMPUTE,
  ROW_FIRST,
  ROW_LAST,
  Schedule,
)
from kernels.flash_attention.tpu.scores import HIDDEN, Scores
from kernels.flash_attention.tpu.tiles import Tiles

ONES = 16  # rows of ones under V: one packed bfloat16 register


class _Kernel:
  """The forward kernel of one call; called with a step and its refs."""

  def __init__(self, problem: Problem, tiles: Tiles, schedule: Schedule):
    self.problem, self.tiles, self.schedule = problem, tiles, schedule
    # With one visit per row the statistics never leave the step.
    self.direct = schedule.one_row_visit and schedule.computes is True
    self.dropped = problem.options.dropout_rate > 0
    self.guarded = problem.hides or schedule.computes is not True

  def scratch(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the running statistics and output."""
    if self.direct:
      return {}
    heads, t = self.tiles.heads, self.tiles.t
    return {
      "top": (heads, 1, t),
      "total": (heads, 1, t),
      "sum_v": (heads, self.problem.dv, t),
    }

  def __call__(self, step: Step, refs: Any) -> None:
    when_visited(
      self.schedule, step.visit, lambda masked: self._run(step, refs, masked)
    )
    if self.direct:
      return
    if self.schedule.computes is None:
      first, computes = step.visit.has(ROW_FIRST), step.visit.has(COMPUTE)

      @pl.when(first & ~computes)
      def _():
        refs.top[...] = jnp.full_like(refs.top, HIDDEN)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.sum_v[...] = jnp.zeros_like(refs.sum_v)

    @pl.when(step.visit.has(ROW_LAST))
    def _():
      for head in range(self.tiles.heads):
        for t in range(0, self.tiles.t, self.tiles.t_item):
          item = Item(head, t, 0)
          self._write(refs, item, self._load(refs, item))

  def _place(self, item: Item) -> tuple:
    return item.head, slice(None), pl.ds(item.t, self.tiles.t_item)

  def _load(self, refs: Any, item: Item) -> tuple[jax.Array, ...]:
    place = self._place(item)
    return refs.top[place], refs.total[place], refs.sum_v[place]

  def _write(self, refs: Any, item: Item, state: tuple) -> None:
    """Output and lse of an item's queries."""
    top, total, sum_v = state
    place = (0, *self._place(item))
    kept = 1.0 - self.problem.options.dropout_rate
    inverse = 1.0 / (total * kept)
    lse = (top * self.problem.unit + jnp.log2(total)) * (1.0 / LOG2E)
    if self.guarded:
      # Where all is hidden, all is equal: weights are 1 and mean nothing.
      seen = top > HIDDEN
      inverse = jnp.where(seen, inverse, 0.0)
      lse = jnp.where(seen, lse, -jnp.inf)
    refs.out[place] = (sum_v * inverse).astype(refs.out.dtype)
    refs.lse[place] = lse

  def _run(self, step: Step, refs: Any, masked: bool) -> None:
    scores = Scores(self.problem, self.tiles, step, refs, masked)
    keys = _Keys(self.problem, self.tiles, step, refs, not self.dropped)
    state = {}

    def product(item):
      q, k = refs.q[0, *self._place(item)], keys(item)[0]
      s = dot(self.problem, k, q, (1, 0))
      return s, scores.terms.products(item, q, k)

    def softmax(item, products):
      s = scores.terms.add_products(*products)
      place = (item.head, item.t)
      before = state.get(place)
      if before is None and not self.direct:
        before = self._before(step, refs, item)
      after = self._update(scores, keys(item)[1], item, s, before)
      state[place] = after
      if item.s + self.tiles.s_item < self.tiles.s:
        return
      if self.direct:
        self._write(refs, item, after)
      else:
        place = self._place(item)
        refs.top[place], refs.total[place], refs.sum_v[place] = after

    pipeline(items(self.tiles), self.tiles.ahead, product, softmax)

  def _before(self, step: Step, refs: Any, item: Item) -> tuple:
    """What earlier visits left of a row, or its start."""
    fresh = step.visit.has(ROW_FIRST)
    top, total, sum_v = self._load(refs, item)
    return (
      jnp.where(fresh, HIDDEN, top),
      jnp.where(fresh, 0.0, total),
      jnp.where(fresh, 0.0, sum_v),
    )

  def _update(
    self,
    scores: Scores,
    v: jax.Array,
    item: Item,
    product: jax.Array,
    before: tuple | None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maximum, sum of weights, weighted sum of V after an item's keys."""
    z, _ = scores.logits(product, item)
    visible = scores.visible(item)
    if visible is not None:
      z = jnp.where(visible, z, HIDDEN)
    top = z.max(0, keepdims=True)
    if before is not None:
      top = jnp.maximum(top, before[0])
    weights = self._exp(z - top)
    total, sum_v = self._weigh(scores, v, item, weights)
    if before is not None:
      decay = self._exp(before[0] - top)
      total = total + decay * before[1]
      sum_v = sum_v + decay * before[2]
    return top, total, sum_v

  def _exp(self, x: jax.Array) -> jax.Array:
    unit = self.problem.unit
    return jnp.exp2(x if unit == 1.0 else x * unit)

  def _weigh(
    self, scores: Scores, v: jax.Array, item: Item, weights: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Sum of the weights, and sum of V by the weights that dropout keeps."""
    if self.dropped:
      total = weights.sum(0, keepdims=True)
      weights = jnp.where(scores.kept(item), weights, 0.0)
      sum_v = dot(self.problem, v, weights.astype(v.dtype), (1, 0))
      return total, sum_v
    both = dot(self.problem, v, weights.astype(v.dtype), (1, 0))
    dv = self.problem.dv
    return both[dv : dv + 1], both[:dv]


class _Keys:
  """K transposed, and V with ones if `summed`: once per step and key head."""

  def __init__(
    self,
    problem: Problem,
    tiles: Tiles,
    step: Step,
    refs: Any,
    summed: bool,
  ):
    self._problem, self._tiles, self._refs = problem, tiles, refs
    self._summed = summed
    self._start = step.visit.j * tiles.s if tiles.whole else 0
    self._made = {}

  def __call__(self, item: Item) -> tuple[jax.Array, jax.Array]:
    head = operands.local_key_head(self._problem, self._tiles, item.head)
    key = (head, item.s)
    if key not in self._made:
      start = multiple(self._start + item.s, LANES)
      place = (0, head, slice(None), pl.ds(start, self._tiles.s_item))
      k, v = self._refs.k[place], self._refs.v[place]
      if self._summed:
        ones = jnp.ones((ONES, v.shape[1]), v.dtype)
        v = jnp.concatenate([v, ones], axis=0)
      self._made[key] = k.T, v
    return self._made[key]


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  problem: Problem,
  tiles: Tiles,
  schedule: Schedule,
) -> tuple[jax.Array, jax.Array]:
  """(out [b, h, dv, t], lse float32 [b, h, t]) of arrays in layout "bhdt"."""
  inputs = {
    "q": operands.queries(q, tiles, whole=False),
    "k": operands.keys(k, problem, tiles, tiles.whole),
    "v": operands.keys(v, problem, tiles, tiles.whole),
    **operands.shared(extras, problem, tiles),
    **relative.inputs(extras, problem, tiles),
  }

  def output(width, dtype):
    shape = (problem.b, problem.h, width, tiles.t_pad)
    like = jax.ShapeDtypeStruct(shape, dtype)
    return Operand(
      like,
      (1, tiles.heads, width, tiles.t),
      lambda b, group, visit: (b, group, 0, visit.i),
    )

  kernel = _Kernel(problem, tiles, schedule)
  results = launch(
    kernel,
    name="flash_attention_tpu_forward",
    problem=problem,
    tiles=tiles,
    schedule=schedule,
    inputs=inputs,
    outputs={
      "out": output(problem.dv, v.dtype),
      "lse": output(1, jnp.float32),
    },
    scratch=kernel.scratch(),
    order=relative.order(problem),
  )
  t = problem.t
  return results["out"][..., :t], results["lse"][:, :, 0, :t]
