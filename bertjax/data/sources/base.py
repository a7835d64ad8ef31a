"""What every source of examples promises, and splits made by hash."""

import copy
import dataclasses
import functools
import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

Example = dict[str, Any]
Part = Callable[[], Iterator[Example]]  # reads it from its beginning


@runtime_checkable
class Source(Protocol):
  """A corpus: named splits of examples in an order that never changes.

  A text example is `{"id": str, "text": str}`, one document; a source may add
  features. An optional `copy` counts deliberate repetitions of one document; an
  optional `component`, below 65536, numbers the part of a mixture it is of.

  A source may have a method `parts(split)`, see the function of that name, and
  `hints`: what to do about an unknown split ("splits") or about too few
  examples ("examples"), sentences for messages. One that was divided by a hash
  has `salts`, see the function of that name.
  """

  name: str
  licence: str
  splits: tuple[str, ...]

  def fingerprint(self) -> str:
    """Changes whenever the data or the reading options change."""

  def examples(self, split: str) -> Iterator[Example]:
    """Streams a split. Raises ValueError on an unknown split."""


def check_split(source: Source, split: str) -> None:
  """Raises ValueError unless `source` has `split`."""
  if split not in source.splits:
    raise ValueError(
      f"split={split!r} is unknown to source {source.name!r}; choose from"
      f" {', '.join(source.splits)}.{_hint(source, 'splits')}"
    )


def _hint(source: Source, about: str) -> str:
  hint = getattr(source, "hints", {}).get(about)
  return f" {hint}" if hint else ""


def parts(source: Source, split: str) -> Sequence[Part]:
  """Parts of a split that can be read one without the others.

  In their order they hold what `source.examples(split)` does, so that several
  workers may read one corpus. A source tells its parts by a method
  `parts(split)`; without one it is a single part.
  """
  if hasattr(source, "parts"):
    return source.parts(split)
  return [functools.partial(source.examples, split)]


def salts(source: Source) -> frozenset[str]:
  """Salts of the hashes that chose what the source holds, or a part of it.

  What the same hash divides once more falls to one side.
  """
  return getattr(source, "salts", frozenset())


def fingerprint_of(*parts: Any) -> str:
  """A 128-bit hex digest of JSON-like values (mappings in any order)."""
  plain = json.dumps(parts, sort_keys=True, ensure_ascii=True)
  return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def normalise(text: str) -> str:
  """The form in which two texts count as equal: NFC, caseless, one space."""
  return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def text_hash(text: str, salt: str = "") -> int:
  """A 64-bit hash of the normalised text; the same on every machine."""
  data = (salt + "\0" + normalise(text)).encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def as_dict(value: Any) -> dict:
  """A plain dict from a dict or an `ml_collections.ConfigDict`."""
  return {
    key: as_dict(item) if hasattr(item, "items") else item
    for key, item in value.items()
  }


def strings(value: str | Sequence[str]) -> tuple[str, ...]:
  """One string or several, as a tuple."""
  return (value,) if isinstance(value, str) else tuple(value)


def values(value: Any) -> tuple[Any, ...]:
  """One value or several, as a tuple; a string is one."""
  several = isinstance(value, Iterable) and not isinstance(value, str)
  return tuple(value) if several else (value,)


def nonempty(
  examples: Iterable[Example], name: str, split: str
) -> Iterator[Example]:
  """Passes examples on; raises ValueError when there were none."""
  count = 0
  for count, example in enumerate(examples, 1):  # noqa: B007
    yield example
  if not count:
    raise ValueError(
      f"source {name!r} has no example in split {split!r}: the corpus is"
      " empty. Check its paths, filters and fractions."
    )


@dataclasses.dataclass(frozen=True)
class Measure:
  """How much of something a source's training split gives.

  Attributes:
    size: `(source, unit)` -> number of "tokens" or "instances".
    identity: changes when the numbers could; JSON values.
  """

  size: Callable[[Source, str], int]
  identity: Any


def measured(source: Source, measure: Measure) -> Source:
  """The source, told how to measure its parts if it mixes some."""
  return source.measured(measure) if hasattr(source, "measured") else source


# What it makes of an example depends on no other one.
Change = Callable[[Iterable[Example]], Iterator[Example]]


