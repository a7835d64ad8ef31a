"""FLOPs of the matrix products in a traced function."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def products(fn: Callable[..., Any], *args: Any) -> float:
  """Two FLOPs for every multiplication with addition of the products.

  Loops with a known number of turns count as often; of the branches of a
  condition the dearest counts. Nothing is computed.

  Args:
    fn: a function of arrays.
    *args: arrays, or their shapes.
  """
  return float(_counted(jax.make_jaxpr(fn)(*args).jaxpr))


def _counted(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left, out = equation.invars[0].aval, equation.outvars[0].aval
      size = 2 * out.size
      for axis in contracted:
        size *= left.shape[axis]
      total += size
      continue
    inner = [_counted(x) for x in _inside(tuple(equation.params.values()))]
    if equation.primitive.name == "cond":
      total += max(inner, default=0)
    else:
      total += equation.params.get("length", 1) * sum(inner)
  return total


def _inside(value: Any) -> Iterator[Any]:
  """The programs that an equation's parameters hold."""
  if isinstance(value, (list, tuple)):
    for item in value:
      yield from _inside(item)
  elif hasattr(value, "eqns"):
    yield value
  elif hasattr(value, "jaxpr"):
    yield from _inside(value.jaxpr)
