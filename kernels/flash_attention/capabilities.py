"""What a backend can do, as data: one place that refuses the rest by name."""

import dataclasses
from collections.abc import Callable

import jax
from jax.typing import DTypeLike

from kernels.flash_attention.layouts import sizes
from kernels.flash_attention.options import (
  Extras,
  Options,
  Unsupported,
  block_size,
)


@dataclasses.dataclass(frozen=True)
class Sides:
  """Which sizes a side of a tile or block may have.

  Attributes:
    rule: in words.
    allows: whether a size will do.
  """

  rule: str
  allows: Callable[[int], bool]


@dataclasses.dataclass(frozen=True)
class Capabilities:
  """What a backend takes beyond what every backend does.

  Attributes:
    name: of the backend.
    generators: of dropout.
    dtypes: of q, k, v; None: any.
    max_width: of heads; None: any.
    relative: whether it takes terms of relative positions.
    tiles: sides of a tile that a caller may ask for; None: it has no tiles.
    blocks: sides of a block of the mask.
    lone_blocks: whether a block that spans a length alone may have any side.
    refuse_more: raises `Unsupported` for what no other field can tell.
  """

  name: str
  generators: tuple[str, ...] = ("counter",)
  dtypes: tuple[DTypeLike, ...] | None = None
  max_width: int | None = None
  relative: bool = True
  tiles: Sides | None = Sides("at least 1", lambda size: size > 0)
  blocks: Sides = Sides("at least 1", lambda size: size > 0)
  lone_blocks: bool = True
  refuse_more: Callable[[Extras, Options, tuple | None], None] | None = None


def refuse(
  can: Capabilities,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
) -> None:
  """Refuses what a backend cannot do.

  Raises:
    Unsupported: names the argument, its value, and what the backend takes.
  """
  n = sizes(q, k, v, options.layout)
  if can.max_width is not None and max(n.d, n.dv) > can.max_width:
    raise Unsupported(
      f"head widths {(n.d, n.dv)} exceed the {can.name} backend's"
      f" {can.max_width}."
    )
  for name, x in (("q", q), ("k", k), ("v", v)):
    if can.dtypes is not None and x.dtype not in can.dtypes:
      taken = ", ".join(str(jax.numpy.dtype(dtype)) for dtype in can.dtypes)
      raise Unsupported(
        f"{name} has dtype {x.dtype}; {can.name} takes {taken}."
      )
  if extras.relative is not None and not can.relative:
    given = extras.relative._asdict().items()
    names = [f"relative_{name}" for name, x in given if x is not None]
    raise Unsupported(f"{', '.join(names)}: {can.name} takes none.")
  if options.dropout_rate and options.dropout_generator not in can.generators:
    raise Unsupported(
      f"dropout_generator={options.dropout_generator!r} is not one of"
      f" {can.name}'s: {', '.join(can.generators)}."
    )
  tiles, block = options.tiles, None
  if tiles is not None and can.tiles is None:
    raise Unsupported(f"tiles={tiles}: {can.name} has none; leave it out.")
  if tiles is not None and not (
    len(tiles) == 2 and all(map(can.tiles.allows, tiles))
  ):
    raise Unsupported(
      f"tiles={tiles}: {can.name} takes (rows, columns), {can.tiles.rule}."
    )
  if extras.block_mask is not None:
    block = block_size(extras, options, n.t, n.s)
    counts = extras.block_mask.shape[1:]
    sides = [
      side
      for count, side in zip(counts, block)
      if count > 1 or not can.lone_blocks
    ]
    if not all(map(can.blocks.allows, sides)):
      raise Unsupported(
        f"block_mask has blocks of {block}; {can.name} takes {can.blocks.rule}."
      )
  if can.refuse_more is not None:
    can.refuse_more(extras, options, block)
