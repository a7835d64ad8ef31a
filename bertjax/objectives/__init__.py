"""Training objectives by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from bertjax import registry
from bertjax.objectives.fine_tuning import FINE_TUNING
from bertjax.objectives.left_to_right import LeftToRightLM, left_to_right_lm
from bertjax.objectives.masked_lm import MaskedLM, masked_lm
from bertjax.objectives.masked_points import masked_points
from bertjax.objectives.part_segmentation import part_segmentation
from bertjax.objectives.point_classification import point_classification
from bertjax.objectives.point_reconstruction import (
  PointReconstruction,
  point_reconstruction,
)

# A builder's `encoder` is annotated with the kind of model that it can train.
OBJECTIVES: dict[str, Callable[..., nn.Module]] = {
  "left_to_right_lm": left_to_right_lm,
  "masked_lm": masked_lm,
  "masked_points": masked_points,
  "point_reconstruction": point_reconstruction,
  "part_segmentation": part_segmentation,
  "point_classification": point_classification,
  **FINE_TUNING,
}


def build_objective(spec: Mapping[str, Any], encoder: nn.Module) -> nn.Module:
  """A row of `OBJECTIVES` for a model.

  Args:
    spec: `config.objective`.
    encoder: what is trained.

  Raises:
    ValueError: unknown name or option, or another kind of model.
  """
  if (name := spec.get("name")) in OBJECTIVES:
    parameter = inspect.signature(OBJECTIVES[name]).parameters["encoder"]
    if not isinstance(encoder, parameter.annotation):
      raise ValueError(
        f"objective.name={name!r} trains a model of the kind"
        f" {parameter.annotation.__name__}; model.name gives a"
        f" {type(encoder).__name__}."
      )
  return registry.build(OBJECTIVES, spec, "objective", encoder=encoder)


__all__ = [
  "OBJECTIVES",
  "LeftToRightLM",
  "MaskedLM",
  "PointReconstruction",
  "build_objective",
  "left_to_right_lm",
  "masked_lm",
  "point_reconstruction",
]
