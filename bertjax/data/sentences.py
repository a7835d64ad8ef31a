"""How a document's text becomes sentences: rules, by name."""

import re
from collections.abc import Callable

# A full stop after one of these ends no sentence.
_ABBREVIATIONS = frozenset(
  "mr mrs ms dr prof sr jr st vs etc e.g i.e cf al fig figs eq eqs ref refs"
  " sec no vol pp ed eds approx dept est inc ltd co corp u.s u.k a.m p.m jan"
  " feb mar apr jun jul aug sep sept oct nov dec".split()
)
# Terminators of Western, CJK, Devanagari, Arabic and Ethiopic scripts.
_END = re.compile(
  r"""[.!?\u2026]+["'\u2019\u201d)\]]*(?=\s)|[\u3002\uff01\uff1f\u0964\u061f\u06d4\u1362]+["\u300d\u300f\u201d)]*"""
)
_LAST_WORD = re.compile(r"([^\s(\[\"']+)\.$")


def _ends_here(head: str, tail: str) -> bool:
  """Whether `head`, which ends with a terminator, is a whole sentence."""
  following = tail.lstrip()
  if following[:1].islower():
    return False
  word = _LAST_WORD.search(head)
  if word is None:
    return True
  word = word.group(1)
  initial = len(word) == 1 and word.isalpha() and word.isupper()
  number = word.isdecimal() and following[:1].isdecimal()
  return not (initial or number or word.lower() in _ABBREVIATIONS)


def split_sentences(text: str) -> list[str]:
  """Sentences of running text; a blank line ends one as well.

  Abbreviations, initials and decimals do not; nor does a stop before a
  lower-case letter.
  """
  sentences = []
  for paragraph in split_paragraphs(text):
    flat = " ".join(paragraph.split())
    start = 0
    for end in _END.finditer(flat):
      if end.end() < len(flat) and not _ends_here(
        flat[start : end.end()], flat[end.end() :]
      ):
        continue
      sentences.append(flat[start : end.end()].strip())
      start = end.end()
    sentences.append(flat[start:].strip())
  return [s for s in sentences if s]


def split_lines(text: str) -> list[str]:
  """One sentence per line, as BERT's input files have it."""
  return [line.strip() for line in text.splitlines() if line.strip()]


def split_paragraphs(text: str) -> list[str]:
  """Parts between blank lines."""
  return [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]


def keep_whole(text: str) -> list[str]:
  """The document as one sentence."""
  return [text] if text.strip() else []


SPLITTERS: dict[str, Callable[[str], list[str]]] = {
  "sentences": split_sentences,
  "lines": split_lines,
  "paragraphs": split_paragraphs,
  "none": keep_whole,
}
