"""What is asked of a model of texts on the command line."""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

Request = dict[str, Any]


def _lines(data: bytes, source: str) -> Iterator[tuple[str, str]]:
  """(where it stands, line); a text may hold U+2028 and form feeds."""
  try:
    lines = data.decode("utf-8").split("\n")
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


def requests_of(f: Any, fields: tuple[str, ...]) -> list[Request]:
  """What flags ask, by the names of its fields.

  Args:
    f: the flags text, pair and file; without texts and a file, lines of
      standard input.
    fields: of a request, the first of them required.

  Raises:
    ValueError: a file that is not there or not as it should be, or a request
      whose first field is missing or empty.
  """
  first, *rest = fields
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
  for where, request in requests.items():
    # A list of words may stand for the text.
    if first not in request and "words" in request:
      request[first] = request["words"]
    if first not in request:
      raise ValueError(
        f"{where} has no {first!r}; it has"
        f" {', '.join(map(repr, request)) or 'nothing'}."
      )
    if isinstance(text := request[first], str) and not text.strip():
      raise ValueError(
        f"{where}: the {first} is empty; leave it out, as every one asked gives"
        " one answer."
      )
  return [*requests.values()]
