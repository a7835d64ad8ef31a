"""Training objectives by name."""

from collections.abc import Callable

import flax.linen as nn

from bertjax.objectives.fine_tuning import FINE_TUNING
from bertjax.objectives.left_to_right import LeftToRightLM, left_to_right_lm
from bertjax.objectives.masked_lm import MaskedLM, masked_lm

OBJECTIVES: dict[str, Callable[..., nn.Module]] = {
  "left_to_right_lm": left_to_right_lm,
  "masked_lm": masked_lm,
  **FINE_TUNING,
}

__all__ = [
  "OBJECTIVES",
  "LeftToRightLM",
  "MaskedLM",
  "left_to_right_lm",
  "masked_lm",
]
