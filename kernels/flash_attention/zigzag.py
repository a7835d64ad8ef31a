"""A causal ring in which every device has the same to do.

Device i of n holds the parts i and 2n - 1 - i of the positions: an early and a
late one. Of the keys of another device its queries then see either the early
half (all queries do) or both halves (the late queries do): always half of the
products, and none of them needs a mask. With consecutive positions the last
device would work while the first waits (Brandon et al. 2023, arXiv:2311.09431,
balance the same by stripes).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels.flash_attention.backend import Gradients
from kernels.flash_attention.options import Extras, Options, Unsupported
from kernels.flash_attention.placement import Call, Moving
from kernels.flash_attention.relative import Relative


def zigzag_order(length: int, count: int) -> np.ndarray:
  """Positions in the order in which `count` devices hold them, int [length].

  x[order] is what attention with placement "zigzag" takes; y[argsort(order)]
  puts back what it returns.

  Raises:
    ValueError: 2 * count parts do not divide the length.
  """
  if length % (2 * count):
    raise ValueError(
      f"length={length} does not divide into two parts for each of {count}"
      " devices."
    )
  parts = np.arange(length).reshape(2 * count, -1)
  return np.concatenate(
    [parts[[i, 2 * count - 1 - i]].ravel() for i in range(count)]
  )


def check(t: int, s: int, count: int, extras: Extras, options: Options) -> None:
  """Refuses what needs more than the order of positions.

  Raises:
    ValueError: what is given, and what would be right.
  """
  if not options.causal:
    raise ValueError(
      "placement='zigzag' balances causal attention; other attention is"
      " balanced as it is, with placement='contiguous'."
    )
  given = {
    "window": options.window,
    "alibi_slopes": extras.alibi_slopes,
    "block_mask": extras.block_mask,
  }
  terms = (extras.relative or Relative())._asdict()
  given |= {f"relative_{name}": x for name, x in terms.items()}
  for name in (name for name, value in given.items() if value is not None):
    raise Unsupported(
      f"{name} counts positions; placement='zigzag' only knows their order."
    )
  if t != s or t % (2 * count):
    raise ValueError(
      f"placement='zigzag' takes as many queries as keys, a multiple of"
      f" {2 * count} for {count} devices, not {(t, s)}."
    )


def _sliced(x: jax.Array, axis: int, part: slice) -> jax.Array:
  return jax.lax.slice_in_dim(x, part.start, part.stop, axis=axis)


def _padded(x: jax.Array, axis: int, part: slice, length: int, fill=0.0):
  """x as the part of something longer that is `fill` elsewhere."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (part.start, length - part.stop)
  return jnp.pad(x, widths, constant_values=fill)


@dataclasses.dataclass(frozen=True)
class _View:
  """A part of the local queries against a part of the keys, without a mask."""

  rows: slice
  columns: slice

  def inputs(self, call: Call, turn: int, moving: Moving):
    """(q, k, v, extras, options) of the parts."""
    options = dataclasses.replace(call.options, causal=False)
    extras = call._replace(options=options).shard(turn, moving)
    t = options.layout.index("t")
    changes = {}
    if extras.bias is not None:
      bias = _sliced(extras.bias, 3, self.columns)
      changes["bias"] = (
        bias if bias.shape[2] == 1 else _sliced(bias, 2, self.rows)
      )
    if extras.q_segments is not None:
      changes["q_segments"] = _sliced(extras.q_segments, 1, self.rows)
      changes["kv_segments"] = _sliced(extras.kv_segments, 1, self.columns)
    if extras.seed is not None:
      first = np.array([self.rows.start, self.columns.start], np.uint32)
      changes["seed"] = extras.seed.at[4:].add(first)
    return (
      _sliced(call.q, t, self.rows),
      _sliced(moving.k, t, self.columns),
      _sliced(moving.v, t, self.columns),
      extras._replace(**changes),
      options,
    )

  def forward(self, call: Call, turn: int, moving: Moving):
    """(out, lse) of all local queries; nothing seen outside the view."""
    out, lse = call.backend.forward(*self.inputs(call, turn, moving))
    t = call.options.layout.index("t")
    length = call.q.shape[t]
    return (
      _padded(out.astype(jnp.float32), t, self.rows, length),
      _padded(lse, 2, self.rows, length, -jnp.inf),
    )

  def backward(self, call: Call, turn: int, moving: Moving, results):
    """Gradients in the shapes of what is local; zero outside the view."""
    t = call.options.layout.index("t")
    axes = (t, 2, t, 2)
    parts = [_sliced(x, axis, self.rows) for x, axis in zip(results, axes)]
    inputs = self.inputs(call, turn, moving)
    found = call.backend.backward(*inputs, *parts)
    length, keys = call.q.shape[t], moving.k.shape[t]
    bias = found.bias
    if bias is not None:
      bias = _padded(bias, 3, self.columns, keys)
      if bias.shape[2] > 1:
        bias = _padded(bias, 2, self.rows, length)
    return Gradients(
      _padded(found.q, t, self.rows, length),
      _padded(found.k, t, self.columns, keys),
      _padded(found.v, t, self.columns, keys),
      bias,
    )


class Zigzag:
  """The `Placement`: see the module's docstring."""

  @staticmethod
  def forward(call, turn, moving):
    return Zigzag._run("forward", call, turn, moving)

  @staticmethod
  def backward(call, turn, moving, results):
    return Zigzag._run("backward", call, turn, moving, results)

  @staticmethod
  def _run(direction, call, turn, moving, *results):
    length = call.q.shape[call.options.layout.index("t")]
    early, late = slice(0, length // 2), slice(length // 2, length)
    everything = slice(0, length)
    if turn == 0:
      return Zigzag._own(direction, call, moving, *results)
    ahead, behind = (
      getattr(view, direction)
      for view in (_View(everything, early), _View(late, everything))
    )
    # The keys are those of an earlier device, or else of a later one.
    return jax.lax.cond(
      jax.lax.axis_index(call.axis) >= turn,
      lambda: ahead(call, turn, moving, *results),
      lambda: behind(call, turn, moving, *results),
    )

  @staticmethod
  def _own(direction, call, moving, *results):
    """The own keys: the order in the shard is that of the positions."""
    extras = call.shard(0, moving)._replace(offset=None)
    run = getattr(call.backend, direction)
    flat = (x for group in results for x in group)
    found = run(call.q, moving.k, moving.v, extras, call.options, *flat)
    if direction == "backward":
      return found
    out, lse = found
    return out.astype(jnp.float32), lse
