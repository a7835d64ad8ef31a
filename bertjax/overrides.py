"""Fields of a config set on a command line: `--config.FIELD=VALUE`.

A value is what its text says, not what the config has in its place: 2 of a
warm-up are steps and 0.1 is a part, whichever of them the config file chose.
Text that looks like something else stands in quotes of its own: '"2"'.
"""

import ast
import copy
import json
import re
from collections.abc import MutableMapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bertjax.config import plain

_FLAG = re.compile(
  r"--?config\.(?P<field>[^=.[][^=]*)(?:=(?P<value>.*))?", re.DOTALL
)


def separate(
  argv: Sequence[str],
) -> tuple[list[str], list[tuple[str, str]]]:
  """Other arguments, and (field, text) of every override, in their order.

  Args:
    argv: of a command; after "--" nothing is an override.

  Raises:
    ValueError: an override has no value.
  """
  end = argv.index("--") if "--" in argv else len(argv)
  rest, found = [], []
  arguments = iter(argv[:end])
  for argument in arguments:
    match = _FLAG.fullmatch(argument)
    if match is None:
      rest.append(argument)
      continue
    text = match["value"]
    if text is None:
      text = next(arguments, "--")
      if text.startswith("--"):
        raise ValueError(f"{argument} has no value; write {argument}=VALUE.")
    found.append((match["field"], text))
  return [*rest, *argv[end:]], found


def value(field: str, text: str) -> Any:
  """What a text says as JSON or as Python, else the text itself.

  Args:
    field: of errors.
    text: of a command line.

  Raises:
    ValueError: it begins as a group, a list or a quoted text and is none.
  """
  for parse in (json.loads, ast.literal_eval):
    try:
      return parse(text)
    except (ValueError, SyntaxError):
      pass
  if text.startswith(("{", "[", "(", '"', "'")):
    raise ValueError(
      f"{field}={text} is no JSON: a shell takes quotes away, so put others"
      """ around, as '{"name": "lamb"}'; text that begins so is '"[MASK]"'."""
    )
  return text


def assign(config: Any, field: str, text: str) -> None:
  """Sets a field in place; groups on the way that are not there are made.

  Args:
    config: a mapping or ConfigDict.
    field: names apart by dots; numbers in brackets count in lists.
    text: see `value`.

  Raises:
    ValueError: the way leads through what has no such fields, or see `value`.
  """
  names = re.findall(r"\[\d+\]|[^.\[\]]+", field)
  _assign(config, "", names, value(f"--config.{field}", text))


def _assign(group: Any, path: str, names: Sequence[str], new: Any) -> None:
  """Sets what `names` lead to from a group, to which `path` leads."""
  name, *rest = names
  key = _key(group, path, name)
  if not rest:
    group[key] = new
    return
  if not isinstance(group, list) and group.get(key) is None:
    group[key] = {}
  inner = group[key]
  if isinstance(inner, tuple):
    inner = list(inner)
  path += name if isinstance(key, int) or not path else f".{name}"
  _assign(inner, path, rest, new)
  if isinstance(group[key], tuple):
    group[key] = tuple(inner)


def _key(group: Any, path: str, name: str) -> str | int:
  """What a name is in a group; `path` leads to the group."""
  is_number = name.startswith("[")
  if isinstance(group, list):
    if not is_number:
      raise ValueError(
        f"--config.{path}={group!r} has no field {name!r}; write {path}[0]."
      )
    if int(name[1:-1]) >= len(group):
      raise ValueError(
        f"--config.{path}{name} is not there; there are {len(group)}."
      )
    return int(name[1:-1])
  if not isinstance(group, MutableMapping | ConfigDict):
    raise ValueError(f"--config.{path}={group!r} has no fields.")
  if is_number:
    raise ValueError(f"--config.{path}={plain(group)!r} is no list.")
  return name


def override(config: Any, given: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """Plain values of a config with its overrides, the last of a field counts.

  Args:
    config: a mapping, or a ConfigDict, of which other fields may refer to the
      one that is set.
    given: (field, text) as of `separate`.

  Raises:
    ValueError: see `assign`.
  """
  config = copy.deepcopy(config)
  if isinstance(config, ConfigDict):
    with config.unlocked(), config.ignore_type():
      for field, text in given:
        assign(config, field, text)
  values = plain(config)
  for field, text in given:  # once more: a ConfigDict makes floats of integers
    assign(values, field, text)
  return values
