"""A trained model from wherever it is: a workdir of ours or a published folder.

model = load_model("runs/quickstart")
model = load_model("all-MiniLM-L6-v2", dtype=jnp.bfloat16)
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from bertjax import interop, registry
from bertjax.checkpoint import load_variables, located, parts_with
from bertjax.data.sources import text_function
from bertjax.data.tokenizers import Tokenizer, load_tokenizer
from bertjax.interop import model_spec, names, point_bert_files, published, tf1
from bertjax.models import MODELS
from bertjax.objectives import build_objective

WORKDIR, HUGGINGFACE, TF1 = "workdir", "huggingface", "tf1"
POINT_BERT = "point_bert"
_PUBLISHED = {
  HUGGINGFACE: published.read_huggingface,
  TF1: published.read_tf1,
  POINT_BERT: point_bert_files.read,
}
# What `bertjax.predict` does with models of clouds, by objective.
_CLOUD_TASKS = {
  "part_segmentation": "segment_points",
  "point_classification": "classify_points",
  "point_reconstruction": "tokenize_points",
}


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
  """A model ready for use.

  Attributes:
    objective: the linen module that owns encoder and heads.
    params: its parameters; heads that the source lacks are left out.
    tokenizer: None if the folder has none.
    spec: `config.model`, every dimension and default written out.
    objective_spec: `config.objective`.
    origin: "workdir", "huggingface", "tf1" or "point_bert".
    config: the run's whole config; None for published models.
    path: where it came from.
    preprocess: `config.data.preprocess`, what texts must go through.
    extra: further collections, such as the averages of batch norms.
  """

  objective: nn.Module
  params: Any
  tokenizer: Tokenizer | None
  spec: dict[str, Any]
  objective_spec: dict[str, Any]
  origin: str
  config: dict[str, Any] | None
  path: str
  preprocess: Sequence[Any] = ()
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def variables(self) -> dict[str, Any]:
    """All collections, as `objective.apply` takes them."""
    return {"params": self.params, **self.extra}

  @functools.cached_property
  def clean(self) -> Callable[[str], str]:
    """Makes of a text what the model was trained on."""
    return text_function(self.preprocess, "data.preprocess")

  @property
  def heads(self) -> frozenset[str]:
    """Names of the parts beside the encoder."""
    return names.heads_of(self.params)

  @property
  def max_positions(self) -> int:
    """The longest row; ValueError if the model reads no texts."""
    self.need_text()
    return self.spec["max_positions"]

  @property
  def num_parameters(self) -> int:
    """Number of values in `params`."""
    return sum(x.size for x in jax.tree.leaves(self.params))

  def need_text(self) -> None:
    """Raises ValueError if the model reads clouds of points."""
    if "max_positions" not in self.spec:
      task = _CLOUD_TASKS.get(self.objective_spec["name"])
      raise ValueError(
        f"{self.path} reads clouds of points, not texts;"
        + (f" it is for {task}." if task else " no task uses it as it is.")
      )

  def need_tokenizer(self) -> Tokenizer:
    """The tokenizer; ValueError if the folder had none, or reads no texts."""
    if self.tokenizer is None:
      self.need_text()
      raise ValueError(
        f"{self.path} holds no tokenizer; put its vocab.txt or tokenizer.json"
        " there."
      )
    return self.tokenizer

  def need_head(self, head: str, task: str) -> None:
    """Raises ValueError if the model lacks a head."""
    if head not in self.params:
      raise ValueError(
        f"{self.path} has no {head}, which {task} needs; it has the encoder"
        f" and {', '.join(sorted(self.heads)) or 'no head'}."
      )


def origin_of(path: str | os.PathLike) -> str:
  """Which kind of model folder, or file, this is.

  A grid and a run of stages are what `checkpoint.located` finds there.

  Raises:
    ValueError: none that is known.
  """
  folder = _located(path)
  if point_bert_files.is_file(folder):
    return POINT_BERT
  if not folder.is_dir():
    raise ValueError(
      f"{folder} is not a folder; name a workdir or a published model's folder"
      " (bertjax downloads nothing)."
    )
  if (folder / tf1.CONFIG).exists() and any(folder.glob("*.ckpt*.index")):
    return TF1
  if (folder / "checkpoints").is_dir():
    return WORKDIR
  if any((folder / name).exists() for name in interop.WEIGHT_FILES):
    return HUGGINGFACE
  if parts := parts_with(folder, "checkpoints"):
    raise ValueError(
      f"{folder} holds no model itself, as a grid or a run of stages does once"
      f" a part has come to its end; name a part of it: {names.listed(parts)}."
    )
  raise ValueError(
    f"{folder} holds no model: it has neither checkpoints/ (a workdir of"
    f" bertjax), nor {published.CONFIG} with {next(iter(interop.WEIGHT_FILES))}"
    f" or another weight file (Hugging Face), nor {tf1.CONFIG} with a"
    " TensorFlow checkpoint."
  )


def _located(path: str | os.PathLike) -> pathlib.Path:
  return pathlib.Path(located(path))


@dataclasses.dataclass(frozen=True)
class SavedModel:
  """What a model folder holds; attributes as those of `LoadedModel`."""

  origin: str
  params: Any
  tokenizer: Tokenizer | None
  spec: dict[str, Any]
  objective_spec: dict[str, Any]
  config: dict[str, Any] | None = None
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_model(
  path: str | os.PathLike,
  *,
  step: int | None = None,
  scan: bool | None = None,
  ignore: Sequence[str] = (),
) -> SavedModel:
  """Reads what `load_model` makes a model of; arguments as there.

  `scan` concerns models with a stack of layers alone.

  Raises:
    ValueError: the folder holds no model, or one that is not ours.
    CheckpointError: all checkpoints of the workdir are damaged.
  """
  origin, path = origin_of(path), _located(path)
  if origin == WORKDIR:
    if ignore:
      raise ValueError(f"ignore={list(ignore)!r} is for published folders.")
    return _read_workdir(path, step, scan)
  if step is not None:
    raise ValueError(f"step={step}: {path} is not a workdir.")
  found = _PUBLISHED[origin](path, scan=scan is not False, ignore=ignore)
  spec = model_spec.resolve(found.spec)
  if "scan" in spec:
    spec["scan"] = names.is_scanned(found.params)
  return SavedModel(
    origin,
    found.params,
    found.tokenizer,
    spec,
    found.objective,
    extra=found.extra,
  )


def _read_workdir(
  path: pathlib.Path, step: int | None, scan: bool | None
) -> SavedModel:
  extra, config = load_variables(path, step)
  params = extra.pop("params")
  for field in ("model", "objective"):
    if field not in config:
      raise ValueError(
        f"{path}: the checkpoint's config has no {field!r}; it is not one of"
        " bertjax.train."
      )
  spec = _resolved(config["model"], params)
  if "scan" in spec:
    if scan is not None:
      params = with_scan(params, spec["num_layers"], scan)
    spec["scan"] = names.is_scanned(params)
  folder = path / "tokenizer"
  tokenizer = load_tokenizer(folder) if folder.is_dir() else None
  return SavedModel(
    WORKDIR, params, tokenizer, spec, dict(config["objective"]), config, extra
  )


def _resolved(model: Mapping[str, Any], params: Any) -> dict[str, Any]:
  """A run's `config.model`, every dimension and default written out."""
  if "token" in params["encoder"].get("embeddings", {}):
    vocab_size = len(params["encoder"]["embeddings"]["token"]["embedding"])
    model = {**model, "vocab_size": vocab_size}
  return model_spec.resolve(model)


