"""The static facts of one attention call that its kernels are built from."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kernels.flash_attention.layouts import sizes
from kernels.flash_attention.options import Extras, Options, block_size
from kernels.flash_attention.relative import Relative

NATIVE = "bhdt"  # width on sublanes, positions on lanes: see `forward.py`
LANES = 128
KERNEL_DTYPES = (jnp.bfloat16, jnp.float32)  # float16 is not one of the TPU's
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes before padding, and which optional pieces there are.

  Attributes:
    b: batch.
    h: query heads.
    kv_heads: key heads, a divisor of h.
    t: queries.
    s: keys.
    d: width of queries and keys.
    dv: width of values.
    dtype: of the products' operands; float32 or bfloat16.
    options: the caller's.
    bias: shape of the bias, if any.
    slopes: whether there are ALiBi slopes.
    relative: names of the terms of relative positions.
    relative_by_example: whether their bias differs by example.
    segments: whether there are segment ids.
    mask_heads: heads of the block mask; None without a block mask.
    block: positions (queries, keys) of an entry of the block mask.
    offset: position of query 0; None if it is an operand.
    all_t: queries of the call that this is a part of, or t.
  """

  b: int
  h: int
  kv_heads: int
  t: int
  s: int
  d: int
  dv: int
  dtype: jnp.dtype
  options: Options
  bias: tuple[int, ...] | None
  slopes: bool
  relative: tuple[str, ...]
  relative_by_example: bool
  segments: bool
  mask_heads: int | None
  block: tuple[int, int] | None
  offset: int | None
  all_t: int

  @property
  def group(self) -> int:
    """Query heads per key head."""
    return self.h // self.kv_heads

  @property
  def positional(self) -> bool:
    """Whether a position can hide a key."""
    return self.options.causal or self.options.window is not None

  @property
  def finer(self) -> bool:
    """Whether blocks of the mask are smaller than tiles can be."""
    return self.block is not None and any(n % LANES for n in self.block)

  @property
  def hides(self) -> bool:
    """Whether a query may see no key: by position, ids, a bias of -inf."""
    biased = self.bias is not None or "bias" in self.relative
    return self.positional or self.segments or self.finer or biased

  @property
  def relative_products(self) -> int:
    """Terms of relative positions that are products."""
    return sum(name != "bias" for name in self.relative)

  @property
  def unit(self) -> float:
    """What a score of 1, as the kernels hold it, is in the exponent of 2.

    Bare products keep their scale for the exponent: the maximum, on which all
    else waits, is then that of what the matrix unit delivers.
    """
    added = self.bias is not None or self.slopes or "bias" in self.relative
    bare = not added and self.options.softcap is None and self.options.scale > 0
    return self.options.scale * LOG2E if bare else 1.0

  @property
  def precision(self) -> jax.lax.Precision:
    """float32 operands mean float32 products, not bfloat16 passes."""
    if self.dtype == jnp.float32:
      return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT


def describe(
  q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, options: Options
) -> Problem:
  """The problem that arrays in layout "bhdt" pose."""
  mask = extras.block_mask
  n = sizes(q, k, v, NATIVE)
  relative = extras.relative or Relative()
  given = relative._asdict().items()
  return Problem(
    *n,
    dtype=q.dtype,
    options=options,
    bias=None if extras.bias is None else extras.bias.shape,
    slopes=extras.alibi_slopes is not None,
    relative=tuple(name for name, x in given if x is not None),
    relative_by_example=relative.bias is not None and len(relative.bias) > 1,
    segments=extras.q_segments is not None,
    mask_heads=None if mask is None else mask.shape[0],
    block=None if mask is None else block_size(extras, options, n.t, n.s),
    offset=n.s - n.t if extras.offset is None else None,
    all_t=n.t,
  )
