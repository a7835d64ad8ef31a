"""Checkpoints of the original BERT code (TensorFlow 1 names).

Without TensorFlow, `names.from_published(arrays, names.TF1, ...)` takes any
dict of arrays by variable name, and `names.to_published` makes one.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from bertjax.interop import heads, model_spec

CONFIG = "bert_config.json"
CHECKPOINT = "bert_model.ckpt"
# The original's "gelu" is the tanh form, that of Hugging Face the erf form.
# This key keeps a model of the latter what it is when we read it again.
_EXACT = "bertjax_activation"
# Nor does it say what a fine-tuned head is called and how it was trained.
_OBJECTIVE = "bertjax_objective"
_CLASSES, _SPAN = "output_weights", "cls/squad/output_weights"


def _tensorflow():
  try:
    import tensorflow as tf
  except ImportError as err:
    raise ImportError(
      "TensorFlow checkpoints need TensorFlow: pip install 'bertjax[tfds]'."
    ) from err
  return tf


def read_checkpoint(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Variables by name of the one checkpoint in a folder.

  Raises:
    ValueError: there is none, or more than one.
  """
  found = sorted(folder.glob("*.ckpt*.index"))
  if len(found) != 1:
    raise ValueError(
      f"{folder} holds {len(found)} TensorFlow checkpoints (*.ckpt*.index);"
      " it must hold one."
    )
  reader = _tensorflow().train.load_checkpoint(str(found[0].with_suffix("")))
  wanted = reader.get_variable_to_shape_map()
  return {name: np.asarray(reader.get_tensor(name)) for name in wanted}


def write_checkpoint(
  arrays: Mapping[str, np.ndarray], folder: pathlib.Path
) -> None:
  """Writes variables as `bert_model.ckpt`, readable by the original code."""
  tf = _tensorflow()
  v1 = tf.compat.v1
  with tf.Graph().as_default(), v1.Session() as session:
    variables, feed = [], []
    for name, value in sorted(arrays.items()):
      source = v1.placeholder(value.dtype, value.shape)
      variables.append(v1.Variable(source, name=name, use_resource=False))
      feed.append((source, value))
    session.run([v.initializer for v in variables], dict(feed))
    v1.train.Saver(variables).save(
      session, str(folder / CHECKPOINT), write_meta_graph=False
    )


def spec_from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Our `config.model` of a bert_config.json."""
  config = dict(config)
  exact = config.pop(_EXACT, None)
  config.pop(_OBJECTIVE, None)
  if config.get("hidden_act") == "gelu":
    config["hidden_act"] = "gelu_new"
  spec = model_spec.spec_from_config(config, f"{where}/{CONFIG}")
  return spec | ({"activation": exact} if exact else {})


def objective_of(
  config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Our `config.objective` of a checkpoint, by the head that it has.

  Args:
    config: its bert_config.json, where we put labels and dropout; the original
      code has neither.
    arrays: variables by name.
  """
  if _CLASSES in arrays:
    count = len(arrays[_CLASSES])
    found = {"name": "classification", "num_classes": count}
  elif _SPAN in arrays:
    found = {"name": "span_qa"}
  else:
    return dict(heads.MASKED_LM)
  said = config.get(_OBJECTIVE, {})
  return found | said if said.get("name") == found["name"] else found


def config_of_objective(objective: Mapping[str, Any]) -> dict[str, Any]:
  """What bert_config.json says of a head; {} of those of pre-training.

  Raises:
    ValueError: a head that the original code does not have.
  """
  name = objective["name"]
  if name not in heads.HEADS:
    return {}
  single = objective.get("num_classes", 2) > 1
  single = single and not objective.get("multilabel")
  if name not in ("classification", "span_qa") or not single:
    raise ValueError(
      f"objective {dict(objective)}: the original code has classification with"
      " one of two classes or more, and span_qa; use --format=huggingface."
    )
  return {_OBJECTIVE: dict(objective)}


def with_unused_pooler(
  arrays: Mapping[str, np.ndarray], width: int
) -> dict[str, np.ndarray]:
  """The variables with a pooler of zeros, if there is none.

  The original graph always has one and wants it restored, also where the head
  does not look at it.
  """
  kernel = np.zeros((width, width), np.float32)
  pooler = {"kernel": kernel, "bias": kernel[0]}
  return {f"bert/pooler/dense/{k}": v for k, v in pooler.items()} | dict(arrays)


def config_from_spec(
  spec: Mapping[str, Any], heads: frozenset[str], pad_id: int
) -> dict[str, Any]:
  """The bert_config.json of a resolved `config.model`.

  Raises:
    ValueError: a model that the original code does not have.
  """
  if spec["name"] != "bert" or spec["epsilon"] != 1e-12:
    raise ValueError(
      f"model.name={spec['name']!r} with epsilon={spec['epsilon']}: the"
      " original code has 'bert' with 1e-12 only; use --format=huggingface."
    )
  allowed = ("gelu", "gelu_tanh", "relu", "tanh")
  if spec["activation"] not in allowed:
    raise ValueError(
      f"model.activation={spec['activation']!r}: the original code has"
      f" {', '.join(allowed)}."
    )
  config = model_spec.config_from_spec(spec, heads, pad_id)
  fields = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads"
    " intermediate_size max_position_embeddings type_vocab_size hidden_act"
    " hidden_dropout_prob attention_probs_dropout_prob initializer_range"
  )
  kept = {k: config[k] for k in fields.split()}
  if spec["activation"] == "gelu":
    logging.warning(
      "This model uses the erf form of GELU; the original code will use its"
      " tanh form, which moves logits by about 1e-4."
    )
    kept[_EXACT] = "gelu"
  if kept["hidden_act"] == "gelu_new":
    kept["hidden_act"] = "gelu"
  return kept