@dataclasses.dataclass(frozen=True)
class Description:
  """What a model folder says of itself.

  Attributes:
    spec: `config.model`.
    tokenizer: folder of its tokenizer; None if it has none.
    preprocess: `config.data.preprocess`.
  """

  spec: dict[str, Any]
  tokenizer: pathlib.Path | None
  preprocess: Sequence[Any] = ()


def describe(path: str | os.PathLike) -> Description:
  """Model, tokenizer and text functions of a folder, without the weights.

  Raises:
    ValueError: the folder holds no model, or one that is not ours.
  """
  origin, folder = origin_of(path), _located(path)
  if origin == WORKDIR:
    config = published.read_json(folder / "config.json")
    tokenizer = folder / "tokenizer"
    return Description(
      config.get("model", {}),
      tokenizer if tokenizer.is_dir() else None,
      _preprocess(folder, config),
    )
  if origin == POINT_BERT:
    return Description(point_bert_files.describe(folder), None)
  if origin == TF1:
    config = published.read_json(folder / tf1.CONFIG)
    spec = tf1.spec_from_config(config, str(folder))
  else:
    where = folder / published.CONFIG
    spec = model_spec.spec_from_config(published.read_json(where), str(where))
  has_one = published.read_tokenizer(folder) is not None
  return Description(
    spec, folder if has_one else None, _preprocess(folder, None)
  )


