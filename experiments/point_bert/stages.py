"""Configs of Point-BERT's stages, from a tokenizer to fine-tuning.

They are those of configs/, one after the other; what is said here is which
clouds and labels a stage has and where it starts.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from bertjax.config import merge, plain, stage_configs
from configs import point_bert, point_bert_transformer

Config = dict[str, Any]
WAYS, SHOTS = 5, 10


def tokenizer(variant: str) -> Config:
  """The tokenizer of configs/point_bert.py."""
  return _quiet(plain(point_bert.get_config(variant)))


def pretraining(variant: str, codes: pathlib.Path) -> Config:
  """Masked point modelling of the same clouds, their labels unread.

  Args:
    variant: of configs/point_bert_transformer.py.
    codes: workdir of the tokenizer.
  """
  start = {"init_from": {"path": str(codes)}}
  return _quiet(merge(_stage(variant, "2_pretrain"), start))


def pretraining_on(
  config: Config, start: pathlib.Path, codes: pathlib.Path, source: Mapping
) -> Config:
  """Pre-training that goes on with the clouds of another source.

  Args:
    config: of pre-training.
    start: workdir of that.
    codes: workdir of the tokenizer.
    source: `config.data.source`.
  """
  tokens = {"objective": {"tokenizer": {"path": str(codes)}}}
  goes_on = merge(config, tokens | {"data": {"source": source}})
  return goes_on | {"init_from": {"path": str(start)}}


def classification(
  variant: str, start: pathlib.Path | None, steps: int, **data: Any
) -> Config:
  """Fine-tuning for classes.

  Args:
    variant: of configs/point_bert_transformer.py.
    start: workdir of pre-training; None: the paper's initial values of training
      from scratch.
    steps: of either.
    **data: what `config.data` says otherwise.
  """
  return _started(_stage(variant, "3_classify"), start, steps, data)


def few_shot(fold: int, tests: int) -> Config:
  """`config.data` of a fold, for `classification`."""
  task = dict(ways=WAYS, shots=SHOTS, fold=fold, tests=tests)
  return {"few_shot": task}


def segmentation(
  variant: str, start: pathlib.Path | None, steps: int, **data: Any
) -> Config:
  """Fine-tuning for the parts of points; arguments of `classification`."""
  stage = _stage(variant, "3_classify")
  points = stage["data"]["num_points"]
  changes = {
    "objective": dict(
      name="part_segmentation", levels=(points // 2, points // 8)
    ),
    "evals": {"heldout": {"name": "part_iou", "split": "test"}},
  }
  stage = merge(stage, changes)
  return _started(stage, start, steps, {"parts": True} | data)


def _stage(variant: str, name: str) -> Config:
  return stage_configs(point_bert_transformer.get_config(variant))[name]


def _started(
  stage: Config,
  start: pathlib.Path | None,
  steps: int,
  data: Mapping[str, Any],
) -> Config:
  """Evaluated at the end alone, saved then."""
  changed = merge(
    stage,
    {
      "data": data,
      "stop": {"steps": steps},
      "every": {"log": max(1, steps // 10), "checkpoint": steps},
    },
  )
  for evaluation in changed["evals"].values():
    evaluation.pop("every", None)
  if start is None:
    scratch = merge(changed, {"model": {"start": "classifier"}})
    return _quiet(scratch | {"init_from": None})
  return _quiet(changed | {"init_from": {"path": str(start)}})


def _quiet(config: Config) -> Config:
  return config | {"writers": ("csv",)}
