"""What a backend is, and the one differentiation rule that all of them share.

A backend is a module that says what it can do and offers two functions on plain
arrays:

    CAPABILITIES: see `capabilities.py`
    forward(q, k, v, extras, options) -> (out, lse)
    backward(q, k, v, extras, options, out, lse, dout, dlse) -> Gradients

`out` has the layout and dtype of v, `lse` is float32 [b, h, t]; gradients have
the shapes of what they are gradients of. `attend` makes an operator of them. It
is differentiated here and not in each backend, so that a choice by platform can
be made inside the two passes: both sides of the choice then keep the same
residuals (q, k, v, extras, out, lse), of which "flash_out" and "flash_lse" are
names for a remat policy.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels.flash_attention.capabilities import Capabilities, refuse
from kernels.flash_attention.options import Extras, Options, check
from kernels.flash_attention.relative import Relative

RESIDUALS = ("flash_out", "flash_lse")
# A TPU lays a stack of these out as the kernels write them; of lse as it is it
# would make rows of layers, and write each of them number by number.
_TILE = (8, 128)


class Gradients(NamedTuple):
  """Cotangents; the last three are None where there is no such input."""

  q: jax.Array
  k: jax.Array
  v: jax.Array
  bias: jax.Array | None = None
  alibi_slopes: jax.Array | None = None
  relative: Relative | None = None


class Backend(Protocol):
  """A module, or a hashable object like one; see the module's docstring."""

  CAPABILITIES: Capabilities
  forward: Callable[..., tuple[jax.Array, jax.Array]]
  backward: Callable[..., Gradients]


class _Static:
  """A numpy array as a hashable static argument."""

  def __init__(self, array: np.ndarray):
    self.array = np.ascontiguousarray(array)
    self._key = (self.array.shape, self.array.dtype.str, self.array.tobytes())

  def __hash__(self):
    return hash(self._key)

  def __eq__(self, other):
    return isinstance(other, _Static) and self._key == other._key


def static_mask(extras: Extras) -> tuple[_Static | None, Extras]:
  """A numpy mask, hashable and apart: as an operand it would be traced."""
  if not isinstance(extras.block_mask, np.ndarray):
    return None, extras
  return _Static(extras.block_mask), extras._replace(block_mask=None)


def with_mask(extras: Extras, mask: _Static | None) -> Extras:
  """The inverse of `static_mask`."""
  return extras if mask is None else extras._replace(block_mask=mask.array)


def delta(
  out: jax.Array, dout: jax.Array, dlse: jax.Array, layout: str
) -> jax.Array:
  """D = rowsum(dout * out) - dlse, float32 [b, h, t]; dS = P * (dP - D)."""
  product = dout.astype(jnp.float32) * out.astype(jnp.float32)
  rows = product.sum(layout.index("d"))
  if layout == "bthd":
    rows = rows.swapaxes(1, 2)
  return rows - dlse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(backend, options, mask, q, k, v, extras):
  return backend.forward(q, k, v, with_mask(extras, mask), options)


def _attend_forward(backend, options, mask, q, k, v, extras):
  out, lse = _attend(backend, options, mask, q, k, v, extras)
  shape = lse.shape
  if lse.size % math.prod(_TILE) == 0:
    lse = lse.reshape(-1, *_TILE)
  out, lse = map(checkpoint_name, (out, lse), RESIDUALS)
  lse = lse.reshape(shape)
  return (out, lse), (q, k, v, extras, out, lse)


def _attend_backward(backend, options, mask, residuals, cotangents):
  q, k, v, extras, out, lse = residuals
  dout, dlse = cotangents
  # An lse of -inf depends on nothing, but logaddexp's gradient there is NaN.
  dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)
  grads = backend.backward(
    q, k, v, with_mask(extras, mask), options, out, lse, dout, dlse
  )
  # None is the gradient of integers.
  extras = Extras(
    bias=grads.bias, alibi_slopes=grads.alibi_slopes, relative=grads.relative
  )
  return grads.q, grads.k, grads.v, extras


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
  backend: Backend,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of a backend, differentiable in what has `Gradients`.

  Raises:
    ValueError: shapes that do not fit, or `Unsupported` by the backend.
  """
  check(q, k, v, extras, options)
  refuse(backend.CAPABILITIES, q, k, v, extras, options)
  mask, extras = static_mask(extras)
  return _attend(backend, options, mask, q, k, v, extras)
