"""FlashAttention for NVIDIA and AMD GPUs, in Pallas's Triton.

One kernel forward; backward one for dk and dv and one for dq, so that no sum
needs atomics and results repeat bit for bit. A bias costs a third, which XLA
drops when nobody asks for its gradient.

Tiles: chosen so that ptxas for sm_90a spills no register (`tests/kernels`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.flash_attention import gpu_kernels
from kernels.flash_attention.backend import Gradients, delta
from kernels.flash_attention.block_mask import table, tile_map
from kernels.flash_attention.capabilities import Capabilities, Sides
from kernels.flash_attention.gpu_kernels import LOG2E, Problem
from kernels.flash_attention.layouts import relayout, sizes
from kernels.flash_attention.options import Extras, Options, block_size

MIN_TILE = 16  # what a tensor core multiplies


class Launch(NamedTuple):
  """Tile sizes, and how a program is run."""

  rows: int
  columns: int
  warps: int
  stages: int


# By direction and bytes of an input's element: up to which head width, what.
# None spills registers on an H100 at widths 32, 64, 96, 128, 192 and 256, with
# no option, with BERT's, with all of them.
LAUNCHES = {
  ("forward", 2): (
    (64, Launch(128, 64, 4, 3)),
    (128, Launch(128, 64, 8, 2)),
    (256, Launch(64, 32, 8, 2)),
  ),
  ("forward", 4): (
    (64, Launch(32, 32, 4, 2)),
    (128, Launch(16, 16, 4, 2)),
    (256, Launch(32, 16, 8, 1)),
  ),
  ("backward", 2): (
    (64, Launch(64, 64, 4, 2)),
    (128, Launch(64, 64, 8, 1)),
    (256, Launch(16, 32, 4, 1)),
  ),
  ("backward", 4): (
    (64, Launch(32, 32, 4, 1)),
    (128, Launch(32, 32, 8, 1)),
    (256, Launch(16, 32, 8, 2)),
  ),
}


CAPABILITIES = Capabilities(
  "gpu",
  dtypes=(jnp.float32, jnp.bfloat16, jnp.float16),
  max_width=256,
  relative=False,
  tiles=Sides(
    f"powers of two from {MIN_TILE}",
    lambda size: size >= MIN_TILE and not size & (size - 1),
  ),
  blocks=Sides(f"multiples of {MIN_TILE}", lambda size: size % MIN_TILE == 0),
)


def _busy(extras: Extras, options: Options) -> bool:
  """Whether scores are changed by what needs registers of its own."""
  return bool(
    extras.bias is not None
    or extras.alibi_slopes is not None
    or options.softcap is not None
    or options.dropout_rate
  )


def _launch(direction: str, q, n, extras, options) -> Launch:
  width = max(n.d, n.dv)
  choices = LAUNCHES[direction, q.dtype.itemsize]
  launch = next(x for limit, x in choices if width <= limit)
  if _busy(extras, options):
    launch = launch._replace(columns=max(MIN_TILE, launch.columns // 2))
  if options.tiles is not None:
    return launch._replace(rows=options.tiles[0], columns=options.tiles[1])
  fitted = []
  for axis, (tile, length) in enumerate(
    ((launch.rows, n.t), (launch.columns, n.s))
  ):
    tile = min(tile, max(MIN_TILE, pl.next_power_of_2(length)))
    if extras.block_mask is not None and extras.block_mask.shape[axis + 1] > 1:
      block = block_size(extras, options, n.t, n.s)[axis]
      tile = min(tile, block & -block)  # largest power of two in it
    fitted.append(tile)
  return launch._replace(rows=fitted[0], columns=fitted[1])


def _width(x: int) -> int:
  return max(MIN_TILE, pl.next_power_of_2(x))


class _Call(NamedTuple):
  """Everything that the kernels of a pass have in common."""

  p: Problem
  launch: Launch
  arrays: dict[str, jax.Array]
  specs: dict[str, pl.BlockSpec]

  def run(self, kernel, grid, shapes, **more):
    """Runs a kernel that writes arrays of these ShapeDtypeStructs."""
    call = pl.pallas_call(
      functools.partial(kernel, p=self.p),
      grid=grid,
      in_specs=[self.specs],
      out_specs=[self.spec(x.shape, letters) for x, letters in shapes],
      out_shape=[x for x, _ in shapes],
      compiler_params=plgpu.CompilerParams(
        num_warps=self.launch.warps, num_stages=self.launch.stages
      ),
      interpret=self.p.options.interpret,
      name=f"flash_attention_{kernel.__name__}",
    )
    with jax.enable_x64(False):  # indices are 32 bits wide
      return call(self.arrays)

  def spec(self, shape, letters: str) -> pl.BlockSpec:
    return _whole(self.p, shape, letters)


def _whole(p: Problem, shape, letters: str) -> pl.BlockSpec:
  """The whole array, rounded up to tiles; loads mask what does not exist."""
  up = {
    "t": p.row_tiles * p.rows,
    "s": p.column_tiles * p.columns,
    "d": p.d,
    "w": p.dv,
  }
  block = [up.get(c, size) for c, size in zip(letters, shape)]
  return pl.BlockSpec(block, lambda *_: (0,) * len(block))


def _prepare(direction, q, k, v, extras, options, **more) -> _Call:
  n = sizes(q, k, v, options.layout)
  launch = _launch(direction, q, n, extras, options)
  p = Problem(
    n, options, launch.rows, launch.columns, _width(n.d), _width(n.dv)
  )
  rows = options.layout
  columns = rows.replace("t", "s")
  inputs = {
    "q": (q, rows),
    "k": (k, columns),
    "v": (v, columns.replace("d", "w")),
    **more,
  }
  if extras.bias is not None:
    inputs["bias"] = extras.bias, _bias_letters(extras.bias)
  if extras.alibi_slopes is not None:
    slopes = extras.alibi_slopes.astype(jnp.float32).reshape(-1, n.h)
    inputs["slopes"] = slopes, "--"
  if extras.q_segments is not None:
    inputs["q_ids"] = extras.q_segments, "-t"
    inputs["kv_ids"] = extras.kv_segments, "-s"
  if options.dropout_rate:
    inputs["seed"] = extras.seed, "-"
  if extras.offset is not None:
    inputs["offset"] = extras.offset.reshape(1), "-"
  inputs |= _tables(p, extras, options)
  arrays = {name: jnp.asarray(x) for name, (x, _) in inputs.items()}
  specs = {
    name: _whole(p, x.shape, letters) for name, (x, letters) in inputs.items()
  }
  return _Call(p, launch, arrays, specs)


def _bias_letters(bias: jax.Array) -> str:
  return "--ts" if bias.shape[2] > 1 else "---s"


def _tables(p: Problem, extras, options) -> dict:
  """Tables of the tiles to visit, if that is not all of them."""
  if not (
    options.causal
    or options.window is not None
    or extras.block_mask is not None
  ):
    return {}
  active = tile_map(p.n, extras, options, p.rows, p.columns).active
  by_row, by_column = table(active), table(active.swapaxes(1, 2))
  return {
    "rows_count": (by_row.count, "--"),
    "rows_index": (by_row.index, "---"),
    "columns_count": (by_column.count, "--"),
    "columns_index": (by_column.index, "---"),
    "active": (active.astype(jnp.int32), "---"),
  }


def _native(layout: str) -> str:
  """The layout that the kernels read; "bhdt" has to be transposed."""
  return "bhtd" if layout == "bhdt" else layout


def forward(
  q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, options: Options
) -> tuple[jax.Array, jax.Array]:
  """Output and lse."""
  layout = _native(options.layout)
  q, k, v = (relayout(x, options.layout, layout) for x in (q, k, v))
  inner = dataclasses.replace(options, layout=layout)
  call = _prepare("forward", q, k, v, extras, inner)
  n = call.p.n
  shape = dict(zip(layout, q.shape)) | {"d": n.dv}
  out, lse = call.run(
    gpu_kernels.forward,
    (call.p.row_tiles, n.h, n.b),
    [
      (
        jax.ShapeDtypeStruct(tuple(shape[c] for c in layout), v.dtype),
        layout.replace("d", "w"),
      ),
      (jax.ShapeDtypeStruct((n.b, n.h, n.t), jnp.float32), "--t"),
    ],
  )
  return relayout(out, layout, options.layout), lse


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> Gradients:
  """All gradients."""
  layout = _native(options.layout)
  rest = delta(out, dout, dlse, options.layout)
  q, k, v, dout = (relayout(x, options.layout, layout) for x in (q, k, v, dout))
  inner = dataclasses.replace(options, layout=layout)
  call = _prepare(
    "backward",
    q,
    k,
    v,
    extras,
    inner,
    do=(dout.astype(v.dtype), layout.replace("d", "w")),
    # Rows that saw nothing: exp2(score - inf) = 0.
    lse=(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), "--t"),
    rest=(rest, "--t"),
  )
  p, n = call.p, call.p.n
  like = jax.ShapeDtypeStruct.like
  columns = layout.replace("t", "s")
  dk, dv = call.run(
    gpu_kernels.dkv,
    (p.column_tiles, n.kv_heads, n.b),
    [(like(k), columns), (like(v), columns.replace("d", "w"))],
  )
  row_shapes = [(like(q), layout)]
  if extras.alibi_slopes is not None:
    row_shapes.append((like(lse), "--t"))
  dq, *falls = call.run(gpu_kernels.dq, (p.row_tiles, n.h, n.b), row_shapes)
  dslopes = None
  if falls:
    slopes = extras.alibi_slopes
    dslopes = falls[0].sum(-1) if slopes.ndim == 2 else falls[0].sum((0, 2))
    dslopes = dslopes.astype(slopes.dtype)
  dbias = None
  if extras.bias is not None:
    bias = extras.bias
    lines = p.row_tiles if bias.shape[2] > 1 else 1
    (dbias,) = call.run(
      gpu_kernels.dbias,
      (lines, p.column_tiles, bias.shape[0] * bias.shape[1]),
      [(like(bias), _bias_letters(bias))],
    )
  grads = (relayout(x, layout, options.layout) for x in (dq, dk, dv))
  return Gradients(*grads, dbias, dslopes)
