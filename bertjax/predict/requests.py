"""What is asked of a model of texts on the command line."""

import dataclasses
import enum
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Request = dict[str, Any]


class Form(enum.Enum):
  """What a field holds."""

  TEXT = "a text"
  WORDS = "a text or a list of words"
  TEXTS = "a list of texts"

  def takes(self, value: Any) -> bool:
    if isinstance(value, str):
      return self is not Form.TEXTS
    many = self is not Form.TEXT and isinstance(value, list)
    return many and all(isinstance(text, str) for text in value)


@dataclasses.dataclass(frozen=True)
class Field:
  """Of a request.

  Attributes:
    name: in a .jsonl file.
    form: what it holds.
    required: else all requests have it, or none.
  """

  name: str
  form: Form = Form.TEXT
  required: bool = True


def _lines(data: bytes, source: str) -> Iterator[tuple[str, str]]:
  """(where it stands, line); a text may hold U+2028 and form feeds."""
  try:
    lines = data.decode("utf-8-sig").split("\n")
  except UnicodeDecodeError as err:
    raise ValueError(f"{source} is not UTF-8 text: {err}.") from err
  if not lines[-1]:
    del lines[-1]
  for number, line in enumerate(lines, 1):
    yield f"{source}, line {number}", line.removesuffix("\r")


def _object(where: str, line: str) -> Request:
  try:
    return dict(json.loads(line))
  except (TypeError, ValueError) as err:
    raise ValueError(f"{where} is no JSON object: {err}.") from err


def requests_of(f: Any, fields: Sequence[Field]) -> list[Request]:
  """What flags ask, at least one request, by the names of its fields.

  Args:
    f: the flags text, pair and file; without texts and a file, lines of
      standard input.
    fields: of a request, first what --text gives, then what --pair gives.

  Raises:
    ValueError: a file that is not there or not as it should be, no request, or
      one with a field that is missing, no text or, being the first, empty.
  """
  first, *rest = (field.name for field in fields)
  requests = {
    f"--text number {number}": {first: text}
    for number, text in enumerate(f.text, 1)
  }
  if f.pair:
    if not rest or len(f.pair) != len(requests):
      raise ValueError(
        f"--pair is given {len(f.pair)} times and --text {len(requests)} times;"
        + (" give both equally often." if rest else " this task has no pairs.")
      )
    for request, pair in zip(requests.values(), f.pair):
      request[rest[0]] = pair
  if f.file is not None:
    path = pathlib.Path(f.file)
    if not path.is_file():
      raise ValueError(f"--file={f.file} is not a file.")
    for where, line in _lines(path.read_bytes(), str(path)):
      is_object = path.suffix == ".jsonl" and line.strip()
      requests[where] = _object(where, line) if is_object else {first: line}
  elif not requests and not sys.stdin.isatty():
    lines = _lines(sys.stdin.buffer.read(), "standard input")
    requests = {where: {first: line} for where, line in lines}
  if not requests:
    raise ValueError(
      "Nothing is asked; give --text, or lines in --file or standard input."
    )
  for request in requests.values():
    if fields[0].form is Form.WORDS and "words" in request:
      request.setdefault(first, request["words"])
  _check(requests, fields)
  return [*requests.values()]


def _check(requests: Mapping[str, Request], fields: Sequence[Field]) -> None:
  """Refuses requests, named by where they stand, that lack what is needed."""
  for field in fields:
    used = any(field.name in request for request in requests.values())
    if not used and not field.required:
      continue
    for where, request in requests.items():
      if field.name not in request:
        by_flag = field is not fields[0] and field.form is Form.TEXT
        raise ValueError(
          f"{where} has no {field.name!r} ({field.form.value}"
          + (", as of --pair" if by_flag else "")
          + f"); it has {', '.join(map(repr, request)) or 'nothing'}."
        )
      value = request[field.name]
      if not field.form.takes(value):
        raise ValueError(
          f"{where}: {field.name}={json.dumps(value)[:60]} must be"
          f" {field.form.value}."
        )
      if field is fields[0] and not "".join(value).strip():
        raise ValueError(
          f"{where}: the {field.name} is empty; leave it out, as every one"
          " asked gives one answer."
        )
