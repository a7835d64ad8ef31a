# ruff: noqa: RUF001 - the terminators of many scripts stand here on purpose
"""How a document becomes sentences: named, deterministic, without models.

Every splitter keeps the characters of its text in order and drops nothing but
white space, so tokens never depend on which splitter was chosen except at
boundaries.
"""

import re
from collections.abc import Callable

# Part of a cache's name: raise it when a splitter's result changes.
VERSION = 1

_BLANK_LINE = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
# A line that opens an item of a list, a field or a section of its own.
_ITEM = re.compile(
  r"\n(?=[^\S\n]*(?:[-*+•‣·][^\S\n]+|\(?\d{1,3}[.)][^\S\n]+|:[^:\n]+:|\.\.[^\S\n]"
  r"|(?:Args|Returns|Raises|Yields|Example|Examples|Note|Notes|Attributes"
  r"|References):[^\S\n]*\n))"
)
# Where a sentence may end: a Latin terminator that closes a word and is
# followed by space, or a terminator of scripts that write no space after it.
_CLOSERS = "\"'”’»›)\\]}」』）】〉》"
_CANDIDATE = re.compile(
  rf"[.!?…؟۔]+[{_CLOSERS}`*]*(?=\s)|[。！？｡．]+[{_CLOSERS}]*|[।॥։።]+[{_CLOSERS}]*"
)
_LAST_WORD = re.compile(r"[^\s(\[{\"'“‘«`*]+$")
_OPENERS = "\"'“‘«‹([{`*¿¡<"

# Never the end of a sentence, or only before a plain new sentence.
_ALWAYS_GO_ON = frozenset(
  """e.g i.e cf vs viz al ca approx resp incl excl mr mrs ms dr prof st sr jr
  rev hon gen col lt sgt capt fig figs eq eqs ref refs sec secs ch chs no nos
  vol vols pp ed eds dept univ assn bros w.r.t a.k.a messrs z.b d.h bzw usw
  p.ej""".split()
)
_MAY_END = frozenset(
  """etc inc ltd corp co u.s u.k u.n e.u a.m p.m ph.d m.d b.c a.d jan feb mar
  apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun""".split()
)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]$")
_NUMBERING = re.compile(r"(?:\d{1,3}|[ivxIVX]{1,4}|[a-zA-Z])$")


def _opens_sentence(rest: str) -> bool:
  """Whether the text after a boundary can begin a sentence."""
  head = rest.lstrip(_OPENERS + " \t\n")[:1]
  return not head.islower()


def _ends_here(paragraph: str, start: int, end: int) -> bool:
  """Whether the terminator at [start, end) ends a sentence."""
  mark = paragraph[start]
  if mark not in ".…!?؟۔":
    return True  # full-width and Indic terminators have one meaning
  rest = paragraph[end : end + 40].lstrip()
  if not rest:
    return True
  if not _opens_sentence(rest):
    return False  # a lower-case letter goes on, also after "?" in a title
  if mark != "." or paragraph[start : start + 2] == "..":
    return True
  found = _LAST_WORD.search(paragraph, max(0, start - 40), start)
  word = found.group() if found else ""
  lower = word.lower()
  if lower in _ALWAYS_GO_ON:
    return False
  if lower in _MAY_END:
    # "p.m. We left" ends, "Acme Inc. (1990)" and "Jan. 5" do not.
    return rest[:1].isupper()
  if found and found.start() == 0 and _NUMBERING.fullmatch(word):
    return False  # "1. First item"
  # "J. R. Tolkien", "U.S.A." within a name; "vitamin C. Then" is given up.
  return not (_INITIALS.fullmatch(word) and word[0].isupper())


def _sentences_of(paragraph: str) -> list[str]:
  parts, begin = [], 0
  for found in _CANDIDATE.finditer(paragraph):
    if _ends_here(paragraph, found.start(), found.end()):
      parts.append(paragraph[begin : found.end()])
      begin = found.end()
  parts.append(paragraph[begin:])
  return parts


def _tidy(parts: list[str]) -> list[str]:
  """One space between words, nothing empty."""
  return [tidied for part in parts if (tidied := " ".join(part.split()))]


def lines(text: str) -> list[str]:
  """One sentence a line, as in BERT's input files."""
  return _tidy(text.splitlines())


def paragraphs(text: str) -> list[str]:
  """What blank lines separate."""
  return _tidy(_BLANK_LINE.split(_unix(text)))


def sentences(text: str) -> list[str]:
  """Sentences by rule.

  Ends at a terminator (Latin, CJK, Devanagari, Arabic, Armenian, Ethiopic)
  unless what stands before it is an abbreviation, an initial or a list number,
  or what follows begins in lower case. A blank line and the next item of a
  list end a sentence too; other line breaks do not.
  """
  parts = []
  for paragraph in _BLANK_LINE.split(_unix(text)):
    for block in _ITEM.split(paragraph):
      parts.extend(_sentences_of(block.strip()))
  return _tidy(parts)


def whole(text: str) -> list[str]:
  """The document as one sentence."""
  return _tidy([text])


def _unix(text: str) -> str:
  return text.replace("\r\n", "\n").replace("\r", "\n")


SPLITTERS: dict[str, Callable[[str], list[str]]] = {
  "lines": lines,
  "none": whole,
  "paragraphs": paragraphs,
  "sentences": sentences,
}
