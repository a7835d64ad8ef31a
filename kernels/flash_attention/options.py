"""What attention computes: its options, optional arrays and checks.

Every backend takes `(q, k, v, extras, options)` and means the same by them.
Query i stands at position i + offset, key j at position j. The score is

    S_ij = scale * q_i . k_j + bias_ij - slope * |i + offset - j|

and, with entries of the diagonal m = j - i + t - 1 (`relative.py`),

    S_ij += relative bias_m + scale * (q_i . relative key_m
                                       + relative query_m . k_j),

then softcap * tanh(S / softcap) if there is a cap. A key that the query does
not see has probability 0. Dropout acts on the probabilities: lse is that of the
scores without it. A query that sees no key has output 0, lse -inf and zero
gradients.
"""

import dataclasses
import math
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.flash_attention.layouts import LAYOUTS, Sizes, sizes
from kernels.flash_attention.relative import Relative

GENERATORS = ("counter", "hardware", "auto")


class Unsupported(ValueError):
  """A backend says what it cannot do; the dispatcher then takes another."""


class Extras(NamedTuple):
  """Optional arrays; None where absent.

  Attributes:
    bias: float [1|b, 1|h, 1|t, s], added to the scaled scores.
    alibi_slopes: float32 [h] or [b, h].
    relative: terms of relative positions, see `relative.Relative`.
    q_segments: int32 [b, t]; a query sees the keys of equal, positive id.
    kv_segments: int32 [b, s], given if and only if `q_segments` is.
    block_mask: bool [1|h, row blocks, column blocks]; True = visible. A numpy
      array is static: a kernel shrinks its grid to it. Anything else may be
      traced: a kernel skips tiles by it.
    seed: uint32 [6], see `dropout.make_seed`; needed for dropout.
    offset: int32 [], position of query 0; None means s - t, which aligns the
      last query with the last key. Only shards of longer sequences need it.
  """

  bias: jax.Array | None = None
  alibi_slopes: jax.Array | None = None
  relative: Relative | None = None
  q_segments: jax.Array | None = None
  kv_segments: jax.Array | None = None
  block_mask: jax.Array | np.ndarray | None = None
  seed: jax.Array | None = None
  offset: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Options:
  """Static choices.

  Attributes:
    scale: factor of the products q . k.
    causal: a query sees no key at a later position.
    window: (left, right): a query sees keys at most that many positions before
      and after its own, inclusive.
    softcap: bound of the scores' magnitude.
    dropout_rate: probability of dropping an attention weight.
    dropout_generator: one of `GENERATORS`: "counter" is a pure function of
      seed, batch, head, row and column; "hardware" is the TPU's own; "auto",
      the fastest of the platform, never reaches a backend.
    layout: letters of q: batch b, position t, head h, head width d. k, v and
      the output are laid out alike.
    block_size: (rows, columns) of an entry of the block mask; None: the mask
      divides both lengths evenly.
    tiles: sizes of the backend's tiles, in the backend's own order; None: its
      table decides.
    interpret: run Pallas kernels in the interpreter.
  """

  scale: float
  causal: bool = False
  window: tuple[int, int] | None = None
  softcap: float | None = None
  dropout_rate: float = 0.0
  dropout_generator: str = "counter"
  layout: str = "bthd"
  block_size: tuple[int, int] | None = None
  tiles: tuple[int, ...] | None = None
  interpret: bool = False


def visible_by_position(
  rows: jax.Array, columns: jax.Array, options: Options
) -> jax.Array | None:
  """Whether queries at positions `rows` may see keys at `columns`.

  Args:
    rows: int32 positions of queries (index + offset), any shape.
    columns: int32 positions of keys, of a shape that broadcasts with `rows`.
    options: `causal` and `window` count.

  Returns:
    Booleans of the broadcast shape, or None if position hides nothing.
  """
  limits = []
  left, right = options.window or (None, None)
  if options.causal:
    right = 0 if right is None else min(right, 0)
  if left is not None:
    limits.append(columns >= rows - left)
  if right is not None:
    limits.append(columns <= rows + right)
  if not limits:
    return None
  return limits[0] if len(limits) == 1 else limits[0] & limits[1]


def same_segment(q_ids: jax.Array, kv_ids: jax.Array) -> jax.Array:
  """Equal ids see each other; 0 is padding and is seen by nobody."""
  return (q_ids == kv_ids) & (kv_ids > 0)


def cap(scores: jax.Array, softcap: float | None) -> jax.Array:
  """Squashes scores into (-softcap, softcap); slope 1 - (cap / softcap)^2."""
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def block_size(
  extras: Extras, options: Options, t: int, s: int
) -> tuple[int, int]:
  """(rows, columns) of an entry of the block mask."""
  if options.block_size is not None:
    return options.block_size
  _, rows, columns = extras.block_mask.shape
  return t // rows, s // columns


def _refuse(condition: bool, message: str) -> None:
  if condition:
    raise ValueError(message)


