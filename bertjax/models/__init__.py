"""Encoders by name."""

from collections.abc import Callable

from bertjax.models.bert import bert, left_to_right_bert, roberta
from bertjax.models.encoder import Encoded, Encoder, HeadStyle

MODELS: dict[str, Callable[..., Encoder]] = {
  "bert": bert,
  "left_to_right_bert": left_to_right_bert,
  "roberta": roberta,
}

__all__ = [
  "MODELS",
  "Encoded",
  "Encoder",
  "HeadStyle",
  "bert",
  "left_to_right_bert",
  "roberta",
]
