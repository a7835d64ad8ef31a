"""Which attention weights are dropped: a pure function of their coordinates.

The generator "counter" hashes (seed, batch, head, row, column) to 32 bits. Tile
sizes, platforms and the direction of the pass cannot change a mask, and a shard
draws the mask that the whole array would have (`make_seed`'s offsets).

Two words per row and one per column come from a full-strength integer hash;
they cost nothing beside the t * s elements. An element then pays only

    x = (row_0 xor column) * A;  x ^= x >> 15;  x = (x + row_1) * B

which is a two-round multiply-xorshift hash without the outer shifts: the words
going in are mixed already, and of the word coming out the high bits decide.
The second row word enters between the rounds, so that two rows share a mask
only if 64 bits coincide. Philox-4x32 needs ten rounds of two 64-bit products,
which a TPU's vector unit has to build from pieces; `tests/kernels` tests what
dropout needs instead: uniformity, and independence of rows, columns, heads,
examples and seeds.

All arithmetic is uint32 and wraps. Constants: A and B of `lowbias32` (Wellons
2018, the hash with the lowest measured avalanche bias of this form).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_A = np.uint32(0x7FEB352D)
_B = np.uint32(0x846CA68B)
_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / golden ratio: spreads small integers
_STREAMS = (np.uint32(0x243F6A88), np.uint32(0x85A308D3))  # digits of pi
_COLUMN = np.uint32(0x13198A2E)

Words = Sequence[jax.Array] | jax.Array


def make_seed(
  seed: jax.Array | int,
  *,
  batch: jax.Array | int = 0,
  head: jax.Array | int = 0,
  row: jax.Array | int = 0,
  column: jax.Array | int = 0,
) -> jax.Array:
  """The uint32 [6] that every function here calls `seed`.

  Args:
    seed: a PRNG key, two uint32 words, an integer, or what this returned, which
      is moved on.
    batch: index that the first example has in the unsharded array.
    head: likewise of the first head.
    row: likewise of the first query.
    column: likewise of the first key.

  Raises:
    ValueError: `seed` is something else.
  """
  first = jnp.zeros(4, jnp.uint32)
  if isinstance(seed, int):
    words = jnp.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], "uint32")
  elif jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and seed.ndim == 0:
    # Drawn, not read: the words of an rbg key repeat each other.
    words = jax.random.bits(seed, (2,), jnp.uint32)
  elif seed.dtype == jnp.uint32 and seed.shape == (2,):
    words = seed
  elif jnp.issubdtype(seed.dtype, jnp.integer) and seed.ndim == 0:
    words = jnp.stack([seed.astype(jnp.uint32), jnp.uint32(0)])
  elif seed.dtype == jnp.uint32 and seed.shape == (6,):
    words, first = seed[:2], seed[2:]
  else:
    raise ValueError(
      f"dropout_seed is {seed.dtype}{list(seed.shape)}; it must be one PRNG"
      " key, an integer, uint32[2], or of make_seed."
    )
  offsets = [
    jnp.asarray(x).astype(jnp.uint32) for x in (batch, head, row, column)
  ]
  return jnp.concatenate([words, first + jnp.stack(offsets)])


def _mix(x: jax.Array) -> jax.Array:
  """lowbias32: a bijection of 32 bits, each input bit flips half the output."""
  x = (x ^ (x >> np.uint32(16))) * _A
  x = (x ^ (x >> np.uint32(15))) * _B
  return x ^ (x >> np.uint32(16))


def _absorb(state: jax.Array, value: jax.Array) -> jax.Array:
  return _mix(state ^ (value.astype(jnp.uint32) * _GOLDEN + _GOLDEN))


def row_words(
  seed: Words, batch: jax.Array, head: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Two uint32 words per query.

  Args:
    seed: see `make_seed`; six scalars will do.
    batch: index of the example; scalar, or broadcasts with the others.
    head: index of the query's head.
    rows: indices of queries in this array, any integer dtype.
  """
  words = []
  for stream in _STREAMS:
    state = _absorb(stream ^ seed[0], seed[1])
    state = _absorb(state, batch.astype(jnp.uint32) + seed[2])
    state = _absorb(state, head.astype(jnp.uint32) + seed[3])
    words.append(_absorb(state, rows.astype(jnp.uint32) + seed[4]))
  return words[0], words[1]


def column_word(seed: Words, columns: jax.Array) -> jax.Array:
  """One uint32 word per key; see `row_words`."""
  return _absorb(_COLUMN, columns.astype(jnp.uint32) + seed[5])


def bits(rows: tuple[jax.Array, jax.Array], columns: jax.Array) -> jax.Array:
  """32 random bits per element, uint32.

  Args:
    rows: of `row_words`, shaped to broadcast with `columns`, such as [t, 1].
    columns: of `column_word`, such as [1, s].
  """
  x = (rows[0] ^ columns) * _A
  x = x ^ (x >> np.uint32(15))
  return (x + rows[1]) * _B


def keep(
  rows: tuple[jax.Array, jax.Array], columns: jax.Array, rate: float
) -> jax.Array:
  """True with probability 1 - rate, exact to 2**-32; arguments as `bits`."""
  # Read as signed, the word is as uniform, and vector units compare it as is.
  word = jax.lax.bitcast_convert_type(bits(rows, columns), jnp.int32)
  return word >= np.int32(min(round(rate * 2**32), 2**32 - 1) - 2**31)


def keep_mask(
  seed: Words, batch: int, heads: int, rows: int, columns: int, rate: float
) -> jax.Array:
  """The whole mask, bool [batch, heads, rows, columns]; for reference."""
  index = [
    jnp.arange(n).reshape([-1 if i == axis else 1 for i in range(4)])
    for axis, n in enumerate((batch, heads, rows, columns))
  ]
  return keep(row_words(seed, *index[:3]), column_word(seed, index[3]), rate)
