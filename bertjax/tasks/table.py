"""Downstream tasks by name.

A row says which fields a task reads, which labels it has and how it is scored.
Published tasks come from TFDS unless `source` names local files with the same
fields; TFDS must have prepared them, for bertjax downloads nothing.

The kinds serve neither SuperGLUE's multirc, record and wsc, nor SQuAD's test
split, which is secret.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.tasks.kinds import Choices, Kind, Questions, Sentences, Tagging

Builder = Callable[..., "Task"]


@dataclasses.dataclass(frozen=True)
class Task:
  """What is learned, and where from.

  Attributes:
    kind: fields, labels and metrics.
    source: a row of `READERS` and its options.
  """

  kind: Kind
  source: Mapping[str, Any]


def published(kind: Kind, builder: str | None) -> Builder:
  """A row whose data are known.

  Args:
    kind: what is learned.
    builder: name in TFDS; None: it is not there, so `source` is required.
  """

  def build(
    source: Mapping[str, Any] | None = None, data_dir: str | None = None
  ) -> Task:
    if source is not None:
      return Task(kind, dict(source))
    if builder is None:
      raise ValueError(
        "data.task.source is required: TFDS does not have this task. Name"
        f" files with the fields {', '.join(kind.fields)}."
      )
    return Task(kind, dict(name="tfds", builder=builder, data_dir=data_dir))

  return build


def _field(value: Any) -> Any:
  return value if value is None or isinstance(value, str) else tuple(value)


def classification(
  *,
  source: Mapping[str, Any],
  labels: Sequence[str],
  text: str | Sequence[str] = "text",
  label: str = "label",
  multilabel: bool = False,
  metrics: Sequence[str] = ("accuracy",),
) -> Task:
  """A class (or several) for a text.

  Args:
    source: a row of `READERS` and its options.
    labels: names of the classes.
    text: field, or fields to join by a space.
    label: field of the label, or of a list of labels.
    multilabel: whether a text has any number of labels.
    metrics: keys of `METRICS` that are for such labels.
  """
  kind = Sentences(
    _field(text), None, label, tuple(labels), multilabel, tuple(metrics)
  )
  return Task(kind, dict(source))


def pairs(
  *,
  source: Mapping[str, Any],
  labels: Sequence[str],
  first: str | Sequence[str],
  second: str | Sequence[str],
  label: str = "label",
  metrics: Sequence[str] = ("accuracy",),
) -> Task:
  """A class for two texts; arguments as in `classification`."""
  kind = Sentences(
    _field(first),
    _field(second),
    label,
    tuple(labels),
    metrics=tuple(metrics),
  )
  return Task(kind, dict(source))


def regression(
  *,
  source: Mapping[str, Any],
  first: str | Sequence[str] = "text",
  second: str | Sequence[str] | None = None,
  label: str = "label",
  metrics: Sequence[str] = ("pearson", "spearman"),
) -> Task:
  """A number for one text or two."""
  kind = Sentences(_field(first), _field(second), label, metrics=tuple(metrics))
  return Task(kind, dict(source))


def tagging(
  *,
  source: Mapping[str, Any],
  labels: Sequence[str],
  words: str = "words",
  tags: str = "labels",
  entity: bool = True,
) -> Task:
  """A label for every word; the reader `columns` gives these fields."""
  return Task(Tagging(words, tags, tuple(labels), entity), dict(source))


def questions(*, source: Mapping[str, Any], **options: Any) -> Task:
  """Answers as spans of a context; options are those of `Questions`."""
  kind = registry.call(Questions, options, "data.task")
  return Task(kind, dict(source))


def choices(
  *,
  source: Mapping[str, Any],
  first: str | Sequence[str],
  endings: str | Sequence[str],
  num_choices: int,
  prefix: str | None = None,
  label: str = "label",
) -> Task:
  """The right one of several endings; arguments as in `Choices`."""
  kind = Choices(_field(first), _field(endings), num_choices, prefix, label)
  return Task(kind, dict(source))


def docstrings(*, packages: Sequence[str], min_words: int = 5) -> Task:
  """Which of some installed packages a text documents; needs no network."""
  kind = Sentences(
    "text",
    label="package",
    labels=tuple(packages),
    metrics=("accuracy", "macro_f1"),
  )
  source = dict(name="docstrings", packages=packages, min_words=min_words)
  return Task(kind, source)


def _iob(*types: str) -> tuple[str, ...]:
  return ("O", *(f"{p}-{t}" for t in types for p in "BI"))


_ENTAILS = ("entailment", "not_entailment")
_DUPLICATE = ("not_duplicate", "duplicate")
_NLI = ("entailment", "neutral", "contradiction")
_SWAG_ENDINGS = ("ending0", "ending1", "ending2", "ending3")

# Label names are in the order of TFDS's indices.
PUBLISHED: dict[str, tuple[Kind, str | None]] = {
  "glue/cola": (
    Sentences(
      "sentence",
      labels=("unacceptable", "acceptable"),
      metrics=("matthews", "accuracy"),
    ),
    "glue/cola",
  ),
  "glue/sst2": (
    Sentences("sentence", labels=("negative", "positive")),
    "glue/sst2",
  ),
  "glue/mrpc": (
    Sentences(
      "sentence1",
      "sentence2",
      labels=("not_equivalent", "equivalent"),
      metrics=("f1", "accuracy"),
    ),
    "glue/mrpc",
  ),
  "glue/qqp": (
    Sentences(
      "question1", "question2", labels=_DUPLICATE, metrics=("f1", "accuracy")
    ),
    "glue/qqp",
  ),
  "glue/stsb": (
    Sentences(
      "sentence1",
      "sentence2",
      metrics=("pearson", "spearman"),
      unlabelled=-1.0,  # of TFDS's test split
    ),
    "glue/stsb",
  ),
  # Its splits are validation_matched and validation_mismatched.
  "glue/mnli": (Sentences("premise", "hypothesis", labels=_NLI), "glue/mnli"),
  "glue/qnli": (
    Sentences("question", "sentence", labels=_ENTAILS),
    "glue/qnli",
  ),
  "glue/rte": (
    Sentences("sentence1", "sentence2", labels=_ENTAILS),
    "glue/rte",
  ),
  "glue/wnli": (
    Sentences("sentence1", "sentence2", labels=_ENTAILS[::-1]),
    "glue/wnli",
  ),
  "super_glue/boolq": (
    Sentences("question", "passage", labels=("False", "True")),
    "super_glue/boolq",
  ),
  "super_glue/cb": (
    Sentences(
      "premise",
      "hypothesis",
      labels=("entailment", "contradiction", "neutral"),
      metrics=("accuracy", "macro_f1"),
    ),
    "super_glue/cb",
  ),
  "super_glue/copa": (
    Choices(("premise", "question"), ("choice1", "choice2"), 2),
    "super_glue/copa",
  ),
  "super_glue/rte": (
    Sentences("premise", "hypothesis", labels=_ENTAILS),
    "super_glue/rte",
  ),
  "super_glue/wic": (
    Sentences(("word", "sentence1"), "sentence2", labels=("False", "True")),
    "super_glue/wic",
  ),
  "squad": (Questions(), "squad/v1.1"),
  "squad_v2": (Questions(null=True), "squad/v2.0"),
  "swag": (Choices("sent1", _SWAG_ENDINGS, 4, prefix="sent2"), None),
  "hellaswag": (Choices("context", "endings", 4), "hellaswag"),
  "conll2003": (
    Tagging("tokens", "ner", _iob("PER", "ORG", "LOC", "MISC")),
    "conll2003",
  ),
  "wnut17": (
    Tagging(
      labels=_iob(
        "corporation",
        "creative-work",
        "group",
        "location",
        "person",
        "product",
      )
    ),
    None,
  ),
}

TASKS: dict[str, Builder] = {
  **{name: published(*row) for name, row in PUBLISHED.items()},
  "classification": classification,
  "pairs": pairs,
  "regression": regression,
  "tagging": tagging,
  "questions": questions,
  "choices": choices,
  "docstrings": docstrings,
}


def build_task(spec: Mapping[str, Any]) -> Task:
  """The task that a config's `data.task` describes.

  Raises:
    ValueError: unknown name or option.
  """
  return registry.build(TASKS, spec, "data.task")
