"""Training objectives by name."""

from collections.abc import Callable

import flax.linen as nn

from bertjax.objectives.fine_tuning import FINE_TUNING
from bertjax.objectives.masked_lm import MaskedLM, masked_lm

OBJECTIVES: dict[str, Callable[..., nn.Module]] = {
  "masked_lm": masked_lm,
  **FINE_TUNING,
}

__all__ = ["OBJECTIVES", "MaskedLM", "masked_lm"]