def _preprocess(
  folder: pathlib.Path, config: Mapping[str, Any] | None
) -> Sequence[Any]:
  """`data.preprocess` of a run's config, or of a published folder."""
  if config is None:
    return published.read_preprocess(folder)
  return config.get("data", {}).get("preprocess", ())


def load_model(
  path: str | os.PathLike,
  *,
  dtype: Dtype = jnp.float32,
  step: int | None = None,
  scan: bool | None = None,
  ignore: Sequence[str] = (),
  **options: Any,
) -> LoadedModel:
  """Reads a model with what belongs to it.

  Args:
    path: a workdir (of a grid its best run counts, of stages the last one that
      came to its end), a Hugging Face folder, an original BERT release, or a
      file of Point-BERT's.
    dtype: compute dtype. With bfloat16 the matrices and the token table are
      cast once, here; the rest stays float32.
    step: which checkpoint of a workdir; by default the best by the run's
      `keep.best_metric`, or else the newest intact one.
    scan: whether layers are stacked; by default as saved, or stacked.
    ignore: regexes of published tensors that may be left out.
    **options: further options of `config.model` to replace, such as
      `keep_layers`; they must not change the parameters.

  Raises:
    ValueError: the folder holds no model, or one that is not ours.
    CheckpointError: all checkpoints of the workdir are damaged.
  """
  saved = read_model(path, step=step, scan=scan, ignore=ignore)
  tokenizer, spec = saved.tokenizer, saved.spec
  if scan and "scan" not in spec:
    raise ValueError(
      f"scan=True: model.name={spec['name']!r} of {path} has no stack of"
      " layers."
    )
  if tokenizer is not None and tokenizer.vocab_size > spec["vocab_size"]:
    raise ValueError(
      f"{path}: the tokenizer has {tokenizer.vocab_size} pieces, the model"
      f" {spec['vocab_size']} rows; they do not belong together."
    )
  return LoadedModel(
    objective=_objective(spec | options, saved.objective_spec, dtype),
    params=jax.tree.map(jnp.asarray, cast_matrices(saved.params, dtype)),
    tokenizer=tokenizer,
    spec=spec,
    objective_spec=saved.objective_spec,
    origin=saved.origin,
    config=saved.config,
    path=str(path),
    preprocess=_preprocess(_located(path), saved.config),
    extra=jax.tree.map(jnp.asarray, dict(saved.extra)),
  )


def _objective(
  spec: Mapping[str, Any], objective_spec: Mapping[str, Any], dtype: Dtype
) -> nn.Module:
  encoder = registry.build(MODELS, spec, "model", dtype=dtype)
  return build_objective(objective_spec, encoder)


def in_memory(
  objective: nn.Module,
  params: Any,
  tokenizer: Tokenizer,
  config: Mapping[str, Any],
) -> LoadedModel:
  """The model of a run under way, on one device.

  Args:
    objective: of the run.
    params: its parameters, all of them addressable from this process.
    tokenizer: of its data.
    config: its whole config.
  """
  host = jax.device_get(params)
  return LoadedModel(
    objective=objective,
    params=jax.tree.map(jnp.asarray, host),
    tokenizer=tokenizer,
    spec=_resolved(config["model"], host),
    objective_spec=dict(config["objective"]),
    origin=WORKDIR,
    config=dict(config),
    path="the run in memory",
    preprocess=config.get("data", {}).get("preprocess", ()),
  )


def cast_matrices(params: Any, dtype: Dtype) -> Any:
  """Kernels and the token table in the compute dtype.

  They are cast before every product anyway. Norms, biases and the tables that
  are only added stay as they are.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return params
  flat = names.flatten(params)
  for name, leaf in flat.items():
    if re.search(r"(kernel|token/embedding)$", name):
      flat[name] = np.asarray(leaf).astype(jnp.dtype(dtype))
  return names.nest(flat)


def with_scan(
  params: Mapping[str, Any], num_layers: int, scan: bool
) -> dict[str, Any]:
  """The tree with its layers stacked or apart, as numpy arrays."""
  params = jax.tree.map(np.asarray, params)
  if names.is_scanned(params) == scan:
    return params
  apart = names.unstacked(params, num_layers)
  return names.nest(names.stacked(apart, num_layers) if scan else apart)
