"""The best, worst or any n of a source's examples: the option `select`.

select = dict(keep="top", count=10_000,
              scorer=dict(name="classifier", path="runs/hate", label="hate"))
"""

import heapq
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bertjax import registry
from bertjax.data.sources import base, files

_BATCH = 1024  # texts that are scored together
_SIGNS = {"top": 1.0, "bottom": -1.0, "random": 1.0}


class Scorer(NamedTuple):
  """A number for every text.

  Attributes:
    score: of several texts.
    identity: changes when the numbers could; JSON values.
  """

  score: Callable[[list[str]], Sequence[float]]
  identity: Any


# Rows of `SCORERS`.


def length(unit: str = "words") -> Scorer:
  """How long a text is, in "words" between spaces or in "characters"."""
  units = {"words": lambda text: len(text.split()), "characters": len}
  count = registry.lookup(units, unit, "scorer.unit")
  return Scorer(lambda texts: list(map(count, texts)), ["length", unit])


def word_list(
  words: Sequence[str] | None = None, path: str | None = None
) -> Scorer:
  """The share of a text's words, without case and edges, that a list holds.

  Args:
    words: the list.
    path: instead, a file of a word a line.

  Raises:
    ValueError: both or neither, or an empty list.
  """
  if (words is None) == (path is None):
    raise ValueError("scorer 'word_list' takes one of words and path.")
  if path is not None:
    with files.open_text(path) as file:
      words = [line.strip() for line in file]
  wanted = sorted({word.casefold() for word in words if word})
  if not wanted:
    raise ValueError("scorer 'word_list' has no words.")
  known = frozenset(wanted)

  def share(text: str) -> float:
    found = [word.strip(".,;:!?\"'()[]{}") for word in text.casefold().split()]
    return sum(word in known for word in found) / max(len(found), 1)

  return Scorer(lambda texts: list(map(share, texts)), ["word_list", wanted])


def classifier(path: str, label: str, batch_size: int = 32) -> Scorer:
  """The probability of a label, as a fine-tuned model of ours gives it.

  Args:
    path: a workdir or published folder with the objective "classification".
    label: one of its classes.
    batch_size: texts at a time; long ones are cut.

  Raises:
    ValueError: no such model, or no such class.
  """
  from bertjax import loading, predict  # they read sources themselves

  model = loading.load_model(path)
  labels = model.objective_spec.get("labels") or ()
  if label not in labels:
    raise ValueError(
      f"scorer.label={label!r} is no class of {path}; choose from"
      f" {', '.join(labels) or 'none: it names no classes'}."
    )

  def score(texts: list[str]) -> list[float]:
    said = predict.classify(model, texts, batch_size=batch_size, truncate=True)
    return [answer["probabilities"][label] for answer in said]

  return Scorer(score, ["classifier", _content(pathlib.Path(path)), label])


def _content(folder: pathlib.Path) -> str:
  """Digest of a model folder's weights, configuration and tokenizer."""
  parts = ("config.json", "checkpoints", "tokenizer")
  inside = [folder / p for p in parts] if (folder / parts[1]).exists() else []
  found = sorted(
    file
    for part in inside or [folder]
    for file in ([part] if part.is_file() else part.rglob("*"))
    if file.is_file()
  )
  return base.fingerprint_of(
    [(str(f.relative_to(folder)), files.content_of(str(f))) for f in found]
  )


SCORERS: dict[str, Callable[..., Scorer]] = {
  "classifier": classifier,
  "length": length,
  "word_list": word_list,
}


class Selected(base.Derived):
  """A source of whose training split only the chosen examples remain.

  Equal scores are decided by the hash of the text, so the choice depends on
  neither order nor machine. Examples stay in their order. Costs a pass that
  scores every text; memory is one number a chosen example.
  """

  def __init__(
    self,
    source: base.Source,
    keep: str,
    count: int | None = None,
    share: float | None = None,
    scorer: Mapping[str, Any] | None = None,
    seed: int = 0,
    of: str = "train",
  ):
    """Args:
    source: what to choose from.
    keep: "top" or "bottom" of the scores, or "random".
    count: examples to keep; all if there are fewer.
    share: instead, the share of them.
    scorer: a name of `SCORERS` and its options; not with "random".
    seed: of "random" and of what decides between equal scores.
    of: the split that is chosen from; the others stay whole.

    Raises:
      ValueError: options that exclude each other or are out of range.
    """
    base.check_split(source, of)
    self._sign = registry.lookup(_SIGNS, keep, "select.keep")
    if (count is None) == (share is None):
      raise ValueError("select takes one of count and share.")
    if count is not None and count < 1:
      raise ValueError(f"select.count={count} must be at least 1.")
    if share is not None and not 0 < share <= 1:
      raise ValueError(f"select.share={share} must be above 0 and at most 1.")
    if (keep == "random") != (scorer is None):
      raise ValueError(
        "select.scorer says what 'top' and 'bottom' are of; it is required for"
        f" them and has no use for 'random' (select.keep={keep!r})."
      )
    self._scorer = None
    if scorer is not None:
      self._scorer = registry.build(SCORERS, scorer, "select.scorer")
    super().__init__(source)
    self._of, self._salt = of, f"select{seed}"
    self._count, self._share = count, share
    self._options = [keep, count, share, seed, of]
    self._chosen: frozenset[int] | None = None

  def measured(self, measure: base.Measure) -> "Selected":
    twin = super().measured(measure)
    twin._chosen = None  # by number in a source that may be another one
    return twin

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      "select",
      self._options,
      self._scorer and self._scorer.identity,
      self._source.fingerprint(),
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    examples = self._source.examples(split)
    if split != self._of:
      return examples
    if self._chosen is None:
      self._chosen = self._choose()
    chosen = self._chosen
    return (e for number, e in enumerate(examples) if number in chosen)

  def _choose(self) -> frozenset[int]:
    count = self._count
    if count is None:
      total = sum(1 for _ in self._source.examples(self._of))
      count = max(1, round(self._share * total))
    best = heapq.nlargest(count, self._ranked())
    return frozenset(-number for *_, number in best)

  def _ranked(self) -> Iterator[tuple[float, int, int]]:
    """(score, what decides between equals, minus the number) of each text."""
    numbers = itertools.count()
    examples = self._source.examples(self._of)
    while batch := list(itertools.islice(examples, _BATCH)):
      texts = [example["text"] for example in batch]
      scores = [0.0] * len(texts) if self._scorer is None else (
        self._scorer.score(texts)
      )  # fmt: skip
      for text, score in zip(texts, scores, strict=True):
        tie = base.text_hash(text, self._salt)
        yield self._sign * float(score), tie, -next(numbers)
