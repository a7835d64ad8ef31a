"""Terms of relative positions in the tiles of `blockwise.py`."""

import jax
import jax.numpy as jnp

from kernels.flash_attention.grouped import join, product, split
from kernels.flash_attention.relative import Relative, skew, unskew

# The axes that follow examples and heads: see `blockwise._Step.window`.
AXES = Relative(bias="r", keys="-r", queries="-R")
BY_KEY = ("queries",)


def scores(
  q: jax.Array, k: jax.Array, entries: Relative, scale: float
) -> jax.Array:
  """What the terms add to a tile of scores, [b, h, rows, columns].

  Args:
    q: the tile's queries [b, h, rows, d].
    k: its keys [b, heads of keys, columns, d].
    entries: those of its diagonals.
    scale: of the products.
  """
  kv_heads, found = k.shape[1], 0.0
  if entries.bias is not None:
    *lead, width = entries.bias.shape
    shape = (*lead, q.shape[2], width)
    found += skew(jnp.broadcast_to(entries.bias[:, :, None], shape))
  if entries.keys is not None:
    by_query = product("bkrtd,kdl->bkrtl", split(q, kv_heads), entries.keys[0])
    found += skew(join(by_query)) * scale
  if entries.queries is not None:
    entry = split(entries.queries, kv_heads)[0]
    by_key = product("bksd,krdl->bkrsl", k, entry)
    found += skew(join(by_key)).swapaxes(2, 3) * scale
  return found


def gradients(
  q: jax.Array, k: jax.Array, entries: Relative, ds: jax.Array
) -> tuple[jax.Array | float, jax.Array | float, Relative]:
  """What the terms add to dq and dk, and their own gradients; all unscaled.

  Args:
    q: the tile's queries [b, h, rows, d].
    k: its keys [b, heads of keys, columns, d].
    entries: those of its diagonals.
    ds: gradient of the tile's scores, float32 [b, h, rows, columns].
  """
  kv_heads, dq, dk, found = k.shape[1], 0.0, 0.0, Relative()
  if entries.bias is not None:
    found = found._replace(bias=unskew(ds).sum(2))
  if entries.keys is not None:
    by_query = split(unskew(ds).astype(q.dtype), kv_heads)
    dq = join(product("bkrtl,kdl->bkrtd", by_query, entries.keys[0]))
    dkeys = product("bkrtl,bkrtd->kdl", by_query, split(q, kv_heads))
    found = found._replace(keys=dkeys[None])
  if entries.queries is not None:
    by_key = split(unskew(ds.swapaxes(2, 3)).astype(q.dtype), kv_heads)
    entry = split(entries.queries, kv_heads)[0]
    dk = product("bkrsl,krdl->bksd", by_key, entry)
    dqueries = product("bkrsl,bksd->krdl", by_key, k)
    found = found._replace(queries=join(dqueries[None]))
  return dq, dk, found
