"""Relative positions: buckets of distances, and a learned bias by bucket.

T5 (Raffel et al. 2019, arXiv:1910.10683, section 2.1) and MPNet add to every
score a number that depends on the head and on the bucket of the distance; the
numbers are shared by all layers. DeBERTa (He et al. 2020, arXiv:2006.03654) in
its second and third version has other buckets.

A position here is that of the key minus that of the query. The buckets are
computed with numpy while tracing: lengths are static.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.typing import Initializer
from jaxtyping import Array, Float

from bertjax.layers.linear import bert_init


def differences(t: int, s: int) -> np.ndarray:
  """Relative positions of s keys to t queries, the last ones aligned.

  Returns:
    int [t + s - 1], from 1 - s to t - 1: the order in which attention takes its
    relative terms.
  """
  return np.arange(1 - s, t)


def t5_bucket(
  relative: np.ndarray,
  *,
  num_buckets: int = 32,
  max_distance: int = 128,
  bidirectional: bool = True,
) -> np.ndarray:
  """T5's bucket of relative positions, int of the same shape.

  Half of the buckets are for one distance each; the other half grow with the
  logarithm, and the last is for all from `max_distance` on.

  Args:
    relative: position of the key minus that of the query.
    num_buckets: of both directions together.
    max_distance: see above.
    bidirectional: later keys have buckets of their own, the upper half; else
      they share that of distance 0, for they are not seen.

  Raises:
    ValueError: too few buckets, or a distance that they reach one by one.
  """
  side = num_buckets // 2 if bidirectional else num_buckets
  exact = side // 2
  if exact < 1 or num_buckets % (2 if bidirectional else 1):
    raise ValueError(
      f"num_buckets={num_buckets} must be an even number of at least 4, or 2"
      " or more if not bidirectional."
    )
  if max_distance <= exact:
    raise ValueError(
      f"max_distance={max_distance} must exceed {exact}, the number of"
      f" distances with a bucket of their own of num_buckets={num_buckets}."
    )
  relative = np.asarray(relative)
  distance = np.abs(relative) if bidirectional else np.maximum(-relative, 0)
  # In float32, as the published models were trained: buckets of powers of two
  # hang on its rounding.
  ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
  grown = np.log(ratio) / np.float32(math.log(max_distance / exact))
  large = exact + (grown * np.float32(side - exact)).astype(np.int64)
  bucket = np.where(distance < exact, distance, np.minimum(large, side - 1))
  return bucket + side * (bidirectional & (relative > 0))


def deberta_bucket(
  relative: np.ndarray, *, num_buckets: int = 256, max_distance: int = 512
) -> np.ndarray:
  """The log buckets of DeBERTa's versions 2 and 3, signed int.

  Distances up to half of `num_buckets` are themselves; longer ones grow with
  the logarithm up to `num_buckets` - 1 at `max_distance` - 1. Signs are kept.

  Args:
    relative: positions.
    num_buckets: of one direction.
    max_distance: positions of the longest sequence.

  Raises:
    ValueError: too few buckets, or no distance beyond the first half.
  """
  mid = num_buckets // 2
  if mid < 1 or max_distance - 1 <= mid:
    raise ValueError(
      f"num_buckets={num_buckets} must be at least 2 and max_distance="
      f"{max_distance} exceed {mid + 1}, half of it and one."
    )
  relative = np.asarray(relative)
  distance = np.maximum(np.abs(relative), mid)
  # float64: in float32 the ceiling turns at other distances.
  grown = np.log(distance / mid) / math.log((max_distance - 1) / mid)
  large = np.ceil(grown * (mid - 1)).astype(np.int64) + mid
  signed = np.sign(relative) * large
  return np.where(np.abs(relative) <= mid, relative, signed)


def deberta_rows(
  t: int, s: int, *, num_buckets: int = 256, max_distance: int = 512
) -> np.ndarray:
  """Rows of DeBERTa's table of 2 * num_buckets, int [t + s - 1].

  DeBERTa's distances are the query's position minus the key's, in its code and
  models for both of its terms; the paper has the opposite for the second.
  """
  bucket = deberta_bucket(
    -differences(t, s), num_buckets=num_buckets, max_distance=max_distance
  )
  return np.clip(bucket + num_buckets, 0, 2 * num_buckets - 1)


class RelativeBias(nn.Module):
  """A learned number by bucket and head, for `relative_bias` of attention.

  Attributes:
    num_heads: heads h.
    num_buckets: rows of the table.
    max_distance: see `t5_bucket`.
    bidirectional: see `t5_bucket`.
    init: of the table.
  """

  num_heads: int
  num_buckets: int = 32
  max_distance: int = 128
  bidirectional: bool = True
  init: Initializer = bert_init

  @nn.compact
  def __call__(self, t: int, s: int) -> Float[Array, "1 h n"]:
    """The bias of the n = t + s - 1 relative positions, float32."""
    table = self.param(
      "embedding",
      nn.with_logical_partitioning(self.init, ("positions", "heads")),
      (self.num_buckets, self.num_heads),
      jnp.float32,
    )
    buckets = t5_bucket(
      differences(t, s),
      num_buckets=self.num_buckets,
      max_distance=self.max_distance,
      bidirectional=self.bidirectional,
    )
    return jnp.take(table, buckets, axis=0).T[None]
