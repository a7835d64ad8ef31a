"""Published model folders: read them, write them, without torch.

Hugging Face's layout (config.json, weights, tokenizer) and that of the original
BERT releases (bert_config.json, bert_model.ckpt.*, vocab.txt).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn

from bertjax import registry
from bertjax.data.tokenizers import Tokenizer, load_tokenizer
from bertjax.interop import heads as heads_lib
from bertjax.interop import model_spec, names, tensors, tf1
from bertjax.models import MODELS
from bertjax.objectives import OBJECTIVES

CONFIG = "config.json"
PREPROCESS = "preprocess.json"  # ours: no published layout has such a file
DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
}
# Files that tell that a folder holds a tokenizer; see `load_tokenizer`.
_TOKENIZER_FILES = ("manifest.json", "tokenizer.json", "vocab.txt",
                    "vocab.json", "spiece.model", "spm.model",
                    "sentencepiece.bpe.model")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
  """What a published folder holds.

  Attributes:
    spec: our `config.model`, every dimension written out.
    objective: our `config.objective`.
    params: our parameter tree, float32; heads that are absent are left out.
    tokenizer: None if the folder has none.
    dtype: name of the floating point type of the weights in the file.
    extra: further collections, such as averages of BatchNorm.
  """

  spec: dict[str, Any]
  objective: dict[str, Any]
  params: dict[str, Any]
  tokenizer: Tokenizer | None
  dtype: str
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_ALL_HEADS = {"name": "masked_lm", "pair_task": "nsp"}


def parameter_shapes(
  spec: Mapping[str, Any], objective: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
  """Shapes of a model's parameters, layers apart, by name.

  Args:
    spec: `config.model`.
    objective: `config.objective`; None: a masked LM with every head.
  """
  encoder = registry.build(MODELS, {**spec, "scan": True}, "model")
  module = registry.build(
    OBJECTIVES, objective or _ALL_HEADS, "objective", encoder=encoder
  )
  batch = {"tokens": jnp.zeros((1, 1), jnp.int32)}
  variables = jax.eval_shape(
    lambda key: module.init(key, batch, method="outputs"), jax.random.key(0)
  )
  shapes = {}
  for name, leaf in names.flatten(nn.meta.unbox(variables["params"])).items():
    if name.startswith("encoder/layers/"):
      for i in range(encoder.num_layers):
        apart = name.replace("encoder/layers/", f"encoder/layers_{i}/", 1)
        shapes[apart] = tuple(leaf.shape[1:])
    else:
      shapes[name] = tuple(leaf.shape)
  return shapes


def read_tokenizer(folder: pathlib.Path) -> Tokenizer | None:
  """The folder's tokenizer, or None if it has no file of one."""
  if any((folder / name).exists() for name in _TOKENIZER_FILES):
    return load_tokenizer(folder)
  return None


def read_preprocess(folder: pathlib.Path) -> list[Any]:
  """What texts must go through, as `bertjax.convert` wrote it; often []."""
  path = folder / PREPROCESS
  return read_json(path)["preprocess"] if path.exists() else []


def tensor_names(folder: str | os.PathLike) -> list[str]:
  """Names of the tensors of a published folder of either layout."""
  folder = pathlib.Path(folder)
  if (folder / tf1.CONFIG).exists():
    return sorted(tf1.read_checkpoint(folder))
  return sorted(tensors.read_weights(folder))


def read_huggingface(
  folder: str | os.PathLike, *, scan: bool = True, ignore: Sequence[str] = ()
) -> Published:
  """A folder of `save_pretrained` as our spec, parameters and tokenizer.

  Args:
    folder: with config.json and weights in one of `tensors.WEIGHT_FILES`.
    scan: stack the layers' parameters.
    ignore: regexes of tensors to leave out, such as "^classifier".

  Raises:
    ValueError: the folder does not hold a model that is ours.
  """
  folder = pathlib.Path(folder)
  config = read_json(folder / CONFIG)
  spec = model_spec.spec_from_config(config, str(folder / CONFIG))
  family = spec["name"]
  objective = heads_lib.objective_from_config(
    config, family, str(folder / CONFIG)
  )
  tuned = objective["name"] in heads_lib.HEADS
  found = tensors.read_weights(folder)
  params = names.from_published(
    found,
    names.name_map(family, objective["name"]),
    parameter_shapes(spec, objective if tuned else None),
    num_layers=spec["num_layers"],
    scan=scan,
    ignore=ignore,
    where=str(folder),
  )
  model_spec.refuse_other_head(spec, names.heads_of(params), str(folder))
  return Published(
    spec | ({} if scan else {"scan": False}),
    _with_heads(objective, params, config),
    params,
    read_tokenizer(folder),
    _weight_dtype(found),
  )


def _with_heads(
  objective: Mapping[str, Any],
  params: Mapping[str, Any],
  config: Mapping[str, Any],
) -> dict[str, Any]:
  """The objective, or masked LM if the heads of another one were left out."""
  head = heads_lib.HEADS.get(objective["name"])
  if head is not None and head.part in params:
    return dict(objective)
  return heads_lib.pre_training(config, params)


