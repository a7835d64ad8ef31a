"""Attention in float64 numpy, written independently of the kernels' code."""

import numpy as np


def softmax_attention(
  q,
  k,
  v,
  *,
  bias=None,
  alibi_slopes=None,
  relative_bias=None,
  relative_keys=None,
  relative_queries=None,
  visible=None,
  keep=None,
  rate=0.0,
  softcap=None,
  scale=None,
):
  """(out, lse) of arrays [b, t, h, d]; one query at a time.

  Args:
    q: queries.
    k: keys, of heads that divide those of q.
    v: values.
    bias: broadcasts to [b, h, t, s].
    alibi_slopes: [b, h].
    relative_bias: [1|b, 1|h, t + s - 1].
    relative_keys: [1|heads of k, t + s - 1, d].
    relative_queries: [1|h, t + s - 1, d].
    visible: bool, broadcasts to [b, h, t, s].
    keep: bool [b, h, t, s], weights that dropout keeps.
    rate: of dropout.
    softcap: bound of the scores.
    scale: of the products, 1 / sqrt(d) by default.
  """
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  b, t, h, d = q.shape
  s, share = k.shape[1], h // k.shape[2]
  full = (b, h, t, s)
  bias = np.broadcast_to(0.0 if bias is None else bias, full)
  visible = np.broadcast_to(True if visible is None else visible, full)
  keep = np.broadcast_to(True if keep is None else keep, full)
  slopes = np.zeros((b, h)) if alibi_slopes is None else alibi_slopes
  slopes = np.broadcast_to(slopes, (b, h))
  out = np.zeros((b, t, h, v.shape[-1]))
  lse = np.full((b, h, t), -np.inf)
  for e, g, i in np.ndindex(b, h, t):
    keys = k[e, :, g // share]
    row = keys @ q[e, i, g]
    # Differences of positions from -(s - 1) on, the last ones aligned.
    r = np.arange(s) - (i + s - t) + s - 1
    if relative_keys is not None:
      row = row + relative_keys[g // share % len(relative_keys), r] @ q[e, i, g]
    if relative_queries is not None:
      entries = relative_queries[g % len(relative_queries), r]
      row = row + (keys * entries).sum(1)
    row = row * (scale or d**-0.5)
    if relative_bias is not None:
      examples, heads, _ = relative_bias.shape
      row = row + relative_bias[e % examples, g % heads, r]
    row = row + bias[e, g, i]
    row = row - slopes[e, g] * np.abs(i + s - t - np.arange(s))
    if softcap is not None:
      row = softcap * np.tanh(row / softcap)
    seen = visible[e, g, i]
    if not seen.any():
      continue
    top = row[seen].max()
    weights = np.where(seen, np.exp(np.where(seen, row, top) - top), 0.0)
    lse[e, g, i] = top + np.log(weights.sum())
    weights = weights / weights.sum() * keep[e, g, i] / (1.0 - rate)
    out[e, i, g] = weights @ v[e, :, g // share]
  return out, lse
