"""Ways to divide a source into splits: the option `split` of any of them.

    source = dict(name="jsonl", paths="pages/*.jsonl", features=["url"],
                  split=dict(name="by_host", fractions=dict(train=.9, test=.1)))

Every rule is a function of the examples alone: the same on every machine, and
the splits that it makes have no example in common. Task sources take the same
option, which makes cross-validation `split=dict(name="k_fold", k=5, fold=i,
field="sentence")`.
"""

import functools
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.data.sources import base
from bertjax.data.sources.base import Example, Source


def host(value: Any) -> str:
  """The host of a URL, without "www."; a bare name is one.

  Raises:
    ValueError: it is no URL.
  """
  text = str(value).strip()
  start = "" if re.match(r"([a-z][a-z0-9+.-]*:)?//", text, re.I) else "//"
  try:
    found = urllib.parse.urlsplit(start + text).hostname
  except ValueError as err:
    raise ValueError(f"{value!r} names no host ({err}).") from err
  return (found or text).removeprefix("www.")


def year(value: Any) -> int:
  """The first four digits in a row, as in 2019-03-01.

  Raises:
    ValueError: there are none.
  """
  found = re.search(r"(?<!\d)\d{4}(?!\d)", str(value))
  if found is None:
    raise ValueError(f"{value!r} names no year.")
  return int(found[0])


def _field(example: Example, field: str, name: str) -> Any:
  if field not in example:
    raise ValueError(
      f"split: example {example['id']!r} of source {name!r} has no field"
      f" {field!r}; it has {', '.join(sorted(example))}. Sources of text keep"
      " the fields that `features` names."
    )
  return example[field]


def _read(
  example: Example, field: str, name: str, read: Callable[[Any], Any]
) -> Any:
  value = _field(example, field, name)
  try:
    return read(value)
  except ValueError as err:
    raise ValueError(
      f"split: {field} of example {example['id']!r} of {name!r}: {err}"
    ) from err


# How groups are read, as fingerprints call it: new for another way to read one.
_GROUPS = {str: "str", host: "host-2"}


def _grouped(
  source: Source,
  field: str,
  fractions: Mapping[str, float],
  seed: int,
  of: str,
  group: Callable[[Any], str],
) -> base.HashSplit:
  return base.HashSplit(
    source,
    fractions,
    of,
    key=lambda example: _read(example, field, source.name, group),
    identity=("group_split", field, _GROUPS[group]),
    seed=seed,
  )


# Rows of `SPLITS`.


def given(
  names: Mapping[str, str | Sequence[str]], *, source: Source
) -> "RenamedSplits":
  """The source's own splits under other names, or several as one.

  Args:
    names: by new name the old one, or the old ones in order.
    source: what to divide.

  Raises:
    ValueError: a split that the source has not, or has in two places.
  """
  return RenamedSplits(source, names)


def random(
  fractions: Mapping[str, float],
  seed: int = 0,
  of: str = "train",
  *,
  source: Source,
) -> base.HashSplit:
  """By the hash of the text: equal texts stay together.

  Labelled examples without a field `text` are told apart by all of their
  fields, a label or a number among them; `by_field` keeps together those that
  agree in a sentence.

  Args:
    fractions: share of each split; what is left over is dropped.
    seed: another one deals out otherwise.
    of: the split of the source that is divided.
    source: what to divide.
  """
  return base.HashSplit(source, fractions, of, seed=seed)


def by_field(
  field: str,
  fractions: Mapping[str, float],
  seed: int = 0,
  of: str = "train",
  *,
  source: Source,
) -> base.HashSplit:
  """By the hash of a field: examples that agree in it stay together.

  Args:
    field: of the examples, such as an author or a document's number.
    fractions: share of each split, in numbers of groups on average.
    seed: another one deals out otherwise.
    of: the split of the source that is divided.
    source: what to divide.
  """
  return _grouped(source, field, fractions, seed, of, str)


def by_host(
  fractions: Mapping[str, float],
  field: str = "url",
  seed: int = 0,
  of: str = "train",
  *,
  source: Source,
) -> base.HashSplit:
  """`by_field` for URLs: all pages of a host stay together."""
  return _grouped(source, field, fractions, seed, of, host)


def by_year(
  until: Mapping[str, int],
  field: str = "date",
  of: str = "train",
  *,
  source: Source,
) -> base.AssignedSplit:
  """By time, so that what is tested lies after what is learned.

  Args:
    until: by split its last year, ascending; later examples are left out.
    field: a year, or a date with four digits of it.
    of: the split of the source that is divided.
    source: what to divide.

  Raises:
    ValueError: years that do not ascend.
  """
  until = base.as_dict(until)
  years = list(until.values())
  if not years or years != sorted(set(years)):
    raise ValueError(
      f"split.until={until} must name the last year of each split, ascending."
    )

  def assign(example: Example) -> str | None:
    found = _read(example, field, source.name, year)
    return next((s for s, last in until.items() if found <= last), None)

  identity = ("by_year", field, list(until.items()))
  return base.AssignedSplit(source, until, assign, identity, of)


