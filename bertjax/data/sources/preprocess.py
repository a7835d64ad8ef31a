"""Named functions on texts, and a source that applies them.

A source's `preprocess` cleans what this source holds. `data.preprocess` takes
the same functions and belongs to the model: whatever text it reads later, in
`bertjax.predict` or from another source, goes through them first.
"""

import functools
import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.data.sources import base
from bertjax.data.sources.filters import named
from bertjax.expressions import regex

_MARKUP = re.compile(
  r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-zA-Z][^<>]*>",
  re.DOTALL | re.IGNORECASE,
)
# What browsers show as a block or a row of its own; <br> and <title> as well.
_BLOCK = re.compile(
  r"</?(?:address|article|aside|blockquote|body|br|caption|center|dd|details"
  r"|dialog|dir|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|head"
  r"|header|hgroup|hr|html|legend|li|main|menu|nav|ol|optgroup|option|p|pre"
  r"|search|section|summary|table|tbody|tfoot|thead|title|tr|ul)\b[^<>]*>",
  re.IGNORECASE,
)
_CELL = re.compile(r"<t[dh]\b[^<>]*>", re.IGNORECASE)  # may have no end tag
_NEWLINES = re.compile(r"\n{3,}")


def strip_html(text: str) -> str:
  """Text without tags, scripts and comments; entities become characters.

  Block elements leave a line break, cells of a table a tab before them. A "<"
  that opens no tag stays.
  """
  text = _CELL.sub("\t", _BLOCK.sub("\n", text))
  return html.unescape(_MARKUP.sub("", text))


def collapse_whitespace(text: str) -> str:
  """One space between words, line breaks kept, at most one blank line."""
  lines = [" ".join(line.split()) for line in text.splitlines()]
  return _NEWLINES.sub("\n\n", "\n".join(lines)).strip()


def unicode_nfc(text: str) -> str:
  """Canonical composition: e + combining acute becomes é."""
  return unicodedata.normalize("NFC", text)


def unicode_nfkc(text: str) -> str:
  """Compatibility composition: ligatures, wide forms and the like go plain."""
  return unicodedata.normalize("NFKC", text)


def lowercase(text: str) -> str:
  """Lower case, by Unicode's rules of no particular language."""
  return text.lower()


def replace(text: str, pattern: str, by: str = "") -> str:
  """Text with every match of a regular expression replaced.

  Without `by` it strips: a label that the text gives away (Davidson et al.'s
  "#sarcasm"), boilerplate, signatures.

  Raises:
    ValueError: `pattern` is no regular expression, or `by` refers to a group
      that it has not.
  """
  compiled = regex(pattern, "preprocess 'replace'")
  try:
    return compiled.sub(by, text)
  except (re.error, IndexError) as err:
    raise ValueError(
      f"preprocess 'replace': by={by!r} does not fit {pattern!r}: {err}."
    ) from err


def drop_lines(text: str, pattern: str) -> str:
  """Text without the lines in which a regular expression is found.

  Raises:
    ValueError: `pattern` is no regular expression.
  """
  compiled = regex(pattern, "preprocess 'drop_lines'")
  lines = text.splitlines()
  return "\n".join(line for line in lines if not compiled.search(line))


# Each takes the text first; what else it takes are its options.
PREPROCESSORS: dict[str, Callable[..., str]] = {
  "collapse_whitespace": collapse_whitespace,
  "drop_lines": drop_lines,
  "lowercase": lowercase,
  "replace": replace,
  "strip_html": strip_html,
  "unicode_nfc": unicode_nfc,
  "unicode_nfkc": unicode_nfkc,
}
VERSION = 2  # of the functions above; part of the fingerprint

Names = Sequence[str | Mapping[str, Any]]


def text_function(
  names: Names, field: str = "preprocess"
) -> Callable[[str], str]:
  """Several named functions as one, the first applied first.

  Args:
    names: keys of `PREPROCESSORS`, or `name` and options.
    field: the config field that holds them, for messages.

  Raises:
    ValueError: an unknown name or option, or one out of range.
  """
  functions = []
  for spec in named(names):
    function = registry.lookup(PREPROCESSORS, spec.pop("name", None), field)
    registry.call(function, spec, field, text="")  # refuses wrong options
    functions.append(functools.partial(function, **spec))
  return functools.partial(_apply, functions)


def _apply(functions: Sequence[Callable[[str], str]], text: str) -> str:
  for function in functions:
    text = function(text)
  return text


class Preprocessed(base.Derived):
  """A source whose texts go through named functions, first to last."""

  def __init__(
    self, source: base.Source, names: Names, field: str = "preprocess"
  ):
    """Args:
    source: what to read.
    names: keys of `PREPROCESSORS`, or `name` and options.
    field: the config field that holds them, for messages.
    """
    super().__init__(source)
    self._function = text_function(names, field)
    # A bare name, as every function had none but it, keeps its fingerprint.
    self._names = [
      spec["name"] if len(spec) == 1 else spec for spec in named(names)
    ]

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      "preprocess", VERSION, self._names, self._source.fingerprint()
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    return self._applied(self._source.examples(split))

  def parts(self, split: str) -> Sequence[base.Part]:
    return self._changed(self._applied, split)

  def _applied(
    self, examples: Iterable[base.Example]
  ) -> Iterator[base.Example]:
    for example in examples:
      yield {**example, "text": self._function(example["text"])}
