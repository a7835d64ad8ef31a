"""Backward pass: dq, dk and dv in one kernel, from five products.

Tiles are visited column by column. dk and dv of a column are summed in scratch
over its rows; dq of a whole head stays in scratch until its last visits. So the
scores and their gradient are computed once, where separate kernels for dq and
for dk, dv would do so twice, and every array crosses HBM once.

In the layout [width, length] the five products need no transposition but that
of K and V:

    S^T = K Q^T     dP^T = V dO^T      [keys, queries]
    dQ^T = K^T dS^T                    [width, queries]
    dK^T = Q^T dS   dV^T = dO^T P      [width, keys]

dS^T and P^T are the stationary operands of the last three, in full tiles.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.options import Extras
from kernels.flash_attention.tpu import operands, relative
from kernels.flash_attention.tpu.items import Item, items, multiple
from kernels.flash_attention.tpu.launch import (
  GROUP,
  B,
  Operand,
  Step,
  launch,
)
from kernels.flash_attention.tpu.pipeline import (
  Sums,
  dot,
  pipeline,
  when_visited,
)
from kernels.flash_attention.tpu.problem import LANES, LOG2E, Problem
from kernels.flash_attention.tpu.relative import Terms
from kernels.flash_attention.tpu.schedule import (
  COL_FIRST,
  COL_LAST,
  COMPUTE,
  ROW_FIRST,
  ROW_LAST,
  Schedule,
)
from kernels.flash_attention.tpu.scores import Scores
from kernels.flash_attention.tpu.tiles import Tiles

EVERYTHING = (slice(None),) * 3
UNSEEN = 1e30  # lse of a query that sees no key: makes its weights 0


class Residuals(NamedTuple):
  """Arrays of the forward pass in layout "bhdt", lse [b, h, t], cotangents."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  out: jax.Array
  dout: jax.Array
  lse: jax.Array
  dlse: jax.Array | None

  def part(self, rows: slice) -> "Residuals":
    """Those of some of the queries."""
    changes = {n: getattr(self, n)[..., rows] for n in ("q", "out", "dout")}
    changes["lse"] = self.lse[..., rows]
    if self.dlse is not None:
      changes["dlse"] = self.dlse[..., rows]
    return self._replace(**changes)

  def operands(
    self, extras: Extras, problem: Problem, tiles: Tiles
  ) -> dict[str, Operand]:
    """Operands of a kernel that recomputes the weights."""
    rows = {"q": self.q, "out": self.out, "dout": self.dout}
    # Queries that pad see nothing, however large a key's bias is.
    padding = ((0, 0), (0, 0), (0, tiles.t_pad - self.lse.shape[2]))
    lse = jnp.pad(self.lse, padding, constant_values=-jnp.inf)
    rows["lse"] = lse[:, :, None]
    if self.dlse is not None:
      rows["dlse"] = self.dlse[:, :, None]
    inputs = {
      name: operands.queries(x, tiles, tiles.whole) for name, x in rows.items()
    }
    inputs["k"] = operands.keys(self.k, problem, tiles, whole=False)
    inputs["v"] = operands.keys(self.v, problem, tiles, whole=False)
    inputs |= operands.shared(extras, problem, tiles)
    return inputs | relative.inputs(extras, problem, tiles)


