"""What every source takes besides its own options.

They act in this order: `preprocess` (text functions), `filters`, `select`,
`split`. So a selection sees clean texts, and splits divide what is left.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.data.sources.base import Source
from bertjax.data.sources.filters import Filtered
from bertjax.data.sources.preprocess import Preprocessed
from bertjax.data.sources.select import Selected
from bertjax.data.sources.splits import build_split

Builder = Callable[..., Source]
Change = Callable[[Source, Any, str], Source]


def _select(source: Source, spec: Mapping[str, Any], field: str) -> Source:
  return registry.call(Selected, spec, field, source=source)


# In the order in which they act.
CHANGES: dict[str, Change] = {
  "preprocess": Preprocessed,
  "filters": Filtered,
  "select": _select,
  "split": build_split,
}


def with_changes(builder: Builder, names: Sequence[str]) -> Builder:
  """The same builder with further options.

  Args:
    builder: of a source.
    names: keys of `CHANGES`; None or an empty value leaves one out.
  """

  @functools.wraps(builder)
  def build(*args, **options):
    wanted = {name: options.pop(name, None) for name in names}
    source = builder(*args, **options)
    for name, value in wanted.items():
      if value:
        source = CHANGES[name](source, value, name)
    return source

  signature = inspect.signature(builder)
  more = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    for name in names
  ]
  build.__signature__ = signature.replace(
    parameters=[*signature.parameters.values(), *more]
  )
  return build
