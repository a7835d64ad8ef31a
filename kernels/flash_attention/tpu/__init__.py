"""TPU backend: Pallas kernels for Mosaic. Native layout: "bhdt".

Operands in that layout are read as they are; other layouts are transposed by
XLA, which often makes the projections write what the kernels read.

`forward.py` and `backward.py` hold the kernels, `scores.py` what happens to a
score, `relative.py` terms of relative positions, `schedule.py` which tiles are
visited, `tiles.py` how large they are.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.flash_attention.backend import Gradients
from kernels.flash_attention.capabilities import Capabilities, Sides
from kernels.flash_attention.layouts import relayout, sizes
from kernels.flash_attention.options import Extras, Options, Unsupported
from kernels.flash_attention.relative import Relative
from kernels.flash_attention.tpu import backward as backward_kernel
from kernels.flash_attention.tpu import (
  bias_gradient,
  operands,
  schedule,
  sparse,
  tiles,
)
from kernels.flash_attention.tpu import forward as forward_kernel
from kernels.flash_attention.tpu.problem import (
  KERNEL_DTYPES,
  LANES,
  NATIVE,
  Problem,
  describe,
)

__all__ = ["CAPABILITIES", "backward", "forward"]

_PACKED = 16  # sublanes of a packed bfloat16 register


def _refuse_tiles(
  extras: Extras, options: Options, block: tuple[int, int] | None
) -> None:
  """Refuses tiles that cut what the blocks of a mask make up."""
  if options.tiles is None or block is None:
    return
  whole = sparse.tile(block)
  if any(size % tile for size, tile in zip(whole, options.tiles)):
    raise Unsupported(
      f"tiles={options.tiles} do not divide block_mask's tiles {whole}."
    )


def _refuse_entries(extras: Extras) -> None:
  """Refuses products with entries that leave no room in VMEM."""
  products = (extras.relative or Relative())._replace(bias=None)
  needed = {
    f"relative_{name}": 8 * x.shape[2] * x.shape[3]
    for name, x in products._asdict().items()
    if x is not None
  }
  if sum(needed.values()) > tiles.RELATIVE_BYTES:
    raise Unsupported(
      f"{', '.join(needed)}: the entries of a head and their gradients take"
      f" {sum(needed.values())} bytes of VMEM; tpu has"
      f" {tiles.RELATIVE_BYTES} for them."
    )


def _refuse_more(
  extras: Extras, options: Options, block: tuple[int, int] | None
) -> None:
  _refuse_tiles(extras, options, block)
  _refuse_entries(extras)


CAPABILITIES = Capabilities(
  "tpu",
  generators=("counter", "hardware"),
  tiles=Sides(f"multiples of {LANES}", lambda size: size % LANES == 0),
  blocks=sparse.SIDES,
  lone_blocks=False,
  refuse_more=_refuse_more,
)


def _dtype(q: jax.Array, k: jax.Array, v: jax.Array) -> jnp.dtype:
  """What the products take: bfloat16 if everything is, else float32."""
  dtype = jnp.result_type(q, k, v)
  return dtype if dtype in KERNEL_DTYPES else jnp.dtype(jnp.float32)


def _native(x: jax.Array, layout: str, dtype: jnp.dtype) -> jax.Array:
  """An operand as the kernels want it."""
  x = relayout(x, layout, NATIVE).astype(dtype)
  return operands.pad(x, 2, -(-x.shape[2] // _PACKED) * _PACKED)


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse): see `kernels.flash_attention.backend`."""
  dtype = _dtype(q, k, v)
  native = [_native(x, options.layout, dtype) for x in (q, k, v)]
  problem = describe(*native, extras, options)
  chosen = tiles.choose(problem, by_column=False)
  visits = schedule.build(problem, chosen, extras.block_mask, by_column=False)
  out, lse = forward_kernel.forward(*native, extras, problem, chosen, visits)
  out = out[:, :, : sizes(q, k, v, options.layout).dv].astype(v.dtype)
  return relayout(out, NATIVE, options.layout), lse


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array | None,
) -> Gradients:
  """Gradients: see `kernels.flash_attention.backend`. dlse may be None."""
  dtype = _dtype(q, k, v)
  native = [_native(x, options.layout, dtype) for x in (q, k, v, out, dout)]
  residuals = backward_kernel.Residuals(*native, lse, dlse)
  problem = describe(*native[:3], extras, options)
  found = _gradients(residuals, extras, problem)

  def back(x, like):
    x = x[:, :, : like.shape[options.layout.index("d")]].astype(like.dtype)
    return relayout(x, NATIVE, options.layout)

  return Gradients(
    *(back(x, like) for x, like in zip(found[:3], (q, k, v))),
    *(
      None if like is None else x.astype(like.dtype)
      for x, like in zip(found[3:5], (extras.bias, extras.alibi_slopes))
    ),
    extras.relative
    and extras.relative.map(lambda y, x: x.astype(y.dtype), found.relative),
  )


