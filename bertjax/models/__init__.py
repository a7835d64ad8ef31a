"""Encoders by name."""

from collections.abc import Callable

from bertjax.models.bert import bert, roberta
from bertjax.models.encoder import Encoded, Encoder, HeadStyle

MODELS: dict[str, Callable[..., Encoder]] = {"bert": bert, "roberta": roberta}

__all__ = ["MODELS", "Encoded", "Encoder", "HeadStyle", "bert", "roberta"]
