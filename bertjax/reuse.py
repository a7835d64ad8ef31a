"""What is made once for equal arguments, and what makes arguments equal."""

import functools
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)

# The programs of a stage and of the next, and of what they are compared with.
# Of code: on a TPU BERT-base's step is 27 MiB.
_COUNT = 4
_forget: list[Callable[[], None]] = []


def kept(function: F) -> F:
  """`function`, which keeps its last results by their arguments.

  For what takes long to trace or to compile and holds no numbers. Arguments
  that have no hash, such as an objective with an array, are nobody's equal.
  """
  cached = functools.lru_cache(maxsize=_COUNT)(function)
  _forget.append(cached.cache_clear)

  @functools.wraps(function)
  def call(*args):
    try:
      hash(args)
    except TypeError:
      return function(*args)
    return cached(*args)

  return call


def forget() -> None:
  """Makes everything anew from here on, for code that replaces functions."""
  for clear in _forget:
    clear()


class Partial(functools.partial):
  """A `functools.partial` that equals one of equal function and arguments.

  Modules that hold it are equal if they were built alike, and share what was
  compiled for one of them. With an argument that has no hash it equals itself
  alone.
  """

  def __eq__(self, other):
    if not isinstance(other, Partial):
      return NotImplemented
    return hash(self) == hash(other) and self._parts() == other._parts()

  def __hash__(self):
    try:
      return hash(self._parts())
    except TypeError:
      return id(self)

  def _parts(self):
    return self.func, self.args, tuple(sorted(self.keywords.items()))
