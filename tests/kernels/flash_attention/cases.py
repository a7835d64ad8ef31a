"""The table of attention problems that every backend must solve.

A case is a seed-independent problem: sizes, the arguments of
`flash_attention`, and what they mean to the numpy oracle. Lengths are 1, one
off 128, and 200: never a multiple of a tile.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.draws import normal


@dataclasses.dataclass(frozen=True)
class Case:
  """One problem.

  Attributes:
    sizes: (b, t, s, h, heads of k and v, d, dv).
    arguments: of `flash_attention`; numpy block masks are static.
    oracle: of `oracle.softmax_attention`.
    traced: whether the block mask is to be traced.
  """

  sizes: tuple[int, ...]
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  oracle: dict[str, Any] = dataclasses.field(default_factory=dict)
  traced: bool = False


def qkv(sizes, dtype=jnp.float32):
  """q, k, v and the weights of a scalar loss of (out, lse)."""
  b, t, s, h, kv, d, dv = sizes
  return (
    normal(0, b, t, h, d, dtype=dtype),
    normal(1, b, s, kv, d, dtype=dtype),
    normal(2, b, s, kv, dv, dtype=dtype),
    normal(3, b, t, h, dv),
    normal(4, b, h, t),
  )


def _both(one, other):
  """A problem with the arguments of two, which share none."""
  assert one.sizes == other.sizes and not one.oracle.keys() & other.oracle
  return Case(
    one.sizes,
    one.arguments | other.arguments,
    one.oracle | other.oracle,
    one.traced or other.traced,
  )


def positions(t, s):
  return np.arange(t)[:, None] + s - t, np.arange(s)[None]


def _causal(sizes):
  rows, columns = positions(*sizes[1:3])
  return Case(sizes, {"causal": True}, {"visible": columns <= rows})


def _window(sizes, left, right):
  rows, columns = positions(*sizes[1:3])
  shown = (columns >= rows - left) & (columns <= rows + right)
  return Case(sizes, {"window": (left, right)}, {"visible": shown})


def _segments(sizes):
  b, t, s = sizes[:3]
  # Padding (0) at both ends, a query segment (5) that has no keys.
  q_ids = np.sort(np.random.default_rng(5).integers(0, 6, (b, t)))
  kv_ids = np.sort(np.random.default_rng(6).integers(0, 5, (b, s)))
  shown = (q_ids[:, :, None] == kv_ids[:, None]) & (kv_ids[:, None] > 0)
  ids = jax.device_put((q_ids, kv_ids))
  return Case(sizes, {"segment_ids": ids}, {"visible": shown[:, None]})


def _lengths(sizes, lengths):
  shown = np.arange(sizes[2]) < np.array(lengths)[:, None]
  return Case(
    sizes,
    {"kv_lengths": jax.device_put(np.array(lengths))},
    {"visible": shown[:, None, None]},
  )


def _bias(sizes, shape, **more):
  bias = normal(7, *shape)
  cap = {"softcap": more["logit_softcap"]} if more else {}
  return Case(sizes, {"bias": bias, **more}, {"bias": np.asarray(bias), **cap})


def _alibi(sizes, shape):
  slopes = np.abs(normal(8, *shape)) / 8
  return Case(
    sizes, {"alibi_slopes": jax.device_put(slopes)}, {"alibi_slopes": slopes}
  )


def _relative(sizes, bias=None, keys=None, queries=None, **more):
  """Terms of relative positions with so many (examples and) heads."""
  _, t, s, _, _, d, _ = sizes
  shapes = {
    "relative_bias": None if bias is None else (*bias, t + s - 1),
    "relative_keys": keys and (keys, t + s - 1, d),
    "relative_queries": queries and (queries, t + s - 1, d),
  }
  terms = {
    name: normal(20 + seed, *shape)
    for seed, (name, shape) in enumerate(shapes.items())
    if shape
  }
  plain = {name: np.asarray(x, np.float64) for name, x in terms.items()}
  other = more.pop("arguments", {})
  return Case(sizes, terms | other, plain | more)


# Arguments of `flash_attention` that it is differentiable in, beside q, k, v.
DIFFERENTIABLE = (
  "bias",
  "alibi_slopes",
  "relative_bias",
  "relative_keys",
  "relative_queries",
)


def _relative_causal(sizes, **heads):
  rows, columns = positions(*sizes[1:3])
  return _relative(
    sizes,
    visible=columns <= rows,
    softcap=3.0,
    scale=0.4,
    arguments={"causal": True, "logit_softcap": 3.0, "sm_scale": 0.4},
    **heads,
  )


def _blocks(sizes, block, heads, traced=False, causal=False):
  t, s = sizes[1:3]
  count = -(-t // block[0]), -(-s // block[1])
  mask = np.random.default_rng(9).random((heads, *count)) < 0.5
  mask[:, 0] = False  # no key for the first rows
  shown = np.kron(mask, np.ones(block, bool))[None, :, :t, :s]
  if causal:
    rows, columns = positions(t, s)
    shown = shown & (columns <= rows)
  arguments = {"block_mask": mask, "block_size": block, "causal": causal}
  return Case(sizes, arguments, {"visible": shown}, traced)


def _everything(sizes):
  b, t, s, h = sizes[:4]
  rows, columns = positions(t, s)
  lengths = np.arange(1, b + 1) * s // b
  bias, slopes = normal(10, 1, h, t, s), np.abs(normal(11, h)) / 8
  shown = (columns >= rows - 90) & (columns <= rows + 70)
  shown = shown & (np.arange(s) < lengths[:, None])[:, None, None]
  return Case(
    sizes,
    {
      "bias": bias,
      "alibi_slopes": jax.device_put(slopes),
      "kv_lengths": jax.device_put(lengths),
      "window": (90, 70),
      "logit_softcap": 3.0,
      "sm_scale": 0.4,
    },
    {
      "bias": np.asarray(bias),
      "alibi_slopes": slopes[None],
      "visible": shown,
      "softcap": 3.0,
      "scale": 0.4,
    },
  )


_MORE_KEYS, _MORE_QUERIES = (
  (1, 127, 200, 2, 1, 16, 16),
  (1, 200, 129, 2, 2, 16, 16),
)
_LENGTHS, _FULL = (3, 40, 129, 2, 1, 72, 96), (2, 33, 129, 4, 2, 16, 16)
_BLOCKS = (2, 300, 200, 2, 1, 16, 16)

# What no other argument changes the meaning of is tested together: a term in
# the scores with what hides keys. Each is told apart by its own gradient.
CASES = {
  "single_token": Case((2, 1, 1, 3, 3, 8, 8)),
  "plain": Case((2, 129, 200, 2, 2, 20, 12)),
  "causal_more_keys_alibi": _both(
    _causal(_MORE_KEYS), _alibi(_MORE_KEYS, (2,))
  ),
  "causal_more_queries_bias_shared_capped": _both(
    _causal(_MORE_QUERIES),
    _bias(_MORE_QUERIES, (1, 1, 200, 129), logit_softcap=2.0),
  ),
  "window_grouped_heads": _window((2, 129, 127, 4, 2, 16, 24), 30, 7),
  "segments": _segments((2, 127, 200, 2, 2, 16, 16)),
  "lengths_bias_per_key": _both(
    _lengths(_LENGTHS, (129, 0, 65)), _bias(_LENGTHS, (3, 1, 1, 129))
  ),
  "bias_full_alibi_per_example": _both(
    _bias(_FULL, (2, 4, 33, 129)), _alibi(_FULL, (2, 4))
  ),
  "blocks": _blocks((1, 200, 300, 2, 2, 16, 16), (128, 128), 1),
  "blocks_traced_bias_per_head": _both(
    _blocks(_BLOCKS, (128, 128), 1, True), _bias(_BLOCKS, (1, 2, 300, 200))
  ),
  "blocks_per_head": _blocks(
    (2, 300, 300, 2, 1, 16, 16), (128, 128), 2, causal=True
  ),
  "relative_bias": _relative((2, 129, 200, 2, 2, 16, 12), bias=(1, 2)),
  "relative_keys": _relative((2, 40, 129, 4, 2, 16, 24), keys=1),
  "relative_queries": _relative((2, 129, 33, 4, 2, 16, 24), queries=4),
  "relative_causal_capped": _relative_causal(
    (2, 127, 200, 4, 2, 16, 24), bias=(2, 1), keys=2, queries=1
  ),
  "everything": _everything((2, 129, 200, 4, 2, 16, 24)),
}
