"""What a refresh and a direction cost, and what a method keeps and sends."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.optim import PRECONDITIONERS
from bertjax.optim.preconditioning.base import Preconditioner
from bertjax.optim.preconditioning.layers import Layer

# Options by method; SNGD keeps as many samples as rows, `ROWS_SHARE` tokens
# each.
METHODS: dict[str, dict[str, Any]] = {
  "mkor": dict(name="mkor", rule="reference"),
  "kfac": dict(name="kfac", form="eigen", inverse_interval=1),
  "kfac, inverse": dict(name="kfac", form="inverse", inverse_interval=1),
  "eva": dict(name="eva"),
  "sngd": dict(name="sngd"),
}


def refresh(
  *, name: str, width: int, tokens: int, repeats: int
) -> dict[str, float]:
  """Costs of one square layer without bias on one device, float32.

  Every token is a row, so that SNGD has its best case in accuracy and its
  worst in work.

  Args:
    name: key of `METHODS`.
    width: of inputs and outputs.
    tokens: of the batch.
    repeats: of each time.

  Returns:
    "refresh ms", from inputs and output gradients to factors, and "direction
    ms", the least of `repeats`; "state bytes"; "sent bytes" of a device per
    refresh.
  """
  method = _method(name, tokens).method
  layer = Layer("layer", (width, width), 0, 1, bias=False)
  keys = jax.random.split(jax.random.key(0), 3)
  x, g = (jax.random.normal(key, (tokens, width)) for key in keys[:2])
  gradient = jax.random.normal(keys[2], (width, width))
  factors = method.init(layer)
  step = jnp.zeros((), jnp.int32)

  @jax.jit
  def refreshed(factors, x, g):
    found = statistics(x, g / tokens)
    wanted = {n: found[n] for n in method.wants(layer)}
    return method.refresh(layer, factors, wanted, step)

  factors = refreshed(factors, x, g)
  directed = jax.jit(lambda f, v: method.direction(layer, f, v))
  preconditioner = _method(name, tokens)
  return {
    "refresh ms": _milliseconds(refreshed, (factors, x, g), repeats),
    "direction ms": _milliseconds(directed, (factors, gradient), repeats),
    "state bytes": float(
      sum(leaf.nbytes for leaf in jax.tree.leaves(factors))
    ),
    "sent bytes": float(
      _sent(preconditioner, method.wants(layer), width, tokens)
    ),
  }


def _method(name: str, tokens: int) -> Preconditioner:
  options = dict(METHODS[name])
  row = options.pop("name")
  if row == "sngd":
    options["rank"] = tokens
  return PRECONDITIONERS[row](**options)


def statistics(x: jax.Array, g: jax.Array) -> dict[str, jax.Array]:
  """As `wire.reduce` gives them; unused ones are compiled away."""
  count = jnp.full((1,), x.shape[0], jnp.float32)
  return dict(
    token_count=count,
    input_sum=x.mean(0, keepdims=True),
    output_sum=g.sum(0, keepdims=True),
    input_gram=x.T @ x / count,
    output_gram=g.T @ g * count,
    input_rows=x,
    output_rows=g,
  )


def _sent(
  preconditioner: Preconditioner,
  names: tuple[str, ...],
  width: int,
  tokens: int,
) -> int:
  """Bytes of the statistics that devices add up or gather."""
  half = jnp.dtype(preconditioner.wire_dtype).itemsize
  sizes = dict(
    token_count=0,  # equal on all devices: nobody asks
    input_sum=width * half,
    output_sum=width * half,
    input_gram=4 * width**2,
    output_gram=4 * width**2,
    input_rows=4 * tokens * width,
    output_rows=4 * tokens * width,
  )
  return sum(sizes[name] for name in names)


def _milliseconds(
  function: Callable[..., Any], arguments: tuple, repeats: int
) -> float:
  """The least of several times: others use the machine, too."""
  jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - start)
  return 1e3 * float(np.min(times))
