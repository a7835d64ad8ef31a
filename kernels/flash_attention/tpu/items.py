"""Items, the units of work of a grid step: one head's scores of some keys."""

import dataclasses
from typing import Any

from jax.experimental import pallas as pl

from kernels.flash_attention.tpu.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Item:
  """A head, and where its scores start within the step's tile."""

  head: int
  t: int
  s: int


def items(tiles: Tiles) -> list[Item]:
  """The items of a step; neighbours share keys."""
  return [
    Item(head, t, s)
    for head in range(tiles.heads)
    for s in range(0, tiles.s, tiles.s_item)
    for t in range(0, tiles.t, tiles.t_item)
  ]


def multiple(n: Any, unit: int) -> Any:
  """Tells the compiler that a traced number is a multiple of `unit`."""
  return n if isinstance(n, int) else pl.multiple_of(n, unit)