def read_tf1(
  folder: str | os.PathLike, *, scan: bool = True, ignore: Sequence[str] = ()
) -> Published:
  """A folder of the original BERT releases; needs TensorFlow.

  Raises:
    ValueError: the folder does not hold such a model.
    ImportError: TensorFlow is not installed.
  """
  folder = pathlib.Path(folder)
  config = read_json(folder / tf1.CONFIG)
  spec = tf1.spec_from_config(config, str(folder))
  found = tf1.read_checkpoint(folder)
  objective = tf1.objective_of(config, found)
  tuned = objective["name"] in heads_lib.HEADS
  params = names.from_published(
    found,
    names.tf1_map(objective["name"]),
    parameter_shapes(spec, objective if tuned else None),
    num_layers=spec["num_layers"],
    scan=scan,
    ignore=ignore,
    where=str(folder),
  )
  return Published(
    spec | ({} if scan else {"scan": False}),
    _with_heads(objective, params, config),
    params,
    read_tokenizer(folder),
    _weight_dtype(found),
  )


def write_huggingface(
  folder: str | os.PathLike,
  spec: Mapping[str, Any],
  params: Mapping[str, Any],
  tokenizer: Tokenizer | None,
  *,
  objective: Mapping[str, Any] = heads_lib.MASKED_LM,
  dtype: str = "float32",
) -> None:
  """Writes what `transformers` reads with `from_pretrained`.

  config.json, model.safetensors, the tokenizer's files and a model card. The
  tensors of `decoder` repeat others and are not written, as in `transformers`.

  Args:
    folder: new or empty.
    spec: `config.model` with `vocab_size`.
    params: our parameter tree, scanned or not.
    tokenizer: None writes a model without one.
    objective: `config.objective`, which names the head and its labels.
    dtype: key of `DTYPES`; 16-bit types round what did not come in them.

  Raises:
    ValueError: the folder is not empty, or the model has no published form.
  """
  stored = registry.lookup(DTYPES, dtype, "dtype")
  spec = model_spec.resolve(spec)
  family_pad = {"bert": 0, "roberta": 1}.get(spec["name"], 0)
  pad_id = family_pad if tokenizer is None else tokenizer.pad_id
  heads = names.heads_of(params)
  config = model_spec.config_from_spec(spec, heads, pad_id)
  config |= heads_lib.config_of_pairs(objective)
  if objective["name"] in heads_lib.HEADS:
    config |= heads_lib.config_from_objective(objective, spec["name"])
  if tokenizer is not None:
    config |= {"bos_token_id": None, "eos_token_id": None}
    if spec["name"] == "roberta":
      config["bos_token_id"] = tokenizer.cls_id
      config["eos_token_id"] = tokenizer.sep_id
  config["dtype"] = dtype
  named = names.to_published(
    params,
    names.name_map(spec["name"], objective["name"]),
    num_layers=spec["num_layers"],
  )
  named = {k: v.astype(stored) for k, v in named.items()}
  if config["architectures"] in (["BertModel"], ["RobertaModel"]):
    # `transformers` stores a model without heads without its prefix.
    named = {k.removeprefix(f"{spec['name']}."): v for k, v in named.items()}
  files = {} if tokenizer is None else tokenizer_files(tokenizer, spec)
  folder = new_folder(folder)
  write_json(folder / CONFIG, config)
  tensors.write_safetensors(named, folder / "model.safetensors")
  for name, content in files.items():
    (folder / name).write_bytes(content)
  (folder / "README.md").write_text(model_card(config, params, tokenizer))


def write_tf1(
  folder: str | os.PathLike,
  spec: Mapping[str, Any],
  params: Mapping[str, Any],
  tokenizer: Tokenizer | None,
  objective: Mapping[str, Any] = heads_lib.MASKED_LM,
) -> None:
  """Writes the layout of the original BERT releases; needs TensorFlow.

  A fine-tuned model gets the variables of run_classifier.py or run_squad.py.

  Raises:
    ValueError: the folder is not empty, or the model has no such form.
    ImportError: TensorFlow is not installed.
  """
  spec = model_spec.resolve(spec)
  pad_id = 0 if tokenizer is None else tokenizer.pad_id
  config = tf1.config_from_spec(spec, names.heads_of(params), pad_id)
  config |= heads_lib.config_of_pairs(objective)
  config |= tf1.config_of_objective(objective)
  arrays = names.to_published(
    params,
    names.tf1_map(objective["name"]),
    num_layers=spec["num_layers"],
  )
  if objective["name"] == "span_qa":
    arrays = tf1.with_unused_pooler(arrays, spec["emb_dim"])
  folder = new_folder(folder)
  tf1.write_checkpoint(arrays, folder)
  write_json(folder / tf1.CONFIG, config)
  if tokenizer is not None:
    for name, content in tokenizer.files().items():
      (folder / name).write_bytes(content)


