"""Several corpora as one: each document repeated, or left out, by a factor."""

import copy
import functools
import math
from collections.abc import Iterator, Sequence

from bertjax.data.sources import base

_MEASURED = ("tokens", "instances")  # known once there is a tokenizer
_UNITS = ("documents", "characters", *_MEASURED)


def copies(factor: float, key: str) -> int:
  """How often the document `key` appears: floor(factor), or one more.

  The fraction is drawn from a hash of the key, so a smaller factor keeps a
  subset of what a larger one keeps.
  """
  whole = math.floor(factor)
  return whole + (base.text_hash(key, "copies") / 2**64 < factor - whole)


class Mixture:
  """Sources one after the other; training shuffles rows anyway.

  Parts that shall be read one after the other are stages of the run, each with
  its own source: see `stages` of the config.

  A split holds what the sources that have this split hold. Repeated documents
  carry `copy` > 0, which keeps them through the removal of duplicates.
  """

  name = "mixture"

  def __init__(
    self,
    sources: Sequence[base.Source],
    *,
    dupe_factors: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    alpha: float | None = None,
    targets: Sequence[float] | None = None,
    unit: str = "characters",
  ):
    """Args:
    sources: what to mix.
    dupe_factors: how often each source's documents appear: 2 is twice, 0.25
      keeps a quarter; None is once, which concatenates the sources.
    weights: instead of factors, each source's share of the training split.
      The source that is scarcest for its share appears once, the others are
      subsampled. Costs one pass over the training splits.
    alpha: instead of weights, shares proportional to size^alpha, the size of
      each training split: 1 is as they are, 0.7 favours the small ones, 0
      makes all alike (Conneau & Lample 2019, arXiv:1901.07291, eq. 1).
    targets: instead of shares, how much each source gives an epoch: what is
      scarce is repeated, what is plenty subsampled. With unit "instances" that
      is the number of rows (the method of Wada et al. 2020, arXiv:2005.07202,
      which balances a small corpus with a large one).
    unit: what shares and targets are measured in: "documents", "characters",
      "tokens", or "instances", the rows that a source alone would make. The
      last two cost a token cache of every source; a vocabulary that is trained
      on the mixture itself has weights by characters, and no targets.

    Raises:
      ValueError: more than one of factors, weights, alpha and targets; numbers
        out of range or of another number than the sources; unknown unit; no
        source.
    """
    self._sources = list(sources)
    if not self._sources:
      raise ValueError("sources=[] of source 'mixture' needs at least one.")
    ways = (dupe_factors, weights, alpha, targets)
    if sum(way is not None for way in ways) > 1:
      raise ValueError(
        "source 'mixture' takes one of dupe_factors, weights, alpha and"
        " targets."
      )
    if alpha is not None and not 0 <= alpha <= 1:
      raise ValueError(
        f"alpha={alpha} of source 'mixture' must lie in 0..1: 1 leaves the"
        " sizes as they are, 0 makes them equal."
      )
    if unit not in _UNITS:
      raise ValueError(f"unit={unit!r} must be one of {', '.join(_UNITS)}.")
    lists = dict(dupe_factors=dupe_factors, weights=weights, targets=targets)
    for field, values in lists.items():
      if values is not None and (
        len(values) != len(self._sources) or min(values) <= 0
      ):
        raise ValueError(
          f"{field}={list(values)} of source 'mixture' must hold a positive"
          f" number for each of its {len(self._sources)} sources."
        )
    self._factors = (
      [1.0] * len(self._sources) if dupe_factors is None else list(dupe_factors)
    )
    self._weights = None if weights is None else list(weights)
    self._alpha = alpha
    self._targets = None if targets is None else list(targets)
    self._unit = unit
    self._measure: base.Measure | None = None
    self._resolved: list[float] | None = None
    self.licence = "; ".join(
      dict.fromkeys(f"{s.name}: {s.licence}" for s in self._sources)
    )
    self.salts = frozenset().union(*map(base.salts, self._sources))
    present = dict.fromkeys(split for s in self._sources for split in s.splits)
    self.splits = tuple(present)
    if dupe_factors is None and any(way is not None for way in ways):
      for source in self._sources:
        base.check_split(source, "train")

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      "mixture",
      [source.fingerprint() for source in self._sources],
      self._factors,
      self._weights,
      self._unit,
      *([] if self._alpha is None else [self._alpha]),
      *([] if self._targets is None else ["targets", self._targets]),
      *([] if self._measure is None else [self._measure.identity]),
    )

  def measured(self, measure: base.Measure) -> "Mixture":
    """The mixture with its units known."""
    twin = copy.copy(self)
    twin._sources = [base.measured(s, measure) for s in self._sources]
    twin._resolved = None
    if self._unit in _MEASURED:
      twin._measure = measure
    return twin

  def factors(self) -> list[float]:
    """Each source's factor; what else is given is turned into factors."""
    if (self._weights, self._alpha, self._targets) == (None, None, None):
      return self._factors
    if self._resolved is None:
      self._resolved = self._resolve()
    return self._resolved

  def _resolve(self) -> list[float]:
    if self._targets is not None:
      if self._unit in _MEASURED and self._measure is None:
        return [1.0] * len(self._sources)  # counts of what is not known yet
      return [t / size for t, size in zip(self._targets, self._sizes())]
    sizes = self._sizes()
    weights = self._weights or [size**self._alpha for size in sizes]
    wanted = [w / size for w, size in zip(weights, sizes)]
    return [w / max(wanted) for w in wanted]

  def _sizes(self) -> list[int]:
    sizes = list(map(self._size, self._sources))
    for i, (source, size) in enumerate(zip(self._sources, sizes)):
      if not size:
        raise ValueError(
          f"sources[{i}] of source 'mixture', {source.name!r}, has 0"
          f" {self._unit} in split 'train', which no factor turns into a share;"
          " leave it out."
        )
    return sizes

  def _size(self, source: base.Source) -> int:
    if self._measure is not None:
      return self._measure.size(source, self._unit)
    return sum(
      1 if self._unit == "documents" else len(example["text"])
      for example in source.examples("train")
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    """Examples with `id` = "<position of the source>/<its id>".

    `component` is the position too; of nested mixtures the outermost counts.
    """
    base.check_split(self, split)
    mixed = (
      example
      for i, source in self._with(split)
      for example in self._repeated(
        i, split, functools.partial(source.examples, split)
      )
    )
    return base.nonempty(mixed, self.name, split)

  def parts(self, split: str) -> Sequence[base.Part]:
    """Those of all sources."""
    base.check_split(self, split)
    return [
      functools.partial(self._repeated, i, split, part)
      for i, source in self._with(split)
      for part in base.parts(source, split)
    ]

  def _with(self, split: str) -> list[tuple[int, base.Source]]:
    """Positions and sources of those that have the split."""
    every = enumerate(self._sources)
    return [(i, source) for i, source in every if split in source.splits]

  def _repeated(
    self, i: int, split: str, part: base.Part
  ) -> Iterator[base.Example]:
    # Held-out splits stay as they are: weighting them changes the question.
    factor = self.factors()[i] if split == "train" else 1
    for example in part():
      key, copy_of = f"{i}/{example['id']}", example.get("copy", 0)
      count = copies(factor, key)
      # Of a nested mixture each copy counts apart.
      for number in range(count * copy_of, count * (copy_of + 1)):
        yield {**example, "id": key, "copy": number, "component": i}
