"""Configs of Point-BERT's stages, from a tokenizer to fine-tuning.

They are those of configs/; what is said here is where each starts, how long it
takes and which clouds and labels it has.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from bertjax.config import merge, plain, stage_configs
from configs import point_bert, point_bert_transformer

Config = dict[str, Any]


def tokenizer(variant: str) -> Config:
  """The tokenizer of configs/point_bert.py."""
  return _quiet(plain(point_bert.get_config(variant)))


def pretraining(variant: str, codes: pathlib.Path) -> Config:
  """Masked point modelling of generated shapes, their labels unread.

  Args:
    variant: of configs/point_bert_transformer.py.
    codes: workdir of the tokenizer.
  """
  start = {"init_from": {"path": str(codes)}}
  return _quiet(merge(_stage(variant, "2_pretrain"), start))


def continued(
  config: Config,
  start: pathlib.Path,
  codes: pathlib.Path,
  steps: int,
  **data: Any,
) -> Config:
  """Pre-training that goes on with other clouds.

  Args:
    config: of pre-training.
    start: workdir of that.
    codes: workdir of the tokenizer.
    steps: how many.
    **data: what `config.data` says otherwise.
  """
  changes = {
    "objective": {"tokenizer": {"path": str(codes)}},
    "data": data,
    "stop": {"steps": steps},
  }
  return merge(config, changes) | {"init_from": {"path": str(start)}}


def classification(
  variant: str, start: pathlib.Path | None, steps: int, **data: Any
) -> Config:
  """Fine-tuning to classes.

  Args:
    variant: of configs/point_bert_transformer.py.
    start: workdir of pre-training; None: the paper's initial values of training
      from scratch.
    steps: how many.
    **data: what `config.data` says otherwise.
  """
  return _started(_stage(variant, "3_classify"), start, steps, data)


def segmentation(
  variant: str, start: pathlib.Path | None, steps: int, **data: Any
) -> Config:
  """Fine-tuning to the parts of points; arguments of `classification`."""
  stage = _stage(variant, "3_classify")
  points = stage["data"]["num_points"]
  stage = merge(
    stage,
    {
      "objective": dict(
        name="part_segmentation", levels=(points // 2, points // 8)
      ),
      "evals": {"heldout": dict(name="part_iou", split="test")},
    },
  )
  return _started(stage, start, steps, {"parts": True, **data})


def _stage(variant: str, name: str) -> Config:
  return stage_configs(point_bert_transformer.get_config(variant))[name]


def _started(
  stage: Config,
  start: pathlib.Path | None,
  steps: int,
  data: Mapping[str, Any],
) -> Config:
  """Evaluated at the end alone, and saved then."""
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
