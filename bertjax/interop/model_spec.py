"""config.json of published models <-> our `config.model`."""

import inspect
from collections.abc import Mapping
from typing import Any

from bertjax.models import MODELS
from bertjax.models.bert import SIZES
from bertjax.registry import lookup

# Their hidden_act -> our activation. The first of equals is what we write.
ACTIVATION_NAMES = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
  "tanh": "tanh",
}
FAMILIES = ("bert", "roberta")

# Settings that change the network; the values with which it is still ours.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
  "position_embedding_type": ("absolute",),
  "is_decoder": (False,),
  "add_cross_attention": (False,),
  "tie_word_embeddings": (True,),
  "pruned_heads": ({}, None),
}
_FIELDS = {  # theirs -> ours; all of them required
  "vocab_size": "vocab_size",
  "num_hidden_layers": "num_layers",
  "hidden_size": "emb_dim",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
}


def resolve(spec: Mapping[str, Any]) -> dict[str, Any]:
  """A `config.model` with every dimension and default written out.

  What a config cannot hold (functions, dtypes) is left to the builder.
  """
  builder = lookup(MODELS, spec["name"], "model.name")
  parameters = inspect.signature(builder).parameters.values()
  plain = (str, int, float, bool, type(None))
  values = {
    p.name: p.default for p in parameters if isinstance(p.default, plain)
  }
  values |= spec
  if "size" not in values:
    return values  # of a model without published sizes
  for name, size in lookup(SIZES, values.pop("size"), "model.size").items():
    if values[name] is None:
      values[name] = size
  if values["mlp_dim"] is None:
    values["mlp_dim"] = 4 * values["emb_dim"]
  if values["attention_dropout_rate"] is None:
    values["attention_dropout_rate"] = values["dropout_rate"]
  return values


def spec_from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Our `config.model` of a published config.json.

  Args:
    config: its content; without `model_type` it counts as BERT, as in Google's
      releases.
    where: the file, for messages.

  Raises:
    ValueError: a missing field, or a setting that bertjax does not have.
  """
  family = config.get("model_type", "bert")
  if family not in FAMILIES:
    raise ValueError(
      f"{where}: model_type={family!r} is not supported; it must be one of"
      f" {', '.join(FAMILIES)}."
    )
  for key, allowed in _SUPPORTED.items():
    if key in config and config[key] not in allowed:
      raise ValueError(
        f"{where}: {key}={config[key]!r} is not supported; only"
        f" {allowed[0]!r} is."
      )
  needed = (*_FIELDS, "max_position_embeddings", "type_vocab_size")
  for key in needed:
    if key not in config:
      raise ValueError(f"{where}: {key} is missing.")
  activation = config.get("hidden_act", "gelu")
  # RoBERTa counts positions from the row after its padding token's.
  offset = config.get("pad_token_id", 1) + 1 if family == "roberta" else 0
  dropout = config.get("hidden_dropout_prob", 0.1)
  return dict(
    name=family,
    **{ours: config[theirs] for theirs, ours in _FIELDS.items()},
    max_positions=config["max_position_embeddings"] - offset,
    num_types=config["type_vocab_size"],
    position_offset=offset,
    activation=lookup(ACTIVATION_NAMES, activation, f"{where}: hidden_act"),
    epsilon=config.get("layer_norm_eps", 1e-12),
    dropout_rate=dropout,
    attention_dropout_rate=config.get("attention_probs_dropout_prob", dropout),
  )


def refuse_other_head(
  spec: Mapping[str, Any], heads: frozenset[str], where: str
) -> None:
  """RoBERTa's published head has the erf GELU, whatever the encoder has.

  Raises:
    ValueError: the model's head would not be the same function in both.
  """
  other = spec["activation"] != "gelu" and "mlm_head" in heads
  if spec["name"] == "roberta" and other:
    raise ValueError(
      f"{where}: with activation {spec['activation']!r} the head of Hugging"
      " Face's RoBERTa still has 'gelu', ours would not; only the encoder can"
      " be converted (leave out mlm_head / ignore=['^lm_head'])."
    )


def architecture(family: str, heads: frozenset[str]) -> str:
  """The class of `transformers` that has these heads.

  Raises:
    ValueError: there is none.
  """
  if family == "roberta":
    if "pair_head" in heads or {"mlm_head", "pooler"} <= heads:
      raise ValueError(
        "Hugging Face's RoBERTa has no model with the heads"
        f" {', '.join(sorted(heads))}; train with objective.pair_task=None."
      )
    return "RobertaForMaskedLM" if "mlm_head" in heads else "RobertaModel"
  if "pair_head" in heads:
    if not {"mlm_head", "pooler"} <= heads:
      return "BertForNextSentencePrediction"
    return "BertForPreTraining"
  return "BertForMaskedLM" if "mlm_head" in heads else "BertModel"


def config_from_spec(
  spec: Mapping[str, Any], heads: frozenset[str], pad_id: int
) -> dict[str, Any]:
  """The published config.json of a resolved `config.model`.

  Raises:
    ValueError: a setting that Hugging Face's BERT and RoBERTa do not have.
  """
  spec = resolve(spec)
  family = spec["name"]
  refuse_other_head(spec, heads, "model.activation")
  if family not in FAMILIES:
    raise ValueError(
      f"model.name={family!r} has no published form; only"
      f" {', '.join(FAMILIES)} can be exported."
    )
  if spec["norm"] != "post":
    raise ValueError(
      f"model.norm={spec['norm']!r}: Hugging Face's {family} is 'post' only."
    )
  if spec["positions"] != "absolute":
    raise ValueError(
      f"model.positions={spec['positions']!r}: Hugging Face's {family} has"
      " 'absolute' only."
    )
  if not spec["num_types"]:
    raise ValueError(
      f"model.num_types=0: Hugging Face's {family} always has a table of types;"
      " train with num_types=1."
    )
  offset = pad_id + 1 if family == "roberta" else 0
  if spec["position_offset"] != offset:
    raise ValueError(
      f"model.position_offset={spec['position_offset']}, but Hugging Face's"
      f" {family} has {offset} with a padding id of {pad_id}; use"
      + (
        " that." if family == "bert" else " that, or a tokenizer with pad_id 1."
      )
    )
  act = next(k for k, v in ACTIVATION_NAMES.items() if v == spec["activation"])
  return {
    "architectures": [architecture(family, heads)],
    "model_type": family,
    **{theirs: spec[ours] for theirs, ours in _FIELDS.items()},
    "max_position_embeddings": spec["max_positions"] + offset,
    "type_vocab_size": spec["num_types"],
    "hidden_act": act,
    "layer_norm_eps": spec["epsilon"],
    "hidden_dropout_prob": spec["dropout_rate"],
    "attention_probs_dropout_prob": spec["attention_dropout_rate"],
    "initializer_range": 0.02,
    "pad_token_id": pad_id,
    "tie_word_embeddings": True,
  }
