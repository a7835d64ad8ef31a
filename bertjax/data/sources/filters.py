"""Named rules about which examples a source keeps.

A row of `FILTERS` makes a rule from its options. A rule is made anew for every
pass over a split, so that one may remember what it has seen.
"""

import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.data.sources import base
from bertjax.data.sources.base import Example
from bertjax.expressions import regex

Rule = Callable[[Example], bool]


@functools.lru_cache(maxsize=65_536)
def _script(char: str) -> str:
  """First word of a letter's Unicode name, such as LATIN; else ""."""
  if not char.isalpha():
    return ""
  return unicodedata.name(char, "").partition(" ")[0]


# Rows of `FILTERS`.


def length(
  min_chars: int = 0,
  max_chars: int | None = None,
  min_words: int = 0,
  max_words: int | None = None,
) -> Rule:
  """Texts whose characters, and words between spaces, are so many."""
  bounds = ("chars", min_chars, max_chars), ("words", min_words, max_words)
  for unit, low, high in bounds:
    if low < 0 or (high is not None and high < max(low, 1)):
      raise ValueError(
        f"filter 'length': min_{unit}={low} and max_{unit}={high} leave"
        " nothing."
      )

  def keep(example: Example) -> bool:
    text = example["text"]
    sizes = len(text), len(text.split())
    return all(
      low <= size and (high is None or size <= high)
      for size, (_, low, high) in zip(sizes, bounds)
    )

  return keep


def letters(min_count: int = 1, min_share: float = 0.0) -> Rule:
  """Texts with so many letters, and such a share of them: no empty shells.

  Args:
    min_count: letters of any script.
    min_share: of the characters that are no white space.
  """
  _check_share(min_share, "letters", "min_share")

  def keep(example: Example) -> bool:
    solid = "".join(example["text"].split())
    count = sum(map(str.isalpha, solid))
    return count >= min_count and count >= min_share * len(solid)

  return keep


def script(scripts: str | Sequence[str], min_share: float = 0.5) -> Rule:
  """Texts that are written in some scripts.

  Args:
    scripts: as Unicode's names of letters begin: LATIN, GREEK, CYRILLIC,
      ARABIC, DEVANAGARI, CJK, HIRAGANA...
    min_share: of the letters, those of these scripts.
  """
  names = {name.upper() for name in base.strings(scripts)}
  _check_share(min_share, "script", "min_share")

  def keep(example: Example) -> bool:
    found = [s for s in map(_script, example["text"]) if s]
    return sum(s in names for s in found) >= min_share * max(len(found), 1)

  return keep


def matches(pattern: str, keep: bool = True) -> Rule:
  """Texts in which a regular expression is found; or, `keep=False`, is not."""
  compiled = regex(pattern, "filter 'matches'")
  return lambda example: bool(compiled.search(example["text"])) == keep


def field(field: str, values: Any, keep: bool = True) -> Rule:
  """Examples whose field has one of some values; or, `keep=False`, has not."""
  wanted = set(map(str, base.values(values)))

  def rule(example: Example) -> bool:
    if field not in example:
      raise ValueError(
        f"filter 'field': example {example['id']!r} has no field {field!r}; it"
        f" has {', '.join(sorted(example))}."
      )
    return (str(example[field]) in wanted) == keep

  return rule


def dedupe() -> Rule:
  """Each text once per split, however its case and spaces differ.

  Token caches leave out exact copies anyway; this one acts before a selection
  or the training of a vocabulary. Memory: about 100 bytes a text.
  """
  seen: set[int] = set()

  def keep(example: Example) -> bool:
    digest = base.text_hash(example["text"], "dedupe")
    fresh = digest not in seen
    seen.add(digest)
    return fresh

  return keep


FILTERS: dict[str, Callable[..., Rule]] = {
  "dedupe": dedupe,
  "field": field,
  "length": length,
  "letters": letters,
  "matches": matches,
  "script": script,
}
# What they say of an example depends on earlier ones.
_REMEMBERING = ("dedupe",)
_VERSION = 1  # of the rules above; part of the fingerprint


class Filtered(base.Derived):
  """A source without what one of several rules refuses."""

  def __init__(
    self,
    source: base.Source,
    filters: Sequence[str | Mapping[str, Any]],
    field: str = "filters",
  ):
    """Args:
    source: what to read.
    filters: names of `FILTERS`, or `name` and options, asked in order.
    field: the config field that holds them, for messages.
    """
    specs = named(filters)
    self._make = [
      functools.partial(registry.build, FILTERS, spec, f"{field}[{i}]")
      for i, spec in enumerate(specs)
    ]
    for make in self._make:
      make()  # refuses what is wrong before anything is read
    super().__init__(source)
    self._specs = specs

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      "filters", _VERSION, self._specs, self._source.fingerprint()
    )

  def examples(self, split: str) -> Iterator[Example]:
    kept = self._kept(self._source.examples(split))
    return base.nonempty(kept, self.name, split)

  def parts(self, split: str) -> Sequence[base.Part]:
    """Those of the source; a rule that remembers must see all of them."""
    if any(spec["name"] in _REMEMBERING for spec in self._specs):
      return [functools.partial(self.examples, split)]
    return self._changed(self._kept, split)

  def _kept(self, examples: Iterable[Example]) -> Iterator[Example]:
    asked = [make() for make in self._make]
    return (e for e in examples if all(rule(e) for rule in asked))


def named(items: Any) -> list[dict[str, Any]]:
  """Names, or dicts of `name` and options, or one of them, as a list of dicts.

  ConfigDicts and tuples become plain, so that JSON gives the same back.
  """
  if isinstance(items, str) or hasattr(items, "items"):
    items = [items]
  specs = [
    {"name": item} if isinstance(item, str) else base.as_dict(item)
    for item in items
  ]
  return [
    {k: list(v) if isinstance(v, tuple) else v for k, v in spec.items()}
    for spec in specs
  ]


def _check_share(value: float, name: str, option: str) -> None:
  if not 0 <= value <= 1:
    raise ValueError(f"filter {name!r}: {option}={value} must lie in 0..1.")
