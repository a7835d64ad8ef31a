"""Layouts of q, k and v: a letter per axis, and sizes whatever they are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LAYOUTS = ("bthd", "bhtd", "bhdt")


class Sizes(NamedTuple):
  """Batch, query heads, key heads, lengths and head widths."""

  b: int
  h: int
  kv_heads: int
  t: int
  s: int
  d: int
  dv: int


def sizes(q: jax.Array, k: jax.Array, v: jax.Array, layout: str) -> Sizes:
  """The dimensions of q, k and v, whatever their layout."""
  q, k, v = (dict(zip(layout, x.shape)) for x in (q, k, v))
  return Sizes(q["b"], q["h"], k["h"], q["t"], k["t"], q["d"], v["d"])


def relayout(x: jax.Array, source: str, target: str) -> jax.Array:
  """Transposes an array from one layout's letters to another's."""
  if source == target:
    return x
  return jnp.transpose(x, [source.index(c) for c in target])