def by_value(
  field: str,
  values: Mapping[str, Any],
  rest: str | None = None,
  of: str = "train",
  *,
  source: Source,
) -> base.AssignedSplit:
  """By lists of a field's values.

  Args:
    field: of the examples.
    values: by split the value, or the values, that belong to it.
    rest: the split of all other values; None leaves them out.
    of: the split of the source that is divided.
    source: what to divide.

  Raises:
    ValueError: a value in two splits.
  """
  split_of: dict[str, str] = {}
  for split, members in base.as_dict(values).items():
    for value in base.values(members):
      if split_of.setdefault(str(value), split) != split:
        raise ValueError(
          f"split.values: {value!r} is in {split_of[str(value)]!r} and in"
          f" {split!r}; it can be in one."
        )
  names = dict.fromkeys([*values, *([] if rest is None else [rest])])

  def assign(example: Example) -> str | None:
    return split_of.get(str(_field(example, field, source.name)), rest)

  identity = ("by_value", field, sorted(split_of.items()), rest)
  return base.AssignedSplit(source, names, assign, identity, of)


def k_fold(
  k: int,
  fold: int,
  field: str | None = None,
  validation: bool = False,
  seed: int = 0,
  of: str = "train",
  *,
  source: Source,
) -> base.AssignedSplit:
  """Fold `fold` of k is the test split, the others are trained on.

  The folds have equally many distinct texts, or values of `field`, but for one.
  Costs a pass over the source.

  Args:
    k: number of folds.
    fold: which is tested, from 0.
    field: examples that agree in it stay together; None: equal texts do, or
      labelled examples that agree in all fields, as in `random`.
    validation: whether the fold after it (the first after the last) is the
      validation split and not trained on.
    seed: another one deals out otherwise.
    of: the split of the source that is divided.
    source: what to divide.

  Raises:
    ValueError: numbers out of range, or fewer groups than folds.
  """
  least = 3 if validation else 2
  if k < least:
    raise ValueError(f"split.k={k} must be at least {least}.")
  if not 0 <= fold < k:
    raise ValueError(f"split.fold={fold} must lie in 0..{k - 1}.")

  def group(example: Example) -> int:
    if field is None:
      key = base.content(example)
    else:
      key = str(_field(example, field, source.name))
    return base.text_hash(key, f"fold{seed}")

  known: dict[int, int] = {}  # filled on demand; Beam can pickle it

  def folds() -> dict[int, int]:
    if known:
      return known
    found = sorted({group(example) for example in source.examples(of)})
    if len(found) < k:
      raise ValueError(
        f"split.k={k} exceeds the {len(found)} distinct"
        f" {'texts' if field is None else f'values of {field!r}'} of source"
        f" {source.name!r}."
      )
    known.update((key, rank % k) for rank, key in enumerate(found))
    return known

  names = {fold: "test"}
  if validation:
    names[(fold + 1) % k] = "validation"

  def assign(example: Example) -> str:
    key = group(example)
    # A mixture that is measured later may hold what it did not hold here.
    return names.get(folds().get(key, key % k), "train")

  splits = ("train", *(["validation"] if validation else []), "test")
  identity = ("k_fold", k, fold, field, validation, seed)
  return base.AssignedSplit(source, splits, assign, identity, of)


class RenamedSplits(base.Derived):
  """A source whose splits have other names; see `given`."""

  def __init__(self, source: Source, names: Mapping[str, str | Sequence[str]]):
    """Args:
    source: what is read.
    names: by new name the old one, or the old ones in order.
    """
    self._names = {k: base.strings(v) for k, v in names.items()}
    used: dict[str, str] = {}
    for new, olds in self._names.items():
      for old in olds:
        base.check_split(source, old)
        if used.setdefault(old, new) != new:
          raise ValueError(
            f"split.names: {old!r} is in {used[old]!r} and in {new!r}; it can"
            " be in one."
          )
    super().__init__(source, self._names)

  def fingerprint(self) -> str:
    names = [[k, list(v)] for k, v in self._names.items()]
    return base.fingerprint_of("given", self._source.fingerprint(), names)

  def examples(self, split: str):
    base.check_split(self, split)
    for old in self._names[split]:
      yield from self._source.examples(old)

  def parts(self, split: str) -> Sequence[base.Part]:
    base.check_split(self, split)
    olds = self._names[split]
    return [part for old in olds for part in base.parts(self._source, old)]


SPLITS: dict[str, Callable[..., Source]] = {
  "given": given,
  "random": random,
  # Of sentences or passages that name their document.
  "by_document": functools.partial(by_field, field="document"),
  "by_field": by_field,
  "by_host": by_host,
  "by_value": by_value,
  "by_year": by_year,
  "k_fold": k_fold,
}


def build_split(source: Source, spec: Mapping[str, Any], field: str) -> Source:
  """The source, divided as a row of `SPLITS` and its options say.

  Raises:
    ValueError: an unknown name or option, or one out of range.
  """
  return registry.build(SPLITS, spec, field, source=source)
