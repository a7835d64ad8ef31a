"""What fine-tuned models say: classes, tags, answers, choices.

A task's kind makes the rows and reads the logits, here as in training, so a
model is asked exactly as it was trained.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from bertjax.interop.heads import default_labels
from bertjax.loading import LoadedModel
from bertjax.predict import rows as rows_lib
from bertjax.predict.requests import Field, Form
from bertjax.tasks import (
  Choices,
  Kind,
  Questions,
  Sentences,
  Tagging,
  build_task,
)
from bertjax.tasks.inputs import pair_style_of
from bertjax.tasks.metrics import is_iob

Record = Mapping[str, Any]
Answers = list[dict[str, Any]]

_SECOND = "second texts (--pair)"  # in messages
_QUESTION_LENGTH = 384  # of rows, as Devlin et al. 2018 read SQuAD


@functools.partial(jax.jit, static_argnames=("objective",))
def _logits(
  params: Any, batch: dict[str, jax.Array], *, objective: nn.Module
) -> jax.Array:
  return objective.apply({"params": params}, batch, method="logits")


def logits_of(
  model: LoadedModel, arrays: Mapping[str, np.ndarray], batch_size: int
) -> np.ndarray:
  """Logits of rows, in their order; padding that no row needs is not run.

  Args:
    model: with a fine-tuning head.
    arrays: those of `Features`.
    batch_size: rows at a time.
  """
  run = functools.partial(_logits, model.params, objective=model.objective)
  arrays = {k: v for k, v in arrays.items() if k != "labels"}
  whole = jax.eval_shape(run, arrays)
  logits = np.zeros(whole.shape, whole.dtype)
  pad_id = model.need_tokenizer().pad_id
  for chosen, batch in rows_lib.array_batches(arrays, batch_size, pad_id):
    found = jax.device_get(run(batch))[: len(chosen)]
    # Scores of tokens are as long as the batch, the rest stays 0.
    logits[(chosen, *map(slice, found.shape[1:]))] = found
  return logits


def _ask(
  model: LoadedModel,
  kind: Kind,
  records: Sequence[Record],
  batch_size: int,
  truncate: bool,
  longest: int | None = None,
) -> Answers:
  if not records:
    raise ValueError("There is no text; pass at least one.")
  if model.preprocess:
    records = [kind.prepared(record, model.clean) for record in records]
  tokenizer = model.need_tokenizer()
  seq_len = _row_length(model, longest)
  style = pair_style_of(tokenizer, _task_data(model).get("pair_style"))
  features = kind.features(records, tokenizer, seq_len, style)
  long, room = kind.cut(features, seq_len)
  if long.size and not truncate:
    raise ValueError(
      f"{len(long)} of {len(records)} rows, the first of them row {long[0]},"
      f" need more than {room}. Shorten the texts, or ask for truncation"
      " (--truncate)."
    )
  logits = logits_of(model, features.arrays, batch_size)
  return kind.predictions(logits, features)


def _task_data(model: LoadedModel) -> Mapping[str, Any]:
  """`config.data` of a run that was trained on a task, else {}."""
  data = (model.config or {}).get("data", {})
  return data if data.get("name") == "task" else {}


def _row_length(model: LoadedModel, longest: int | None) -> int:
  """As in training; else what the model can read, or `longest`."""
  trained = _task_data(model).get("seq_len")
  return trained or min(model.max_positions, longest or model.max_positions)


def _records(label: str, **columns: Sequence[Any]) -> list[Record]:
  """One record a row of the columns, without what is asked for."""
  rows = zip(*columns.values())
  return [dict(zip(columns, row)) | {label: None} for row in rows]


def _classes(model: LoadedModel) -> tuple[str, ...]:
  spec = model.objective_spec
  labels = spec.get("labels") or default_labels(spec["num_classes"])
  return tuple(map(str, labels))


def classify(
  model: LoadedModel,
  texts: Sequence[str],
  pairs: Sequence[str] | None = None,
  *,
  batch_size: int = 32,
  truncate: bool = False,
) -> Answers:
  """Classes with probabilities, or numbers, of texts or pairs of texts.

  Args:
    model: of the objective "classification".
    texts: plain texts.
    pairs: the second text of each.
    batch_size: rows at a time.
    truncate: cut texts that are too long, the longer of two first.

  Returns:
    For each text `label`, `probability` and `probabilities` by label; `labels`
    and `probabilities` if a text may have several; `value` for a number.

  Raises:
    ValueError: another kind of model, or a text that is too long.
  """
  seconds = [None] * len(texts) if pairs is None else pairs
  _check(model, "classification", {"texts": texts, _SECOND: seconds})
  spec = model.objective_spec
  multilabel = bool(spec.get("multilabel"))
  number = spec.get("num_classes", 1) == 1 and not multilabel
  kind = Sentences(
    "text",
    None if pairs is None else "pair",
    labels=() if number else _classes(model),
    multilabel=multilabel,
    metrics=(),  # nothing is scored
  )
  records = _records("label", text=texts, pair=seconds)
  return _ask(model, kind, records, batch_size, truncate)


def tag(
  model: LoadedModel,
  texts: Sequence[str | Sequence[str]],
  *,
  batch_size: int = 32,
  truncate: bool = False,
) -> Answers:
  """A label for every word, and the entities that IOB labels describe.

  Args:
    model: of the objective "token_classification".
    texts: lists of words, or texts that are divided at their spaces.
    batch_size: rows at a time.
    truncate: give words that do not fit the first label.

  Returns:
    For each text `words`, `labels`, and with IOB labels `entities`: type, first
    and last word, text.

  Raises:
    ValueError: another kind of model, or a text that is too long.
  """
  _check(model, "token_classification", {"texts": texts})
  words = [t.split() if isinstance(t, str) else list(t) for t in texts]
  labels = _classes(model)
  kind = Tagging(labels=labels, entity=all(map(is_iob, labels)))
  return _ask(
    model, kind, _records("labels", words=words), batch_size, truncate
  )


def answer(
  model: LoadedModel,
  questions: Sequence[str],
  contexts: Sequence[str],
  *,
  null: bool | None = None,
  batch_size: int = 32,
  truncate: bool = False,
) -> Answers:
  """The span of its context that answers each question.

  Args:
    model: of the objective "span_qa".
    questions: plain texts.
    contexts: one for each; long ones are read through overlapping windows.
    null: give "" where "no answer" scores higher (SQuAD 2.0); None: if the
      task that the model was trained on had such questions. The other options
      of `Questions` are those of that task.
    batch_size: rows at a time.
    truncate: cut questions that are too long.

  Returns:
    For each question `answer`, its `score` and the `null_score`.

  Raises:
    ValueError: another kind of model, or a question that is too long.
  """
  given = {"questions": questions, "contexts (--pair)": contexts}
  _check(model, "span_qa", given)
  kind = _questions(model)
  if null is not None:
    kind = dataclasses.replace(kind, null=null)
  records = _records("answers", question=questions, context=contexts)
  return _ask(model, kind, records, batch_size, truncate, _QUESTION_LENGTH)


def _questions(model: LoadedModel) -> Questions:
  """The kind that the model was trained on, of fields with common names."""
  task = _task_data(model).get("task")
  trained = None if task is None else build_task(task).kind
  if isinstance(trained, Questions):
    return dataclasses.replace(
      trained, question="question", context="context", answers="answers"
    )
  longest = _row_length(model, _QUESTION_LENGTH)
  return Questions(
    max_question_tokens=max(1, min(64, longest // 2)),
    stride=max(1, min(128, longest // 4)),
  )


def choose(
  model: LoadedModel,
  texts: Sequence[str],
  endings: Sequence[Sequence[str]],
  *,
  batch_size: int = 32,
  truncate: bool = False,
) -> Answers:
  """Which of several endings goes with each text.

  Args:
    model: of the objective "multiple_choice".
    texts: plain texts.
    endings: for each text equally many.
    batch_size: texts at a time.
    truncate: cut texts that are too long.

  Returns:
    For each text the index `choice`, and `probabilities` of all endings.

  Raises:
    ValueError: another kind of model, or a text that is too long.
  """
  _check(model, "multiple_choice", {"texts": texts})
  _refuse_strings({f"endings[{i}]": e for i, e in enumerate(endings)})
  count = len(endings[0]) if len(endings) else 0
  if len(endings) != len(texts) or count < 2:
    raise ValueError(
      f"There are {len(texts)} texts and {len(endings)} lists of endings, the"
      f" first with {count}; each text needs the same number, two or more."
    )
  kind = Choices("text", "endings", count)
  records = _records("label", text=texts, endings=[*map(list, endings)])
  return _ask(model, kind, records, batch_size, truncate)


def _check(
  model: LoadedModel, objective: str, given: Mapping[str, Sequence[Any]]
) -> None:
  """Refuses another kind of model, and columns that do not go together."""
  if (found := model.objective_spec["name"]) != objective:
    raise ValueError(
      f"{model.path} was made for {found!r}; this needs {objective!r}."
    )
  _refuse_strings(given)
  (first, texts), *others = given.items()
  for name, column in others:
    if len(column) != len(texts):
      raise ValueError(
        f"There are {len(texts)} {first} but {len(column)} {name}."
      )


def _refuse_strings(given: Mapping[str, Sequence[Any]]) -> None:
  for name, texts in given.items():
    if isinstance(texts, str):
      raise ValueError(f"{name} is one string; pass a list of texts.")


# Fields of a request by task, and the function that answers their columns.
REQUESTS: dict[str, tuple[tuple[Field, ...], Callable[..., Answers]]] = {
  "classify": ((Field("text"), Field("pair", required=False)), classify),
  "tag": ((Field("text", Form.WORDS),), tag),
  "answer": ((Field("question"), Field("context")), answer),
  "choose": ((Field("text"), Field("endings", Form.TEXTS)), choose),
}
