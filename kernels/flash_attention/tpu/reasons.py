"""Why a kernel's tiles are what they are, in words; see `tiles.py`."""

from kernels.flash_attention.tpu.problem import Problem
from kernels.flash_attention.tpu.tiles import (
  BLOCK_BYTES,
  ITEM_MAX,
  STEP_SCORES,
  Tiles,
)


def reason(problem: Problem, tiles: Tiles) -> str:
  """What bounds a grid step of a problem."""
  if problem.options.tiles is not None:
    return "as the caller asked"
  if problem.block is not None:
    return "as large as the blocks of the mask"
  one_tile = tiles.rows == tiles.columns == 1
  if one_tile and tiles.heads == problem.h:
    return "an example fits into one step"
  if problem.positional and not one_tile:
    return (
      f"an item of at most {ITEM_MAX} a side, so that hidden ones cost nothing"
    )
  scores = tiles.heads * tiles.t * tiles.s
  if not one_tile and tiles.whole:
    return "the inner operands of a head stay in VMEM, which bounds heads"
  if 2 * scores > STEP_SCORES:
    return f"{STEP_SCORES:,} scores a step"
  return (
    f"blocks of {BLOCK_BYTES >> 20} MiB a step, or less where scores take more"
    " memory beside them"
  )