def tokenizer_files(
  tokenizer: Tokenizer, spec: Mapping[str, Any]
) -> dict[str, bytes]:
  """Files from which `AutoTokenizer` makes a tokenizer equal to ours.

  Ours adds [CLS] and [SEP] when rows are made, theirs while encoding, so
  tokenizer.json gets the template.

  Raises:
    ValueError: a kind that the `tokenizers` library cannot run.
  """
  files = dict(tokenizer.files())
  if "tokenizer.json" not in files:
    raise ValueError(
      "This tokenizer has no tokenizer.json, which Hugging Face's AutoTokenizer"
      " needs: its SentencePiece model is not of type unigram, or treats"
      " whitespace in a way that the tokenizers library does not. Export the"
      " model with tokenizer=None (--tokenizer=false) and ship"
      f" {', '.join(sorted(files))}, which the sentencepiece library reads."
    )
  s = tokenizer.specials
  between = [s.sep, s.sep] if spec["name"] == "roberta" else [s.sep]
  second = int(spec["name"] == "bert" and spec["num_types"] > 1)

  def special(name: str, type_id: int = 0) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": type_id}}

  first = [special(s.cls), {"Sequence": {"id": "A", "type_id": 0}}]
  ids = {s.cls: tokenizer.cls_id, s.sep: tokenizer.sep_id}
  pipeline = json.loads(files["tokenizer.json"])
  pipeline["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [*first, special(s.sep)],
    "pair": [
      *first,
      *map(special, between),
      {"Sequence": {"id": "B", "type_id": second}},
      special(s.sep, second),
    ],
    "special_tokens": {
      name: {"id": name, "ids": [i], "tokens": [name]}
      for name, i in ids.items()
    },
  }
  files["tokenizer.json"] = _json_bytes(pipeline)
  config = json.loads(files.get("tokenizer_config.json", b"{}"))
  roles = {f"{r}_token": getattr(s, r) for r in s.order}
  extra = {"model_max_length": spec["max_positions"]}
  # A plain fast tokenizer leaves type ids out unless they are asked for.
  extra["model_input_names"] = ["input_ids", "attention_mask"]
  if second:
    extra["model_input_names"].insert(1, "token_type_ids")
  files["tokenizer_config.json"] = _json_bytes(config | roles | extra)
  files["special_tokens_map.json"] = _json_bytes(roles)
  return files


def model_card(
  config: Mapping[str, Any],
  params: Mapping[str, Any],
  tokenizer: Tokenizer | None,
) -> str:
  """README.md of an exported model."""
  kind = config["architectures"][0]
  count = sum(x.size for x in jax.tree.leaves(params))
  rows = {
    "architecture": kind,
    "parameters": f"{count:,}",
    "layers": config["num_hidden_layers"],
    "width": config["hidden_size"],
    "heads": config["num_attention_heads"],
    "longest input": config["max_position_embeddings"],
    "activation": config["hidden_act"],
    "weights": config["dtype"],
  }
  if heads_lib.PAIR_TASK in config:
    rows["seq_relationship"] = f"{config[heads_lib.PAIR_TASK]}, not NSP"
  if tokenizer is not None:
    rows["tokenizer"] = f"{tokenizer.kind}, {tokenizer.vocab_size:,} pieces"
    rows["tokenizer fingerprint"] = tokenizer.fingerprint()
  table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
  suffix = kind.removeprefix("Bert").removeprefix("Roberta")
  loader = "AutoModel" + suffix.removeprefix("Model")
  tags = {head.suffix: head.tag for head in heads_lib.HEADS.values()}
  tag = "fill-mask" if "mlm_head" in params else "feature-extraction"
  tag = tags.get(suffix, tag)
  return (
    f"---\nlibrary_name: transformers\npipeline_tag: {tag}\n"
    "tags: [bertjax, jax, bert]\n---\n\n"
    f"# {kind} exported by bertjax\n\n| | |\n|---|---|\n{table}\n\n"
    "```python\n"
    f"from transformers import AutoTokenizer, {loader}\n\n"
    'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
    f'model = {loader}.from_pretrained("THIS_FOLDER")\n```\n\n'
    "Not stated by the exporter: training data, licence, intended use and"
    " evaluation. Add them before publishing.\n"
  )


def new_folder(folder: str | os.PathLike) -> pathlib.Path:
  """Creates a folder; ValueError if it holds something."""
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} is not empty; name a new folder.")
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; ValueError naming the file otherwise."""
  try:
    value = json.loads(path.read_bytes())
  except FileNotFoundError as err:
    raise ValueError(f"{path} is missing.") from err
  except ValueError as err:
    raise ValueError(f"{path} is not JSON: {err}") from err
  if not isinstance(value, dict):
    raise ValueError(f"{path} is not a JSON object.")
  return value


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON object with sorted keys."""
  path.write_bytes(_json_bytes(value))


def _json_bytes(value: Any) -> bytes:
  text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
  return (text + "\n").encode()


def _weight_dtype(found: Mapping[str, np.ndarray]) -> str:
  """The type of the floating point weights; float32 if they differ."""
  present = {x.dtype.name for x in found.values() if x.dtype in DTYPES.values()}
  return present.pop() if len(present) == 1 else "float32"
