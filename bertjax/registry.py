"""Names become objects here, once, at the edge of the library.

Every family of parts (optimizers, objectives, sources...) is a plain dict from
a name to a builder. A config's sub-dict is `name` plus that builder's keyword
arguments.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
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


def call(
  builder: Callable[..., T],
  options: Mapping[str, Any],
  field: str,
  **context: Any,
) -> T:
  """Calls `builder` with a config's options, refusing what it does not take.

  Args:
    builder: any callable with named arguments.
    options: the config's sub-dict.
    field: the config field that holds `options`, for messages; "" at the top.
    **context: arguments that the caller supplies and a config may not.

  Raises:
    ValueError: unknown, reserved or missing option.
  """
  check(builder, options, field, context)
  return builder(**options, **context)


def check(
  builder: Callable[..., Any],
  options: Mapping[str, Any],
  field: str,
  context: Collection[str] = (),
) -> None:
  """Refuses options that `call` would refuse; `context` holds their names."""
  prefix = f"{field}." if field else ""
  parameters = [
    p
    for p in inspect.signature(builder).parameters.values()
    if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]
  open_ended = any(
    p.kind is p.VAR_KEYWORD
    for p in inspect.signature(builder).parameters.values()
  )
  allowed = sorted({p.name for p in parameters} - set(context))
  for key in options:
    if key in context:
      raise ValueError(f"{prefix}{key} is set by the library; remove it.")
    if key not in allowed and not open_ended:
      close = difflib.get_close_matches(key, allowed, n=1)
      hint = f" Did you mean {close[0]!r}?" if close else ""
      raise ValueError(
        f"{prefix}{key} is not an option; {field or 'the config'} takes"
        f" {', '.join(allowed)}.{hint}"
      )
  for p in parameters:
    if p.default is p.empty and p.name not in {*options, *context}:
      raise ValueError(f"{prefix}{p.name} is required.")


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
    ValueError: no such dict, unknown name, or see `call`.
  """
  try:
    options = dict(spec)
  except (TypeError, ValueError) as err:  # a bare name, a list
    raise ValueError(
      f"{field}={spec!r} must be a dict: dict(name=...) and its options."
    ) from err
  if "name" not in options:
    raise ValueError(
      f"{field}.name is missing; choose from {', '.join(sorted(table))}."
    )
  builder = lookup(table, options.pop("name"), f"{field}.name")
  return call(builder, options, field, **context)
