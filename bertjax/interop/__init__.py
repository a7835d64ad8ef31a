"""Published checkpoints: names, files and configurations, both ways."""

from bertjax.interop.names import (
  BERT,
  ROBERTA,
  TF1,
  from_published,
  name_map,
  to_published,
)
from bertjax.interop.published import (
  Published,
  parameter_shapes,
  read_huggingface,
  read_tf1,
  write_huggingface,
  write_tf1,
)
from bertjax.interop.tensors import WEIGHT_FILES

__all__ = [
  "BERT",
  "ROBERTA",
  "TF1",
  "WEIGHT_FILES",
  "Published",
  "from_published",
  "name_map",
  "parameter_shapes",
  "read_huggingface",
  "read_tf1",
  "to_published",
  "write_huggingface",
  "write_tf1",
]
