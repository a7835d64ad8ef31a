"""Tile sizes: what a grid step covers, and in which pieces it computes.

Sizes come from a small model rather than from a table of shapes:

- The unit of work (an item) is one head's scores of up to 640 keys by 640
  queries, 512 by preference. Static schedules on v5e put 512 x 512 items at
  the matrix unit's own pace and 256 x 256 ones 20% above it: short columns
  leave the statistics' dependency chains exposed.
- A step has as many items as make about 2^20 scores. A step's items are
  unrolled, so products of one overlap with the softmax of another; less leaves
  the pipeline's ends exposed, more only grows the program.
- Products run `ahead` of the softmax by about 2^18 scores, the most that does
  not cost more in spilled registers than it hides.
- VMEM is 16 MiB on a v4, the smallest, and the chip is not known when a
  program is traced. Spilled registers of a step take up to 6 MiB of it; the
  rest is divided by the `_BYTES` below.
"""

import dataclasses
import math

from kernels.flash_attention.tpu.problem import LANES, Problem

ITEM_MAX = 640
NARROW = 512  # a window of less is worth half as long items: 1.5x fewer scores
STEP_SCORES = 1 << 20
AHEAD_SCORES = 1 << 18
BLOCK_BYTES = 6 << 20  # blocks of a step, both buffers
WHOLE_BYTES = 8 << 20  # a whole head, both buffers, and the sum of dq
HEADS_BYTES = 5 << 20  # likewise of several heads, which a step can do without
PARTS_BYTES = 12 << 20  # sums and blocks of heads that are fetched by tile
BUFFERS = 2
SMALL_SCORES = 1 << 18  # of a step; half as many take 0.7 of its time
# Rows whose dq, in float32, fits beside all else: longer ones are divided.
DQ_BYTES = 6 << 20
# A head's relative keys and queries, and their gradients, in float32.
RELATIVE_BYTES = 3 << 20


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of one kernel.

  Attributes:
    heads: query heads of a grid step.
    t: queries of a grid step.
    s: keys of a grid step.
    t_item: queries of an item; divides t.
    s_item: keys of an item; divides s.
    t_pad: padded number of queries, a multiple of t.
    s_pad: padded number of keys, a multiple of s.
    ahead: items whose products are issued before the softmax of the first.
    whole: whether the inner loop's operands are fetched once per head, not once
      per tile.
  """

  heads: int
  t: int
  s: int
  t_item: int
  s_item: int
  t_pad: int
  s_pad: int
  ahead: int
  whole: bool

  @property
  def rows(self) -> int:
    return self.t_pad // self.t

  @property
  def columns(self) -> int:
    return self.s_pad // self.s


def _up(n: int, unit: int) -> int:
  return -(-n // unit) * unit


def split(n: int, most: int, least: int = 16) -> int:
  """The item, at most `most`, that pads a length least."""
  if n <= most:
    # Below a lane tile nothing is gained by padding to it.
    return _up(n, LANES if n > LANES else least)
  counts = range(-(-n // most), n // (most // 2) + 1)
  size, count = min((k * _up(-(-n // k), LANES), k) for k in counts)
  return size // count


def _largest(total: int, unit: int, limit: int) -> int:
  """The largest multiple of `unit` dividing `total`, at most `limit`."""
  n = total // unit
  fits = [k for k in range(1, n + 1) if n % k == 0 and k * unit <= limit]
  return max(fits, default=1) * unit


def _heads(problem: Problem, limit: int) -> int:
  """Query heads per program: whole groups of key heads, or parts of one."""
  fits = [
    n
    for n in range(1, problem.h + 1)
    if problem.h % n == 0
    and n <= limit
    and (n % problem.group == 0 or problem.group % n == 0)
  ]
  return max(fits, default=1)


def _head_bytes(problem: Problem, t: int, s: int, by_column: bool) -> int:
  """Bytes of a head's blocks in a step, both buffers."""
  d, dv = _up(problem.d, 16), _up(problem.dv, 16)
  size = problem.dtype.itemsize
  t, s = _up(t, LANES), _up(s, LANES)
  if by_column:
    blocks = (2 * d + 2 * dv) * (t + s) * size
  else:
    blocks = (d + dv) * (t + s) * size
  if problem.bias is not None and problem.bias[2] > 1:
    blocks += t * s * 4
  return BUFFERS * blocks + relative_bytes(problem, by_column)


def relative_bytes(problem: Problem, by_column: bool) -> int:
  """Bytes of a head's entries of all diagonals, and of their gradients."""
  entry = 4 + 4 * by_column if "bias" in problem.relative else 0
  width = _up(problem.d, 16) * (problem.dtype.itemsize + 4 * by_column)
  lanes = _up(problem.t, LANES) + _up(problem.s, LANES)
  return lanes * (entry + problem.relative_products * width)