class Derived:
  """A source made from another one; `_source` is what it reads."""

  def __init__(self, source: Source, splits: Iterable[str] | None = None):
    """Args:
    source: what is read.
    splits: its splits by default.
    """
    self._source = source
    self.name, self.licence = source.name, source.licence
    self.splits = source.splits if splits is None else tuple(splits)
    self.salts = salts(source)
    self.hints = dict(getattr(source, "hints", {}))
    if splits is not None:
      self.hints.pop("splits", None)

  def measured(self, measure: Measure) -> "Derived":
    twin = copy.copy(self)
    twin._source = measured(self._source, measure)
    return twin

  def _changed(self, change: Change, split: str) -> Sequence[Part]:
    """The parts of a split of what is read, each changed by itself."""
    return [
      functools.partial(_changed, change, part)
      for part in parts(self._source, split)
    ]


def _changed(change: Change, part: Part) -> Iterator[Example]:
  return change(part())


Assign = Callable[[Example], str | None]


class AssignedSplit(Derived):
  """One split of a source dealt out by a rule; it drops what gets no split."""

  def __init__(
    self,
    source: Source,
    splits: Iterable[str],
    assign: Assign,
    identity: Sequence[Any],
    of: str = "train",
  ):
    """Args:
    source: what to divide.
    splits: names of the new splits.
    assign: the split of an example; None leaves it out.
    identity: name and options of the rule, for the fingerprint.
    of: the split of `source` that is divided.

    Raises:
      ValueError: no split `of`.
    """
    check_split(source, of)
    super().__init__(source, splits)
    self._assign, self._of = assign, of
    self._identity = list(identity)

  def fingerprint(self) -> str:
    rule, *options = self._identity
    return fingerprint_of(rule, self._source.fingerprint(), *options, self._of)

  def examples(self, split: str) -> Iterator[Example]:
    check_split(self, split)
    return self._dealt(split)

  def _dealt(self, split: str) -> Iterator[Example]:
    count, mine = 0, 0
    for count, example in enumerate(self._source.examples(self._of), 1):  # noqa: B007
      if self._assign(example) == split:
        mine += 1
        yield example
    if not mine:
      raise ValueError(
        f"source {self.name!r} has no example in split {split!r}: of the"
        f" {count} in {self._of!r}, which is divided, none falls there. Take"
        f" more documents or other shares.{_hint(self, 'examples')}"
      )

  def parts(self, split: str) -> Sequence[Part]:
    check_split(self, split)
    return self._changed(functools.partial(self._mine, split), self._of)

  def _mine(self, split: str, examples: Iterable[Example]) -> Iterator[Example]:
    return (example for example in examples if self._assign(example) == split)


def content(example: Example) -> str:
  """The text; of a labelled example without one, all of its fields."""
  if isinstance(example.get("text"), str):
    return example["text"]
  rest = {k: v for k, v in example.items() if k != "id"}
  return json.dumps(rest, sort_keys=True, default=str)


class HashSplit(AssignedSplit):
  """One split of a source dealt out by the hash of the normalised text.

  Equal texts always fall into the same split, wherever they stand, and a
  text keeps its split when the corpus grows. What is divided already is divided
  independently of that.
  """

  def __init__(
    self,
    source: Source,
    fractions: Mapping[str, float],
    of: str = "train",
    *,
    key: Callable[[Example], str] = content,
    identity: Sequence[Any] = ("hash_split",),
    seed: int = 0,
  ):
    """Args:
    source: what to divide.
    fractions: share of each new split; they sum to 1 at most, and what is
      left over is dropped.
    of: the split of `source` that is divided.
    key: what is hashed; examples with equal keys stay together.
    identity: name and options of the key, for the fingerprint.
    seed: another one deals out otherwise.

    Raises:
      ValueError: a share outside (0, 1], a sum above 1, no split `of`.
    """
    fractions = as_dict(fractions)
    check_fractions(fractions, source.name)
    options = [] if seed == 0 else [seed]
    salt = "split" if seed == 0 else f"split{seed}"
    if salt in (used := salts(source)):
      while salt in used:
        salt += "+"
      options.append(salt)

    def assign(example: Example) -> str | None:
      u, edge = text_hash(key(example), salt) / 2**64, 0.0
      for split, share in fractions.items():
        edge += share
        if u < edge:
          return split
      return None

    super().__init__(
      source,
      fractions,
      assign,
      [*identity, list(fractions.items()), *options],
      of,
    )
    self.salts |= {salt}


def check_fractions(fractions: Mapping[str, float], name: str) -> None:
  """Raises ValueError for shares of splits that are none."""
  for split, share in fractions.items():
    if not 0 < share <= 1:
      raise ValueError(
        f"fractions.{split}={share} of source {name!r} must be above 0 and at"
        " most 1."
      )
  total = sum(fractions.values())
  if total > 1 + 1e-9:  # rounding of shares such as 0.7 + 0.2 + 0.1
    raise ValueError(
      f"fractions={fractions} of source {name!r} sum to {total:g}; they may"
      " sum to 1 at most."
    )
