"""Named functions on texts, and a source that applies them."""

import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from bertjax import registry
from bertjax.data.sources import base

_MARKUP = re.compile(
  r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-zA-Z][^<>]*>",
  re.DOTALL | re.IGNORECASE,
)
_BLOCK = re.compile(
  r"</?(?:p|div|br|li|ul|ol|tr|table|h[1-6]|blockquote|pre|section|article)"
  r"\b[^<>]*>",
  re.IGNORECASE,
)
_NEWLINES = re.compile(r"\n{3,}")


def strip_html(text: str) -> str:
  """Text without tags, scripts and comments; entities become characters.

  Block elements leave a line break. A "<" that opens no tag stays.
  """
  return html.unescape(_MARKUP.sub("", _BLOCK.sub("\n", text)))


def collapse_whitespace(text: str) -> str:
  """One space between words, line breaks kept, at most one blank line."""
  lines = [" ".join(line.split()) for line in text.splitlines()]
  return _NEWLINES.sub("\n\n", "\n".join(lines)).strip()


def unicode_nfc(text: str) -> str:
  """Canonical composition: e + combining acute becomes é."""
  return unicodedata.normalize("NFC", text)


PREPROCESSORS: dict[str, Callable[[str], str]] = {
  "collapse_whitespace": collapse_whitespace,
  "strip_html": strip_html,
  "unicode_nfc": unicode_nfc,
}
_VERSION = 1  # of the functions above; part of the fingerprint


class Preprocessed:
  """A source whose texts go through named functions, first to last."""

  def __init__(self, source: base.Source, names: Sequence[str]):
    """Args:
    source: what to read.
    names: keys of `PREPROCESSORS`.
    """
    self._source, self._names = source, base.strings(names)
    self._functions = [
      registry.lookup(PREPROCESSORS, name, "preprocess") for name in self._names
    ]
    self.name, self.licence = source.name, source.licence
    self.splits = source.splits

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      "preprocess", _VERSION, self._names, self._source.fingerprint()
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    for example in self._source.examples(split):
      text = example["text"]
      for function in self._functions:
        text = function(text)
      yield {**example, "text": text}