def _whole(
  problem: Problem, t_pad: int, s_pad: int, t: int, s: int, by_column: bool
) -> tuple[bool, int]:
  """Whether the inner loop's operands are whole heads, and of how many.

  Fetched by tile they cross HBM once per outer tile. That is worth it where a
  head's tile, t by s, has so few scores that steps need more heads to be
  efficient.
  """
  d, dv = _up(problem.d, 16), _up(problem.dv, 16)
  size = problem.dtype.itemsize
  if by_column:  # q, out and dout; the sum of dq in either case
    sums = t_pad * d * 4
    fetched = t_pad * (d + 2 * dv) * size * BUFFERS
  else:
    sums, fetched = 0, s_pad * (d + dv) * size * BUFFERS
  kept = sums + relative_bytes(problem, by_column)
  wholes = HEADS_BYTES // (kept + fetched) or WHOLE_BYTES // (kept + fetched)
  if wholes * t * s >= SMALL_SCORES:
    return True, wholes
  parts = problem.h
  if by_column:  # the sums of dk and dv of a column, too
    sums += _head_bytes(problem, t, s, by_column) + s * (d + dv) * 4
    parts = min(WHOLE_BYTES // kept, PARTS_BYTES // sums)
  return wholes >= parts, max(parts, 1)


def _most_scores(problem: Problem) -> int:
  """Scores of a step: fewer where each takes more memory beside it."""
  scores = STEP_SCORES
  if problem.bias is not None and problem.bias[2] > 1:
    scores //= 2  # the bias' block alone would take 8 MiB
  if problem.d + problem.dv > LANES or problem.finer:
    scores //= 2  # blocks as wide; masks of which there are two bodies
  if problem.dtype.itemsize > 2:
    scores //= 4  # products take float32 operands apart into three
  if problem.relative_products:
    # A strip is wider than its scores; where position hides, of two bodies.
    scores //= 4 if problem.positional else 2
  return scores


def _step(problem, t_pad, s_pad, t_item, s_item, by_column):
  """(t, s) of a step."""
  scores = _most_scores(problem)
  if t_pad * s_pad <= scores:
    return t_pad, s_pad
  if problem.positional:
    return t_item, s_item  # what can be skipped
  if by_column:
    return _largest(t_pad, t_item, max(scores // s_item, t_item)), s_item
  return t_item, _largest(s_pad, s_item, max(scores // t_item, s_item))


def _given(problem: Problem) -> tuple[int, int] | None:
  """Tile sizes that the caller or the block mask leave no choice of."""
  if problem.options.tiles is not None:
    return problem.options.tiles
  if problem.block is None:
    return None
  return tuple(math.lcm(n, LANES) for n in problem.block)


def item(problem: Problem) -> tuple[int, int]:
  """(queries, keys) of an item: the same for all passes and parts of a call."""
  step = _given(problem)
  if step is not None and problem.finer:
    return step  # whole blocks of the mask
  if step is not None:
    return tuple(_largest(n, LANES, ITEM_MAX) for n in step)
  most, window = ITEM_MAX, problem.options.window
  if window is not None and sum(window) < NARROW:
    most //= 2
  if problem.relative_products and problem.dtype.itemsize > 2:
    most = min(most, ITEM_MAX // 2)  # strips and all they are taken apart into
  least = LANES if problem.relative else 16  # whole strips of diagonals
  return split(problem.all_t, most, least), split(problem.s, most, least)


def choose(problem: Problem, by_column: bool) -> Tiles:
  """Tiles of a pass.

  Args:
    problem: the call.
    by_column: whether columns of tiles are the outer loop, as backward.
  """
  t_item, s_item = item(problem)
  t_pad, s_pad = _up(problem.t, t_item), _up(problem.s, s_item)
  step = _given(problem)
  if step is None:
    t, s = _step(problem, t_pad, s_pad, t_item, s_item, by_column)
  else:
    t_pad, s_pad = _up(problem.t, step[0]), _up(problem.s, step[1])
    most = _most_scores(problem)
    t = _largest(step[0], t_item, max(most // s_item, t_item))
    s = _largest(step[1], s_item, max(most // t, s_item))
  limit = min(
    _most_scores(problem) // (t * s),
    BLOCK_BYTES // _head_bytes(problem, t, s, by_column),
  )
  if problem.mask_heads not in (None, 1):
    limit = 1  # heads differ in the tiles they visit
  whole = False
  if t_pad > t if by_column else s_pad > s:  # there is an inner loop
    whole, most = _whole(problem, t_pad, s_pad, t, s, by_column)
    limit = min(limit, most)
  heads = _heads(problem, max(limit, 1))
  items = heads * (t // t_item) * (s // s_item)
  ahead = min(math.ceil(AHEAD_SCORES / (t_item * s_item)), items - 1)
  return Tiles(heads, t, s, t_item, s_item, t_pad, s_pad, ahead, whole)


def for_bias(problem: Problem) -> Tiles:
  """Tiles of the bias gradient: operands by tile, and no step of many items."""
  tiles = choose(problem, by_column=True)
  if problem.bias[2] == 1:
    return dataclasses.replace(tiles, whole=False)
  t, s = tiles.t_item, tiles.s_item
  heads = _heads(problem, min(tiles.heads, max(STEP_SCORES // 4 // (t * s), 1)))
  ahead = min(tiles.ahead, heads - 1)
  return dataclasses.replace(
    tiles, heads=heads, t=t, s=s, ahead=ahead, whole=False
  )