def check_arrays(
  q: jax.Array, k: jax.Array, v: jax.Array, layout: str
) -> Sizes:
  """The sizes of q, k and v, which must fit each other.

  Raises:
    ValueError: names the array and its shape.
  """
  _refuse(
    layout not in LAYOUTS,
    f"layout={layout!r} is unknown; choose from {', '.join(LAYOUTS)}.",
  )
  for name, x in (("q", q), ("k", k), ("v", v)):
    _refuse(
      x.ndim != 4, f"{name} has shape {x.shape}; it must have axes {layout}."
    )
    _refuse(
      not jnp.issubdtype(x.dtype, jnp.floating),
      f"{name} has dtype {x.dtype}; attention takes floating-point arrays.",
    )
  n = sizes(q, k, v, layout)
  shape = dict(zip(layout, k.shape))
  _refuse(
    shape["b"] != n.b or shape["d"] != n.d,
    f"k of shape {k.shape} does not fit q of shape {q.shape} (axes {layout}):"
    " batch and head width must be equal.",
  )
  other = dict(zip(layout, v.shape))
  _refuse(
    any(other[c] != shape[c] for c in "bth"),
    f"v of shape {v.shape} does not fit k of shape {k.shape} (axes {layout}):"
    " all but the head width must be equal.",
  )
  _refuse(
    n.h % n.kv_heads > 0,
    f"k and v have {n.kv_heads} heads, which do not divide q's {n.h}.",
  )
  return n


def _check_extras(n: Sizes, extras: Extras) -> None:
  if extras.bias is not None:
    shape = extras.bias.shape
    fits = len(shape) == 4 and shape[3] == n.s
    fits = fits and all(a in (1, c) for a, c in zip(shape, (n.b, n.h, n.t)))
    _refuse(
      not fits,
      f"bias has shape {shape}; it must be [1|{n.b}, 1|{n.h}, 1|{n.t}, {n.s}].",
    )
    dtype = extras.bias.dtype
    _refuse(
      not jnp.issubdtype(dtype, jnp.floating),
      f"bias has dtype {dtype}, but is added to scores; to hide keys, give"
      " jnp.where(mask, 0.0, -jnp.inf), or segment_ids.",
    )
  if extras.alibi_slopes is not None:
    shape = extras.alibi_slopes.shape
    _refuse(
      shape not in ((n.h,), (n.b, n.h)),
      f"alibi_slopes has shape {shape}; it must be [{n.h}] or [{n.b}, {n.h}].",
    )
  _refuse(
    (extras.q_segments is None) != (extras.kv_segments is None),
    "segment ids are needed for queries and keys, or for neither.",
  )
  if extras.q_segments is not None:
    for name, ids, length in (
      ("queries", extras.q_segments, n.t),
      ("keys", extras.kv_segments, n.s),
    ):
      _refuse(
        ids.shape != (n.b, length),
        f"segment_ids of the {name} have shape {ids.shape}; they must be"
        f" [{n.b}, {length}]. Lengths that differ need a (q, kv) pair.",
      )


def _check_block_mask(n: Sizes, extras: Extras, options: Options) -> None:
  mask = extras.block_mask
  _refuse(
    options.block_size is not None and mask is None,
    f"block_size={options.block_size} is given without a block_mask.",
  )
  if mask is None:
    return
  _refuse(
    mask.ndim != 3 or mask.dtype != bool or mask.shape[0] not in (1, n.h),
    f"block_mask is {mask.dtype}{list(mask.shape)}; it must be bool [1|{n.h},"
    " row blocks, column blocks].",
  )
  blocks = mask.shape[1:]
  if options.block_size is None:
    _refuse(
      n.t % blocks[0] > 0 or n.s % blocks[1] > 0,
      f"block_mask of {blocks} blocks does not tile attention of {(n.t, n.s)};"
      " lengths must be multiples, or block_size be given.",
    )
    return
  rows, columns = options.block_size
  need = (math.ceil(n.t / rows), math.ceil(n.s / columns))
  _refuse(
    blocks != need,
    f"block_mask has {blocks} blocks; lengths {(n.t, n.s)} in blocks of"
    f" {options.block_size} make {need}.",
  )


def _is_window(window: Any) -> bool:
  pair = isinstance(window, tuple | list) and len(window) == 2
  return pair and all(isinstance(x, Integral) and x >= 0 for x in window)


def check(
  q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, options: Options
) -> Sizes:
  """Refuses what no backend could mean.

  Raises:
    ValueError: names the argument, its value and what would be right.
  """
  n = check_arrays(q, k, v, options.layout)
  _refuse(
    isinstance(options.scale, jax.core.Tracer),
    "sm_scale is traced, but is part of the program: multiply q by it instead.",
  )
  _check_extras(n, extras)
  _check_block_mask(n, extras, options)
  rate = options.dropout_rate
  _refuse(not 0.0 <= rate < 1.0, f"dropout_rate={rate} must lie in [0, 1).")
  _refuse(
    rate > 0 and extras.seed is None,
    f"dropout_rate={rate} needs dropout_seed, a PRNG key or an integer.",
  )
  _refuse(
    options.dropout_generator not in GENERATORS,
    f"dropout_generator={options.dropout_generator!r} is unknown; choose from"
    f" {', '.join(GENERATORS)}.",
  )
  window = options.window
  _refuse(
    window is not None and not _is_window(window),
    f"window={window} must be (left, right), integers of at least 0, or one"
    " for both.",
  )
  _refuse(
    options.softcap is not None and options.softcap <= 0,
    f"logit_softcap={options.softcap} must be positive.",
  )
  return n
