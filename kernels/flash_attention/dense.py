"""Short rows on a CPU: weights that a backward pass needs are kept for it.

What is differentiated is the reference, which takes less time than computing
the weights again; what is not is the blockwise form, which takes half of the
reference's time.
"""

import functools

import jax

from kernels.flash_attention import blockwise, reference
from kernels.flash_attention.backend import static_mask, with_mask
from kernels.flash_attention.capabilities import Capabilities, refuse
from kernels.flash_attention.options import Extras, Options, check

CAPABILITIES = Capabilities("dense", tiles=None)


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, options: Options
) -> tuple[jax.Array, jax.Array]:
  """(out, lse), as `reference.attend` says; float32 also of wider types.

  Raises:
    ValueError: shapes that do not fit, or `Unsupported`, as the reference.
  """
  check(q, k, v, extras, options)
  refuse(CAPABILITIES, q, k, v, extras, options)
  mask, extras = static_mask(extras)
  return _attend(options, mask, q, k, v, extras)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, mask, q, k, v, extras):
  return blockwise.forward(q, k, v, with_mask(extras, mask), options)


def _forward(options, mask, q, k, v, extras):
  return jax.vjp(
    lambda *x: reference.attend(*x[:3], with_mask(x[3], mask), options),
    *(q, k, v, extras),
  )


def _backward(options, mask, pull, cotangents):
  del options, mask
  return pull(cotangents)


_attend.defvjp(_forward, _backward)
