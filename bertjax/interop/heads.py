"""Fine-tuning heads of published models <-> our `config.objective`.

A published folder says in config.json which class of `transformers` it is, what
its labels are called and what kind of answers they are.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MASKED_LM = {"name": "masked_lm", "pair_task": None}
# Published layouts have one head of pairs, and no field for what it learned.
PAIR_TASK = "bertjax_pair_task"
_PUBLISHED_PAIR_TASK = "nsp"
_DEFAULT_CLASSES = 2  # of a config.json that does not say


@dataclasses.dataclass(frozen=True)
class Head:
  """How `transformers` knows one of our objectives.

  Attributes:
    suffix: of its class, behind "Bert" or "Roberta".
    part: our module that makes the head.
    classes: whether its classes have names.
    dropout: whether it has a rate of its own.
    tag: of the hub's pipelines.
  """

  suffix: str
  part: str
  classes: bool
  dropout: bool
  tag: str


HEADS: dict[str, Head] = {
  "classification": Head(
    "ForSequenceClassification", "classifier", True, True, "text-classification"
  ),
  "token_classification": Head(
    "ForTokenClassification", "classifier", True, True, "token-classification"
  ),
  "span_qa": Head(
    "ForQuestionAnswering", "span", False, False, "question-answering"
  ),
  "multiple_choice": Head(
    "ForMultipleChoice", "classifier", False, True, "multiple-choice"
  ),
}
_PREFIXES = {"bert": "Bert", "roberta": "Roberta"}
_PROBLEMS = (
  "regression", "single_label_classification", "multi_label_classification",
)  # fmt: skip


def head_of(config: Mapping[str, Any], family: str) -> str | None:
  """The objective that a config.json names; None if it has no such head."""
  for name in config.get("architectures") or ():
    suffix = name.removeprefix(_PREFIXES[family])
    for objective, head in HEADS.items():
      if head.suffix == suffix:
        return objective
  return None


def pre_training(
  config: Mapping[str, Any], heads: Collection[str]
) -> dict[str, Any]:
  """Our `config.objective` of a published model with none of `HEADS`.

  Args:
    config: of either layout, with `PAIR_TASK` if we wrote it.
    heads: names of the parts beside the encoder.
  """
  task = config.get(PAIR_TASK, _PUBLISHED_PAIR_TASK)
  return MASKED_LM | ({"pair_task": task} if "pair_head" in heads else {})


def config_of_pairs(objective: Mapping[str, Any]) -> dict[str, Any]:
  """What a published config says of a task of pairs that is not NSP."""
  task = objective.get("pair_task")
  return {} if task in (None, _PUBLISHED_PAIR_TASK) else {PAIR_TASK: task}


def default_labels(count: int) -> tuple[str, ...]:
  """What `transformers` calls classes without names."""
  return tuple(f"LABEL_{i}" for i in range(count))


def _labels(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
  count = config.get("num_labels", _DEFAULT_CLASSES)
  named = config.get("id2label") or dict(enumerate(default_labels(count)))
  by_id = {int(key): str(value) for key, value in named.items()}
  if sorted(by_id) != list(range(len(by_id))):
    raise ValueError(
      f"{where}: id2label has the ids {sorted(by_id)}; they must count from 0."
    )
  return tuple(by_id[i] for i in range(len(by_id)))


def objective_from_config(
  config: Mapping[str, Any], family: str, where: str
) -> dict[str, Any]:
  """Our `config.objective` of a published config.json.

  Without a fine-tuning head that is masked language modelling.

  Raises:
    ValueError: labels or a problem type that no objective has.
  """
  name = head_of(config, family)
  if name is None:
    return dict(MASKED_LM)
  head, spec = HEADS[name], {"name": name}
  if head.classes:
    labels = _labels(config, where)
    spec["num_classes"] = len(labels)
    if labels != default_labels(len(labels)):
      spec["labels"] = labels
  if name == "classification":
    problem = config.get("problem_type")
    if problem not in (None, *_PROBLEMS):
      raise ValueError(
        f"{where}: problem_type={problem!r} is unknown; it must be one of"
        f" {', '.join(_PROBLEMS)}."
      )
    single = len(labels) == 1
    if problem is not None and (
      (problem == "regression" and not single)
      or (problem == "single_label_classification" and single)
    ):
      raise ValueError(
        f"{where}: problem_type={problem!r} with {len(labels)} labels is not"
        " supported; a regression has one, a classification two or more."
      )
    if problem == "multi_label_classification":
      spec["multilabel"] = True
  if head.dropout:
    rate = config.get("classifier_dropout")
    if rate is None:
      rate = config.get("hidden_dropout_prob", 0.1)
    spec["dropout_rate"] = rate
  return spec


def config_from_objective(
  objective: Mapping[str, Any], family: str
) -> dict[str, Any]:
  """Fields of config.json for a fine-tuning objective."""
  head = HEADS[objective["name"]]
  config: dict[str, Any] = {"architectures": [_PREFIXES[family] + head.suffix]}
  if head.classes:
    count = objective["num_classes"]
    labels: Sequence[str] = objective.get("labels") or default_labels(count)
    config["id2label"] = {str(i): name for i, name in enumerate(labels)}
    config["label2id"] = {name: i for i, name in enumerate(labels)}
  if objective["name"] == "classification":
    regression, single, multi = _PROBLEMS
    if objective.get("multilabel"):
      config["problem_type"] = multi
    else:
      config["problem_type"] = regression if count == 1 else single
  if head.dropout:
    config["classifier_dropout"] = objective.get("dropout_rate", 0.1)
  return config
