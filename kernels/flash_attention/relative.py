"""Score terms of relative positions, whose size is linear in the lengths.

Shaw et al. 2018 (arXiv:1803.02155), T5 (Raffel et al. 2019, arXiv:1910.10683)
and DeBERTa (He et al. 2020, arXiv:2006.03654, eq. 4) add to the score of query
i and key j what depends on j - i: a number, a product with the query, a product
with the key. All pairs with the same j - i, a diagonal of the scores, share an
entry. Clipping and buckets are a gather outside.

A tile of scores needs as many entries as it has rows and columns. `skew` makes
the tile of products with consecutive entries, `unskew` is its transposition.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.flash_attention.layouts import Sizes


class Relative(NamedTuple):
  """The entries of all t + s - 1 diagonals; None where a term is absent.

  Entry m belongs to query i and key j with m = j - i + t - 1. With the last
  query aligned with the last key, it stands for the key's position minus the
  query's being m - (s - 1).

  Attributes:
    bias: float [1|b, h, n], added to the scaled scores.
    keys: float [1, heads of keys, d, n]: the query's product with an entry is
      scaled and added, like that with a key.
    queries: float [1, h, d, n]: likewise the key's product with an entry.
  """

  bias: jax.Array | None = None
  keys: jax.Array | None = None
  queries: jax.Array | None = None

  def part(self, t: int, rows: tuple, columns: tuple) -> "Relative":
    """The entries of some of the scores.

    Args:
      t: number of all queries.
      rows: (first, number) of the part's queries; the first may be traced.
      columns: likewise of its keys.
    """
    start, size = _span(t, rows, columns)
    return self.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 1)
    )

  def with_part(
    self, other: "Relative", t: int, rows: tuple, columns: tuple
  ) -> "Relative":
    """Adds to the entries of some of the scores; the transposition of `part`.

    Parts overlap: what is summed should be float32.
    """
    start, size = _span(t, rows, columns)

    def add(x, y):
      axis = x.ndim - 1
      y += jax.lax.dynamic_slice_in_dim(x, start, size, axis)
      return jax.lax.dynamic_update_slice_in_dim(x, y, start, axis)

    return self.map(add, other)

  def map(self, f: Callable, *others: Any) -> "Relative":
    """f of every term that is there, and of the others' in its place."""
    rows = zip(self, *others, strict=True)
    return Relative(*(None if x is None else f(x, *y) for x, *y in rows))


def _span(t: int, rows: tuple, columns: tuple) -> tuple[Any, int]:
  """First entry and number of entries of a part of the scores."""
  return columns[0] - rows[0] + t - rows[1], rows[1] + columns[1] - 1


def terms(
  bias: jax.Array | None,
  keys: jax.Array | None,
  queries: jax.Array | None,
  n: Sizes,
) -> Relative | None:
  """The terms of `flash_attention`'s arguments, with all their heads.

  Args:
    bias: relative_bias, [1|b, 1|h, t + s - 1].
    keys: relative_keys, [1|heads of keys, t + s - 1, d].
    queries: relative_queries, [1|h, t + s - 1, d].
    n: of q, k and v.

  Raises:
    ValueError: names the argument, its shape or dtype and what would be right.
  """
  size = n.t + n.s - 1
  given = {
    "bias": (bias, (f"1|{n.b}", f"1|{n.h}", size)),
    "keys": (keys, (f"1|{n.kv_heads}", size, n.d)),
    "queries": (queries, (f"1|{n.h}", size, n.d)),
  }
  found = {}
  for name, (x, want) in given.items():
    if x is None:
      continue
    allowed = [str(w).split("|") for w in want]
    if x.ndim != 3 or any(str(a) not in w for a, w in zip(x.shape, allowed)):
      raise ValueError(
        f"relative_{name} has shape {x.shape}; it must be"
        f" [{', '.join(map(str, want))}]: an entry for each of the t + s - 1 ="
        f" {size} differences of {n.t} queries' and {n.s} keys' positions."
      )
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"relative_{name} has dtype {x.dtype}; it must be floating-point."
      )
    if name == "bias":
      found[name] = jnp.broadcast_to(x, (x.shape[0], n.h, size))
    else:
      heads = n.kv_heads if name == "keys" else n.h
      x = jnp.broadcast_to(x, (heads, size, n.d))
      found[name] = x.swapaxes(1, 2)[None]
  return Relative(**found) if found else None


def lay(
  relative: Relative,
  sizes: tuple[int, int],
  padded: tuple[int, int],
  by_key: tuple[str, ...],
) -> Relative:
  """The entries as tiles of padded scores read them.

  Args:
    relative: the entries of t x s scores.
    sizes: (t, s).
    padded: the sizes of the padded scores.
    by_key: terms whose tiles have the keys as rows.

  Returns:
    Entries of t_pad + s_pad diagonals, of which the last belongs to no score:
    entry j - i + t_pad - 1 is that of query i and key j, or `by_key`, entry
    i - j + s_pad - 1.
  """
  before, after = (p - n for p, n in zip(padded, sizes))

  def one(x, name):
    if name in by_key:
      x, around = jnp.flip(x, -1), (after, before + 1)
    else:
      around = (before, after + 1)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [around])

  return relative.map(one, Relative._fields)


def unlay(
  relative: Relative,
  sizes: tuple[int, int],
  padded: tuple[int, int],
  by_key: tuple[str, ...],
) -> Relative:
  """The inverse of `lay`."""
  before, after = (p - n for p, n in zip(padded, sizes))
  size = sum(sizes) - 1

  def one(x, name):
    if name in by_key:
      return jnp.flip(x[..., after : after + size], -1)
    return x[..., before : before + size]

  return relative.map(one, Relative._fields)


def skew(x: jax.Array) -> jax.Array:
  """[..., rows, rows + columns] -> [..., rows, columns].

  Entry (i, j) of the result is entry (i, j - i + rows - 1) of x.
  """
  *lead, rows, width = x.shape
  flat = x.reshape(*lead, rows * width)[..., : rows * (width - 1)]
  return flat.reshape(*lead, rows, width - 1)[..., rows - 1 :]


def unskew(x: jax.Array) -> jax.Array:
  """[..., rows, columns] -> [..., rows, rows + columns], the transposition."""
  *lead, rows, columns = x.shape
  width, batch = rows + columns, [(0, 0)] * len(lead)
  flat = jnp.pad(x, [*batch, (0, 0), (rows - 1, 0)])
  flat = flat.reshape(*lead, rows * (width - 1))
  return jnp.pad(flat, [*batch, (0, rows)]).reshape(*lead, rows, width)
