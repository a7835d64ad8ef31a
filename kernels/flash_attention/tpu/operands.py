"""The operands that the kernels share, as blocks of padded arrays."""

import jax
import jax.numpy as jnp

from kernels.flash_attention.options import Extras
from kernels.flash_attention.tpu.launch import Operand
from kernels.flash_attention.tpu.problem import KERNEL_DTYPES, Problem
from kernels.flash_attention.tpu.tiles import Tiles

SUBLANES = 8


def pad(x: jax.Array, axis: int, size: int) -> jax.Array:
  """Zeros at the end of an axis up to `size`."""
  if x.shape[axis] == size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)


def queries(x: jax.Array, tiles: Tiles, whole: bool) -> Operand:
  """[b, h, *, t]: a program's heads; a tile of queries, or all of them."""
  x = pad(x, 3, tiles.t_pad)
  t = tiles.t_pad if whole else tiles.t
  return Operand(
    x,
    (1, tiles.heads, x.shape[2], t),
    lambda b, group, visit: (b, group, 0, 0 if whole else visit.i),
    fusible=tiles.t == tiles.t_pad,
  )


def keys(x: jax.Array, problem: Problem, tiles: Tiles, whole: bool) -> Operand:
  """[b, kv_heads, *, s]: the key heads of a program's query heads."""
  x = pad(x, 3, tiles.s_pad)
  s = tiles.s_pad if whole else tiles.s
  return Operand(
    x,
    (1, key_heads(problem, tiles), x.shape[2], s),
    lambda b, group, visit: (
      b,
      key_block(problem, tiles, group),
      0,
      0 if whole else visit.j,
    ),
    fusible=tiles.s == tiles.s_pad,
  )


def key_heads(problem: Problem, tiles: Tiles) -> int:
  """Key heads that a program reads."""
  return max(tiles.heads // problem.group, 1)


def key_block(problem: Problem, tiles: Tiles, group):
  """Index of the block of key heads of a group of query heads."""
  if tiles.heads >= problem.group:
    return group
  return jax.lax.div(group * tiles.heads, problem.group)


def _ids(ids: jax.Array, size: int, tile: int, by_row: bool) -> Operand:
  """Segment ids: eight examples a block, all of them if not divisible."""
  ids = pad(ids.astype(jnp.int32), 1, size)
  b = ids.shape[0]
  rows = SUBLANES if b % SUBLANES == 0 else b
  return Operand(
    ids,
    (rows, tile),
    lambda b, group, visit: (
      jax.lax.div(b, rows),
      visit.i if by_row else visit.j,
    ),
  )


def _bias(bias: jax.Array, tiles: Tiles) -> Operand:
  """[1|b, 1|h, s, t], keys first like the scores; [1|b, 1|h, 1, s] by key."""
  per_example, per_head, per_query = (n > 1 for n in bias.shape[:3])
  heads = tiles.heads if per_head else 1
  if bias.dtype not in KERNEL_DTYPES:
    bias = bias.astype(jnp.float32)
  bias = pad(bias, 3, tiles.s_pad)
  if per_query:
    bias = pad(bias, 2, tiles.t_pad).swapaxes(2, 3)
    block = (1, heads, tiles.s, tiles.t)
  else:
    block = (1, heads, 1, tiles.s)

  def index(b, group, visit):
    place = (visit.j, visit.i) if per_query else (0, visit.j)
    return (b if per_example else 0, group if per_head else 0, *place)

  return Operand(bias, block, index)


def _blocks(extras: Extras, problem: Problem, tiles: Tiles) -> Operand:
  """The block mask within tiles, int32 [1|h, column blocks, queries]."""
  rows, columns = problem.block
  mask = jnp.asarray(extras.block_mask).astype(jnp.int32)
  mask = jnp.repeat(mask.swapaxes(1, 2), rows, axis=2)
  blocks = -(-tiles.s_pad // columns)
  missing = (blocks - mask.shape[1], max(tiles.t_pad - mask.shape[2], 0))
  mask = jnp.pad(mask, [(0, 0), (0, missing[0]), (0, missing[1])])
  mask = mask[:, :, : tiles.t_pad]
  heads = mask.shape[0]
  return Operand(
    mask,
    (1, blocks, tiles.t),
    lambda b, group, visit: (group if heads > 1 else 0, 0, visit.i),
  )


def shared(
  extras: Extras, problem: Problem, tiles: Tiles
) -> dict[str, Operand]:
  """Operands of scores, masks and dropout, by the names `scores.py` uses."""
  inputs = {}
  if problem.segments:
    inputs["q_ids"] = _ids(extras.q_segments, tiles.t_pad, tiles.t, True)
    inputs["kv_ids"] = _ids(extras.kv_segments, tiles.s_pad, tiles.s, False)
  if problem.bias is not None:
    inputs["bias"] = _bias(extras.bias, tiles)
  if problem.slopes:
    slopes = jnp.atleast_2d(extras.alibi_slopes).astype(jnp.float32)
    inputs["slopes"] = Operand(slopes)
  if problem.finer:
    inputs["blocks"] = _blocks(extras, problem, tiles)
  if problem.options.dropout_rate:
    seed = jax.lax.bitcast_convert_type(extras.seed, jnp.int32)
    inputs["seed"] = Operand(seed)
  if problem.offset is None:
    inputs["offset"] = Operand(jnp.reshape(extras.offset, (1,)))
  return inputs


def local_key_head(problem: Problem, tiles: Tiles, head: int) -> int:
  """Index within a program of the key head of one of its query heads."""
  return head // problem.group if tiles.heads >= problem.group else 0
