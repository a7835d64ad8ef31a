"""What is asked of a model of texts on the command line."""

import json
import pathlib
import sys
from typing import Any

Request = dict[str, Any]


def _lines(path: pathlib.Path, first: str) -> list[Request]:
  try:
    lines = path.read_text("utf-8").splitlines()
  except UnicodeDecodeError as err:
    raise ValueError(f"{path} is not UTF-8 text: {err}.") from err
  if path.suffix != ".jsonl":
    return [{first: line} for line in lines if line.strip()]
  requests = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        requests.append(dict(json.loads(line)))
      except (TypeError, ValueError) as err:
        raise ValueError(
          f"{path}, line {number} is no JSON object: {err}."
        ) from err
  return requests


def requests_of(f: Any, fields: tuple[str, ...]) -> list[Request]:
  """What flags ask, by the names of its fields.

  Args:
    f: the flags text, pair and file; without any, lines of standard input.
    fields: of a request, the first of them required.

  Raises:
    ValueError: a file that is not there or not as it should be, or a request
      without its first field.
  """
  first, *rest = fields
  requests = [{first: text} for text in f.text if text.strip()]
  if f.pair:
    if not rest or len(f.pair) != len(requests):
      raise ValueError(
        f"--pair is given {len(f.pair)} times and --text {len(requests)} times;"
        + (" give both equally often." if rest else " this task has no pairs.")
      )
    for request, pair in zip(requests, f.pair):
      request[rest[0]] = pair
  if f.file is not None:
    path = pathlib.Path(f.file)
    if not path.is_file():
      raise ValueError(f"--file={f.file} is not a file.")
    requests += _lines(path, first)
  if not requests and not sys.stdin.isatty():
    lines = sys.stdin.read().splitlines()
    requests = [{first: line} for line in lines if line.strip()]
  for number, request in enumerate(requests):
    # A list of words may stand for the text.
    if first not in request and "words" in request:
      request[first] = request["words"]
    if first not in request:
      raise ValueError(
        f"Request {number} has no {first!r}; it has"
        f" {', '.join(map(repr, request)) or 'nothing'}."
      )
  return requests
