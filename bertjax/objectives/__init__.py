"""Training objectives by name."""

from collections.abc import Callable

import flax.linen as nn

from bertjax.objectives.masked_lm import MaskedLM, masked_lm

OBJECTIVES: dict[str, Callable[..., nn.Module]] = {"masked_lm": masked_lm}

__all__ = ["OBJECTIVES", "MaskedLM", "masked_lm"]
