"""Flax's `init` and `apply` as one program, where they are one per operation.

Each of these takes a test some 30 ms to compile. So is `points.group`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from bertjax import points

group = jax.jit(
  points.group, static_argnums=(1, 2), static_argnames="skip_near_origin"
)


def init(module: nn.Module, rngs: Any, *arguments: Any, **options: Any) -> Any:
  """`module.init(rngs, *arguments, **options)`.

  Args:
    module: hashable, as all ours are.
    rngs: a key, or keys by name.
    *arguments: pytrees of arrays.
    **options: hashable.
  """
  return _init(module, tuple(sorted(options.items())), rngs, arguments)


def apply(
  module: nn.Module,
  variables: Any,
  *arguments: Any,
  rngs: Any = None,
  **options: Any,
) -> Any:
  """`module.apply(variables, *arguments, rngs=rngs, **options)`; see `init`."""
  known = tuple(sorted(options.items()))
  return _apply(module, known, variables, arguments, rngs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(module, options, rngs, arguments):
  return module.init(rngs, *arguments, **dict(options))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(module, options, variables, arguments, rngs):
  return module.apply(variables, *arguments, rngs=rngs, **dict(options))
