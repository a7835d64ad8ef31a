"""What the passes share: products, the order of items, guarded visits."""

import collections
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.flash_attention.tpu.problem import Problem
from kernels.flash_attention.tpu.schedule import (
  COMPUTE,
  PARTIAL,
  Schedule,
  Visit,
)


def dot(
  problem: Problem, a: jax.Array, b: jax.Array, axes: tuple[int, int]
) -> jax.Array:
  """float32 product of two matrices, contracted over one axis of each."""
  return jax.lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    precision=problem.precision,
    preferred_element_type=jnp.float32,
  )


def pipeline(
  items: Iterable[Any],
  ahead: int,
  first: Callable[[Any], Any],
  second: Callable[[Any, Any], None],
) -> None:
  """Traces `second(item, first(item))` with `first` running ahead.

  The compiler schedules within a window of the program's order: the matrix
  unit's work on one item must stand beside the vector unit's on another.
  """
  waiting = collections.deque()
  for item in items:
    waiting.append((item, first(item)))
    if len(waiting) > ahead:
      second(*waiting.popleft())
  while waiting:
    second(*waiting.popleft())


class Sums:
  """Sums that are handed over as soon as their last term has arrived."""

  def __init__(self, terms: int, done: Callable[[Any, jax.Array], None]):
    self._terms, self._done = terms, done
    self._sums = {}

  def add(self, key: Any, term: jax.Array) -> None:
    total, count = self._sums.pop(key, (None, 0))
    total = term if total is None else total + term
    if count + 1 == self._terms:
      self._done(key, total)
    else:
      self._sums[key] = total, count + 1


def when_visited(
  schedule: Schedule, visit: Visit, run: Callable[[bool], None]
) -> None:
  """Calls `run(masked)` if the visit computes.

  Where only some visits compute, or only some are masked, the choice is made at
  run time between bodies that are each free of it.
  """
  if schedule.partial is None:
    kinds = [(False, ~visit.has(PARTIAL)), (True, visit.has(PARTIAL))]
  else:
    kinds = [(schedule.partial, None)]
  for masked, condition in kinds:
    if schedule.computes is None:
      computes = visit.has(COMPUTE)
      condition = computes if condition is None else condition & computes
    if condition is None:
      run(masked)
    else:
      pl.when(condition)(lambda masked=masked: run(masked))
