"""Docstrings of Python files, read by parsing and never by importing.

Only the standard library is used: `python_docs` runs this file as a script in
several fresh interpreters, which neither fork a process that holds JAX threads
nor import the caller's `__main__` again.

    printf '%s\n' a.py b.py | python docstrings.py    # one JSON list a file
"""

import ast
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator

_DOCUMENTED = (
  ast.Module,
  ast.ClassDef,
  ast.FunctionDef,
  ast.AsyncFunctionDef,
)
_MIN_WORDS = 3
_WORD = re.compile(r"[^\W\d_]{2,}")


def clean(docstring: str) -> str:
  """The prose of a docstring: dedented, without doctests and rulers.

  Returns "" when fewer than three words remain.
  """
  lines, in_doctest = [], False
  for line in inspect.cleandoc(docstring).splitlines():
    line = line.rstrip()
    if not line:
      in_doctest = False
    elif line.lstrip().startswith(">>>"):
      in_doctest = True
    elif in_doctest or not any(c.isalnum() for c in line):
      continue  # a doctest's output, an underline, a table's border
    else:
      lines.append(line)
      continue
    if lines and lines[-1]:
      lines.append("")
  text = "\n".join(lines).strip()
  # Escapes in source code can spell lone surrogates, which no file can hold.
  text = text.encode("utf-8", "ignore").decode("utf-8").replace("\0", "")
  return text if len(_WORD.findall(text)) >= _MIN_WORDS else ""


def in_order(tree: ast.Module) -> Iterator[str]:
  """Raw docstrings of the module, its classes and functions, by line."""
  stack: list[ast.AST] = [tree]
  while stack:
    node = stack.pop()
    if isinstance(node, _DOCUMENTED):
      docstring = ast.get_docstring(node, clean=False)
      if docstring:
        yield docstring
    for field in ("finalbody", "orelse", "cases", "handlers", "body"):
      children = getattr(node, field, ())
      if isinstance(children, list):  # a lambda's body is one expression
        stack.extend(reversed(children))


def of_file(path: str) -> list[str]:
  """Cleaned docstrings of a file; none when it is gone or does not parse."""
  try:
    with open(path, "rb") as f:
      code = f.read()
  except OSError:
    return []
  if b'"""' not in code and b"'''" not in code:
    return []  # not worth parsing: one-line docstrings in single quotes
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in others' code
      tree = ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return []  # templates, other Pythons
  return [text for text in map(clean, in_order(tree)) if text]


if __name__ == "__main__":
  for name in sys.stdin.buffer.read().decode("utf-8").splitlines():
    print(json.dumps(of_file(name)))
