"""Models by name."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype

from bertjax.models.bert import bert, left_to_right_bert, roberta
from bertjax.models.encoder import Encoded, Encoder, HeadStyle
from bertjax.models.point_bert import point_tokenizer
from bertjax.models.point_bert.trunk import point_bert as point_bert_trunk

MODELS: dict[str, Callable[..., nn.Module]] = {
  "bert": bert,
  "left_to_right_bert": left_to_right_bert,
  "point_tokenizer": point_tokenizer,
  "point_bert": point_bert_trunk,
  "roberta": roberta,
}

# What a model may compute in; its parameters are float32.
DTYPES: dict[str, Dtype] = {
  "float32": jnp.float32,
  "bfloat16": jnp.bfloat16,
  "float16": jnp.float16,
}

__all__ = [
  "DTYPES",
  "MODELS",
  "Encoded",
  "Encoder",
  "HeadStyle",
  "bert",
  "left_to_right_bert",
  "point_tokenizer",
  "roberta",
]
