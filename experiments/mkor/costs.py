"""What a refresh and a direction cost, and what is kept and sent."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bertjax.optim import PRECONDITIONERS
from bertjax.optim.preconditioning import Preconditioner
from bertjax.optim.preconditioning.layers import Layer

# `optim.precondition` by name; a rank is a share of the rows. HyLo's first
# refreshes, which are measured, are of its careful and dear kind.
METHODS: dict[str, dict[str, Any]] = {
  "MKOR": dict(name="mkor", rule="reference"),
  "K-FAC": dict(name="kfac", form="eigen", inverse_interval=1),
  "K-FAC, inverse": dict(name="kfac", form="inverse", inverse_interval=1),
  "Eva": dict(name="eva"),
  "SNGD": dict(name="sngd", rank=1.0),
  "HyLo": dict(name="hylo", rank=0.1),
}


def layer(
  *, name: str, width: int, tokens: int, repeats: int
) -> dict[str, float]:
  """Costs of one square layer without bias on one device, float32.

  Every token is a row of its own.

  Args:
    name: key of `METHODS`.
    width: of inputs and outputs.
    tokens: of the batch.
    repeats: of each time, of which the least counts.

  Returns:
    "statistics ms", from inputs and output gradients to statistics; "refresh
    ms", from those to factors; "direction ms"; "state bytes"; "sent bytes" of a
    device per refresh.
  """
  preconditioner = _preconditioner(name, tokens)
  method = preconditioner.method
  square = Layer("layer", (width, width), 0, 1, bias=False)
  names = method.wants(square)
  keys = jax.random.split(jax.random.key(0), 3)
  x, g = (jax.random.normal(key, (tokens, width)) for key in keys[:2])
  gradient = jax.random.normal(keys[2], (width, width))
  step = jnp.zeros((), jnp.int32)

  asked = jax.jit(lambda x, g: _statistics(x, g / tokens, names))
  refresh = jax.jit(lambda f, found: method.refresh(square, f, found, step))
  directed = jax.jit(lambda f, v: method.direction(square, f, v))
  found = asked(x, g)
  factors = refresh(method.init(square), found)
  return {
    "statistics ms": _milliseconds(asked, (x, g), repeats),
    "refresh ms": _milliseconds(refresh, (factors, found), repeats),
    "direction ms": _milliseconds(directed, (factors, gradient), repeats),
    "state bytes": float(sum(f.nbytes for f in jax.tree.leaves(factors))),
    "sent bytes": float(_sent(preconditioner, names, width, tokens)),
  }


def _preconditioner(name: str, tokens: int) -> Preconditioner:
  options = dict(METHODS[name])
  if "rank" in options:
    options["rank"] = max(1, round(options["rank"] * tokens))
  return PRECONDITIONERS[options.pop("name")](**options)


def _statistics(
  x: jax.Array, g: jax.Array, names: tuple[str, ...]
) -> dict[str, jax.Array]:
  """As `preconditioning.wire.reduce` gives them."""
  count = jnp.float32(x.shape[0])
  found = dict(
    token_count=count[None],
    input_sum=x.mean(0, keepdims=True),
    output_sum=g.sum(0, keepdims=True),
    input_gram=x.T @ x / count,
    output_gram=g.T @ g * count,
    input_rows=x,
    output_rows=g,
  )
  return {name: found[name] for name in names}


def _sent(
  preconditioner: Preconditioner,
  names: tuple[str, ...],
  width: int,
  tokens: int,
) -> int:
  """Bytes of the statistics that devices add up or gather."""
  each = jnp.dtype(preconditioner.wire_dtype).itemsize
  sizes = dict(
    token_count=0,  # equal on all devices: nobody asks
    input_sum=width * each,
    output_sum=width * each,
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
  return 1e3 * min(times)