class Weights:
  """P and dS of a step's items, from the residuals of the forward pass."""

  def __init__(
    self, problem: Problem, tiles: Tiles, step: Step, refs: Any, masked: bool
  ):
    self._problem, self._tiles, self._refs = problem, tiles, refs
    self.scores = Scores(problem, tiles, step, refs, masked)
    self._start = step.visit.i * tiles.t if tiles.whole else 0
    self._keys, self._rows = {}, {}

  def queries(self, item: Item) -> tuple:
    """Index of the item's queries in the refs of whole heads."""
    start = multiple(self._start + item.t, LANES)
    return 0, item.head, slice(None), pl.ds(start, self._tiles.t_item)

  def keys(self, item: Item) -> tuple[jax.Array, jax.Array, jax.Array]:
    """K [d, keys], and K and V transposed."""
    head = operands.local_key_head(self._problem, self._tiles, item.head)
    key = (head, item.s)
    if key not in self._keys:
      place = (0, head, slice(None), pl.ds(item.s, self._tiles.s_item))
      k, v = self._refs.k[place], self._refs.v[place]
      self._keys[key] = k, k.T, v.T
    return self._keys[key]

  def rows(self, item: Item) -> tuple[jax.Array, jax.Array]:
    """lse in base 2, and D = rowsum(dO O) - dlse, each [1, t_item]."""
    key = (item.head, item.t)
    if key not in self._rows:
      place, refs = self.queries(item), self._refs
      lse = refs.lse[place]
      seen = lse > -jnp.inf
      lse = jnp.where(seen, lse * LOG2E, UNSEEN)
      out, dout = (x[place].astype(jnp.float32) for x in (refs.out, refs.dout))
      delta = (out * dout).sum(0, keepdims=True)
      if hasattr(refs, "dlse"):
        delta = delta - refs.dlse[place]
      # log(0) upstream makes dlse NaN where nothing is seen.
      self._rows[key] = lse, jnp.where(seen, delta, 0.0)
    return self._rows[key]

  def products(self, item: Item) -> tuple[jax.Array, jax.Array]:
    """K Q^T and V dO^T."""
    place = self.queries(item)
    _, k, v = self.keys(item)
    q = self._refs.q[place]
    s = dot(self._problem, k, q, (1, 0))
    s = s, self.scores.terms.products(item, q, k)
    return s, dot(self._problem, v, self._refs.dout[place], (1, 0))

  def __call__(
    self, item: Item, s: jax.Array, dp: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """(P after dropout, dS), both without dropout's factor 1 / (1 - rate)."""
    rate = self._problem.options.dropout_rate
    lse, delta = self.rows(item)
    s = self.scores.terms.add_products(*s)
    z, slope = self.scores.logits(s, item)
    unit = self._problem.unit
    p = jnp.exp2((z if unit == 1.0 else z * unit) - lse)
    visible = self.scores.visible(item)
    if visible is not None:
      p = jnp.where(visible, p, 0.0)
    kept = p
    if rate:
      keep = self.scores.kept(item)
      kept = jnp.where(keep, p, 0.0)
      dp = jnp.where(keep, dp, 0.0)
      delta = delta * (1.0 - rate)
    ds = p * (dp - delta)
    return kept, ds if slope is None else ds * slope


class _Kernel:
  """The backward kernel of one call; called with a step and its refs."""

  def __init__(self, problem: Problem, tiles: Tiles, schedule: Schedule):
    self.problem, self.tiles, self.schedule = problem, tiles, schedule
    some = schedule.computes is None
    self.keep_rows = some or not schedule.one_row_visit
    self.keep_columns = some or not schedule.one_column_visit
    inverse = 1.0 / (1.0 - problem.options.dropout_rate)
    self.factors = {
      "dq": problem.options.scale * inverse,
      "dk": problem.options.scale * inverse,
      "dv": inverse,
      "dslopes": -inverse,
    }

  @property
  def row_names(self) -> tuple[str, ...]:
    return ("dq", "dslopes") if self.problem.slopes else ("dq",)

  def scratch(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the sums that outlive a step."""
    problem, tiles, shapes = self.problem, self.tiles, {}
    if self.keep_rows:
      shapes["dq_sum"] = (tiles.heads, problem.d, tiles.t_pad)
      if problem.slopes:
        shapes["dslopes_sum"] = (tiles.heads, 1, tiles.t_pad)
    if self.keep_columns:
      heads = operands.key_heads(problem, tiles)
      shapes["dk_sum"] = (heads, problem.d, tiles.s)
      shapes["dv_sum"] = (heads, problem.dv, tiles.s)
    return shapes

  def __call__(self, step: Step, refs: Any) -> None:
    Terms(self.problem, self.tiles, step, refs).clear()
    if self.schedule.computes is None:
      self._clear(step, refs)
    when_visited(
      self.schedule, step.visit, lambda masked: self._run(step, refs, masked)
    )
    visit, tiles = step.visit, self.tiles
    if self.keep_rows:

      @pl.when(visit.has(ROW_LAST))
      def _():
        rows = pl.ds(multiple(visit.i * tiles.t, LANES), tiles.t)
        for name in self.row_names:
          total = getattr(refs, name + "_sum")[:, :, rows]
          self._put(refs, name, EVERYTHING, total)

    if self.keep_columns:

      @pl.when(visit.has(COL_LAST))
      def _():
        for name in ("dk", "dv"):
          total = getattr(refs, name + "_sum")[...]
          self._put(refs, name, EVERYTHING, total)

  def _put(self, refs: Any, name: str, place: tuple, value: jax.Array) -> None:
    out = getattr(refs, name)
    out[(0, *place)] = (value * self.factors[name]).astype(out.dtype)

  def _clear(self, step: Step, refs: Any) -> None:
    """Zeros where the first visit does not compute."""
    visit = step.visit
    idle = ~visit.has(COMPUTE)

    @pl.when(visit.has(ROW_FIRST) & idle)
    def _():
      tiles = self.tiles
      rows = pl.ds(multiple(visit.i * tiles.t, LANES), tiles.t)
      for name in self.row_names:
        ref = getattr(refs, name + "_sum")
        shape = (*ref.shape[:2], tiles.t)
        ref[:, :, rows] = jnp.zeros(shape, jnp.float32)

    @pl.when(visit.has(COL_FIRST) & idle)
    def _():
      for name in ("dk_sum", "dv_sum"):
        ref = getattr(refs, name)
        ref[...] = jnp.zeros_like(ref)

  def _run(self, step: Step, refs: Any, masked: bool) -> None:
    problem, tiles = self.problem, self.tiles
    weights = Weights(problem, tiles, step, refs, masked)

    def row_done(name):
      def done(key, value):
        head, t = key
        if self.keep_rows:
          t = multiple(step.visit.i * tiles.t + t, LANES)
        place = (head, slice(None), pl.ds(t, tiles.t_item))
        kept = self.keep_rows
        self._add(refs, name, place, value, kept, step, ROW_FIRST)

      return done

    def column_done(name):
      def done(key, value):
        head, s = key
        place = (head, slice(None), pl.ds(s, tiles.s_item))
        kept = self.keep_columns
        self._add(refs, name, place, value, kept, step, COL_FIRST)

      return done

    per_row = tiles.s // tiles.s_item
    per_column = tiles.t // tiles.t_item
    per_column *= tiles.heads // operands.key_heads(problem, tiles)
    sums = {n: Sums(per_row, row_done(n)) for n in self.row_names}
    sums |= {n: Sums(per_column, column_done(n)) for n in ("dk", "dv")}

    def gradients(item, products):
      place = weights.queries(item)
      p, ds = weights(item, *products)
      head = operands.local_key_head(problem, tiles, item.head)
      row, column = (item.head, item.t), (head, item.s)
      if problem.slopes:
        moved = ds * weights.scores.distance(item)
        sums["dslopes"].add(row, moved.sum(0, keepdims=True))
      q, dout = refs.q[place], refs.dout[place]
      k = weights.keys(item)[0]
      more_dq, more_dk = weights.scores.terms.add_gradients(item, q, k, ds)
      p, ds = p.astype(problem.dtype), ds.astype(problem.dtype)
      dq = dot(problem, k, ds, (1, 0))
      dk = dot(problem, q, ds, (1, 1))
      sums["dq"].add(row, dq if more_dq is None else dq + more_dq)
      sums["dk"].add(column, dk if more_dk is None else dk + more_dk)
      sums["dv"].add(column, dot(problem, dout, p, (1, 1)))

    pipeline(items(tiles), tiles.ahead, weights.products, gradients)

  def _add(
    self,
    refs: Any,
    name: str,
    place: tuple,
    value: jax.Array,
    kept: bool,
    step: Step,
    first: int,
  ) -> None:
    """Adds a step's sum to those of other steps, or writes it out."""
    if not kept:
      self._put(refs, name, place, value)
      return
    ref = getattr(refs, name + "_sum")
    before = jnp.where(step.visit.has(first), 0.0, ref[place])
    ref[place] = before + value


def _outputs(problem: Problem, tiles: Tiles, exact: bool) -> dict[str, Operand]:
  """dq by head; dk and dv by program, which may be parts of a group."""
  programs = problem.h // tiles.heads
  key_heads = operands.key_heads(problem, tiles)
  parted = programs * key_heads > problem.kv_heads

  def row(width, dtype):
    shape = (problem.b, problem.h, width, tiles.t_pad)
    return Operand(
      jax.ShapeDtypeStruct(shape, dtype),
      (1, tiles.heads, width, tiles.t),
      lambda b, group, visit: (b, group, 0, visit.out_row),
    )

  def column(width):
    shape = (problem.b, programs * key_heads, width, tiles.s_pad)
    dtype = jnp.float32 if parted or exact else problem.dtype
    return Operand(
      jax.ShapeDtypeStruct(shape, dtype),
      (1, key_heads, width, tiles.s),
      lambda b, group, visit: (b, group, 0, visit.j),
    )

  outputs = {
    "dq": row(problem.d, problem.dtype),
    "dk": column(problem.d),
    "dv": column(problem.dv),
  }
  if problem.slopes:
    outputs["dslopes"] = row(1, jnp.float32)
  return outputs | relative.outputs(problem, tiles)


def backward(
  residuals: Residuals,
  extras: Extras,
  problem: Problem,
  tiles: Tiles,
  schedule: Schedule,
  exact: bool,
) -> dict[str, Any]:
  """dq, dk, dv in layout "bhdt"; with slopes dslopes [b, h]; and "relative",
  the gradients of the terms of relative positions.

  Args:
    residuals: arrays of the forward pass and cotangents.
    extras: optional arrays.
    problem: the call.
    tiles: its tiles.
    schedule: its visits, by column.
    exact: dk and dv in float32, as terms of further sums.
  """
  kernel = _Kernel(problem, tiles, schedule)
  results = launch(
    kernel,
    name="flash_attention_tpu_backward",
    problem=problem,
    tiles=tiles,
    schedule=schedule,
    inputs=residuals.operands(extras, problem, tiles),
    outputs=_outputs(problem, tiles, exact),
    scratch=kernel.scratch(),
    order=relative.order(problem),
    parallel=(GROUP,) if problem.relative else (B, GROUP),
  )
  dtype = jnp.float32 if exact else problem.dtype
  for name in ("dk", "dv"):
    parts = results[name][..., : problem.s]
    if parts.shape[1] != problem.kv_heads:
      shape = (problem.b, problem.kv_heads, -1, *parts.shape[2:])
      parts = parts.reshape(shape).sum(2)
    results[name] = parts.astype(dtype)
  results["dq"] = results["dq"][..., : problem.t]
  if problem.slopes:
    results["dslopes"] = results["dslopes"].sum((2, 3))
  results["relative"] = relative.gradients(results, extras, problem, tiles)
  return results
