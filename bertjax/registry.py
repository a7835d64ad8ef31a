"""Names become objects here, once, at the edge of the library.

Every family of parts (optimizers, objectives, sources...) is a plain dict from
a name to a builder. A config's sub-dict is `name` plus that builder's keyword
arguments.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, field: str) -> T:
  """Returns `table[name]`.

  Args:
    table: what exists.
    name: what the user wrote.
    field: the config field or argument that holds `name`, for the message.

  Raises:
    ValueError: the name is not in the table.
  """
  if name in table:
    return table[name]
  close = difflib.get_close_matches(str(name), table, n=1)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  raise ValueError(
    f"{field}={name!r} is unknown; choose from {', '.join(sorted(table))}."
    + hint
  )


def build(
  table: Mapping[str, Callable[..., T]],
  spec: Mapping[str, Any],
  field: str,
  **context: Any,
) -> T:
  """Calls the builder that `spec["name"]` names with the rest of `spec`.

  Args:
    table: builders by name.
    spec: a config's sub-dict: `name` and the builder's keyword arguments.
    field: the config field that holds `spec`, for messages.
    **context: arguments that the caller supplies and a config may not.

  Raises:
    ValueError: unknown name, unknown argument, or missing argument.
  """
  spec = dict(spec)
  if "name" not in spec:
    raise ValueError(
      f"{field}.name is missing; choose from {', '.join(sorted(table))}."
    )
  builder = lookup(table, spec.pop("name"), f"{field}.name")
  signature = inspect.signature(builder)
  accepts = {
    p.name
    for p in signature.parameters.values()
    if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
  }
  open_ended = any(
    p.kind is p.VAR_KEYWORD for p in signature.parameters.values()
  )
  for key in spec:
    if key in context:
      raise ValueError(f"{field}.{key} is set by the library; remove it.")
    if key not in accepts and not open_ended:
      allowed = ", ".join(sorted(accepts - set(context)))
      close = difflib.get_close_matches(key, accepts - set(context), n=1)
      hint = f" Did you mean {close[0]!r}?" if close else ""
      raise ValueError(
        f"{field}.{key} is not an option of {field}.name; it takes"
        f" {allowed}.{hint}"
      )
  missing = [
    p.name
    for p in signature.parameters.values()
    if p.default is p.empty
    and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    and p.name not in spec
    and p.name not in context
  ]
  if missing:
    raise ValueError(f"{field}.{missing[0]} is required.")
  return builder(**spec, **context)