def _gradients(
  residuals: backward_kernel.Residuals, extras: Extras, problem: Problem
) -> Gradients:
  """Gradients in layout "bhdt", of parts of the queries if need be."""
  parts = list(_parts(residuals, extras, problem))
  if len(parts) == 1:
    return _part_gradients(*parts[0].call, exact=False)
  found = [_part_gradients(*part.call, exact=True) for part in parts]

  def total(name):
    return sum(getattr(x, name) for x in found)

  bias, relative = extras.bias, extras.relative
  if bias is not None and problem.bias[2] == 1:
    bias = total("bias")
  elif bias is not None:
    bias = jnp.concatenate([x.bias for x in found], axis=2)
  if relative is not None:
    relative = relative.map(lambda x: jnp.zeros(x.shape, jnp.float32))
    for part, x in zip(parts, found):
      scores = problem.t, part.rows, (0, problem.s)
      relative = relative.with_part(x.relative, *scores)
  return Gradients(
    jnp.concatenate([x.q for x in found], axis=3),
    total("k"),
    total("v"),
    bias,
    None if extras.alibi_slopes is None else total("alibi_slopes"),
    relative,
  )


class _Part(NamedTuple):
  """Some of the queries: the first, their number, and what their call takes."""

  rows: tuple[int, int]
  call: tuple[backward_kernel.Residuals, Extras, Problem]


def _parts(
  residuals: backward_kernel.Residuals, extras: Extras, problem: Problem
) -> Iterator[_Part]:
  """Parts of the queries whose dq, in float32, fits in VMEM."""
  unit = tiles.item(problem)[0]
  if problem.block is not None:
    unit = math.lcm(unit, *problem.block)
  size = max(tiles.DQ_BYTES // (4 * problem.d) // unit, 1) * unit
  if problem.t <= size:
    yield _Part((0, problem.t), (residuals, extras, problem))
    return
  for start in range(0, problem.t, size):
    rows = slice(start, min(start + size, problem.t))
    count = rows.stop - start
    part = dataclasses.replace(
      problem,
      t=count,
      offset=None if problem.offset is None else problem.offset + start,
    )
    own = _part_extras(extras, rows, problem)
    yield _Part((start, count), (residuals.part(rows), own, part))


def _part_extras(extras: Extras, rows: slice, problem: Problem) -> Extras:
  """What belongs to a part of the queries."""
  block, changes = problem.block, {}
  if extras.bias is not None and extras.bias.shape[2] > 1:
    changes["bias"] = extras.bias[:, :, rows]
  if extras.relative is not None:
    place = (rows.start, rows.stop - rows.start), (0, problem.s)
    changes["relative"] = extras.relative.part(problem.t, *place)
  if extras.q_segments is not None:
    changes["q_segments"] = extras.q_segments[:, rows]
  if extras.block_mask is not None:
    blocks = slice(rows.start // block[0], -(-rows.stop // block[0]))
    changes["block_mask"] = extras.block_mask[:, blocks]
  if extras.seed is not None:
    moved = np.array([0, 0, 0, 0, rows.start, 0], np.uint32)
    changes["seed"] = extras.seed + moved
  if extras.offset is not None:
    changes["offset"] = extras.offset + rows.start
  return extras._replace(**changes)


def _part_gradients(
  residuals: backward_kernel.Residuals,
  extras: Extras,
  problem: Problem,
  exact: bool,
) -> Gradients:
  """Gradients by the kernels; those of k and v in float32 if `exact`."""
  mask = extras.block_mask
  chosen = tiles.choose(problem, by_column=True)
  visits = schedule.build(problem, chosen, mask, by_column=True)
  found = backward_kernel.backward(
    residuals, extras, problem, chosen, visits, exact
  )
  bias, slopes = None, extras.alibi_slopes
  if slopes is not None:
    slopes = found["dslopes"].sum(0) if slopes.ndim == 1 else found["dslopes"]
  if extras.bias is not None:
    chosen = tiles.for_bias(problem)
    visits = schedule.build(problem, chosen, mask, by_column=True, every=True)
    bias = bias_gradient.bias_gradient(
      residuals, extras, problem, chosen, visits
    )
  return Gradients(
    found["dq"], found["dk"], found["dv"], bias, slopes, found["relative"]
  )
