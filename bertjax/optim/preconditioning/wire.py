"""How statistics of shards become those of the batch: what travels, and when.

Vectors of all layers are put into one buffer of half precision and added up in
one all-reduce: 2 bytes per number. Matrices (K-FAC's) travel as they are.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bertjax.layers.statistics import Found, Wanted

DTYPES = ("bfloat16", "float16", "float32")
# Sums over tokens that become means by the number of tokens of their group.
_MEANS = ("input_sum", "input_square")
_GRAMS = ("input_gram", "output_gram")


def reduce(found: Found, wanted: Wanted, dtype: str) -> Found:
  """Statistics without their axis of shards, as methods read them.

  token_count becomes the number of the batch's tokens, [*stack, groups]; input
  sums become means per group; output sums become, per group, means of the
  gradients that tokens have where the loss is their mean: with a single group
  the bias gradient itself. Grams become such means over all tokens. What has no
  tokens is 0. Rows stay.

  Args:
    found: of `Wanted.collect`.
    wanted: what was asked for.
    dtype: of the buffer of vectors; what only one shard has is not rounded.
  """
  vectors: dict[tuple[str, str], Array] = {}
  reduced: Found = {}
  for path, statistics in found.items():
    depth = len(wanted.layers[path].stack)
    reduced[path] = result = {}
    shares = tokens = None
    if "token_count" in statistics:
      shares, tokens = _counts(
        statistics["token_count"], depth, wanted.skip_padding
      )
      result["token_count"] = tokens
    for name, value in statistics.items():
      if name in _MEANS:
        weights = shares[..., None] if name == "input_sum" else shares
        vectors[path, name] = jnp.moveaxis(value * weights, depth, 0)
      elif name == "output_sum":
        parts = jnp.float32(value.shape[depth + 1])
        if wanted.skip_padding and tokens is not None:
          total = tokens.sum(-1, keepdims=True)
          parts = (total / jnp.maximum(tokens, 1.0))[..., None, :, None]
        vectors[path, name] = jnp.moveaxis(value * parts, depth, 0)
      elif name in _GRAMS:
        total = jnp.maximum(tokens.sum(-1), 1.0)[..., None, None]
        gram = value.sum(depth)
        result[name] = gram / total if name == "input_gram" else gram * total
      elif name != "token_count":
        result[name] = value
  for (path, name), value in _added(vectors, jnp.dtype(dtype)).items():
    reduced[path][name] = value
  return reduced


def _counts(counts: Array, depth: int, uneven: bool) -> tuple[Array, Array]:
  """What sums are multiplied by to add up to means; tokens of each group.

  Args:
    counts: [*stack, shards, groups].
    depth: length of the stack.
    uneven: shards may have unequally many; if not, nobody has to ask them.
  """
  if uneven:
    total = counts.sum(depth, keepdims=True)
    share = jnp.broadcast_to(1 / jnp.maximum(total, 1.0), counts.shape)
    return share, jnp.squeeze(total, depth)
  shards = counts.shape[depth]
  share = 1 / (shards * jnp.maximum(counts, 1.0))
  return share, shards * jnp.take(counts, 0, axis=depth)


def _added(vectors: dict, dtype: jnp.dtype) -> dict:
  """Sums over the leading axis of shards, of all in one buffer."""
  done = {key: v[0] for key, v in vectors.items() if v.shape[0] == 1}
  sent = {key: v for key, v in vectors.items() if v.shape[0] > 1}
  if not sent:
    return done
  buffer = jnp.concatenate(
    [v.reshape(v.shape[0], -1).astype(dtype) for v in sent.values()], axis=1
  )
  # `jnp.sum` would add up, and send, float32.
  total = jax.lax.reduce(
    buffer, jnp.zeros((), dtype), jax.lax.add, (0,)
  ).astype(jnp.float32)
  start = 0
  for key, v in sent.items():
    size = math.prod(v.shape[1:])
    done[key] = total[start : start + size].reshape(v.shape[1:])
    start += size
  return done
