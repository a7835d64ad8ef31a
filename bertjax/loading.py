"""A trained model from wherever it is: a workdir of ours or a published folder.

model = load_model("runs/quickstart")
model = load_model("all-MiniLM-L6-v2", dtype=jnp.bfloat16)
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from bertjax import interop, registry
from bertjax.checkpoint import load_params
from bertjax.data.tokenizers import Tokenizer, load_tokenizer
from bertjax.interop import model_spec, names, published, tf1
from bertjax.models import MODELS
from bertjax.objectives import OBJECTIVES

if TYPE_CHECKING:
  from bertjax.experiment import Experiment

WORKDIR, HUGGINGFACE, TF1 = "workdir", "huggingface", "tf1"
_PUBLISHED = {HUGGINGFACE: published.read_huggingface, TF1: published.read_tf1}


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
  """A model ready for use.

  Attributes:
    objective: the linen module that owns encoder and heads.
    params: its parameters; heads that the source lacks are left out.
    tokenizer: None if the folder has none.
    spec: `config.model`, every dimension and default written out.
    objective_spec: `config.objective`.
    origin: "workdir", "huggingface" or "tf1".
    config: the run's whole config; None for published models.
    path: where it came from.
  """

  objective: nn.Module
  params: Any
  tokenizer: Tokenizer | None
  spec: dict[str, Any]
  objective_spec: dict[str, Any]
  origin: str
  config: dict[str, Any] | None
  path: str

  @property
  def heads(self) -> frozenset[str]:
    """Names of the parts beside the encoder."""
    return names.heads_of(self.params)

  @property
  def max_positions(self) -> int:
    """The longest row."""
    return self.spec["max_positions"]

  @property
  def num_parameters(self) -> int:
    """Number of values in `params`."""
    return sum(x.size for x in jax.tree.leaves(self.params))

  def need_tokenizer(self) -> Tokenizer:
    """The tokenizer; ValueError if the folder had none."""
    if self.tokenizer is None:
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
  """Which kind of model folder this is.

  Raises:
    ValueError: none that is known.
  """
  folder = pathlib.Path(path)
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
  raise ValueError(
    f"{folder} holds no model: it has neither checkpoints/ (a workdir of"
    f" bertjax), nor {published.CONFIG} with {next(iter(interop.WEIGHT_FILES))}"
    f" or another weight file (Hugging Face), nor {tf1.CONFIG} with a"
    " TensorFlow checkpoint."
  )


def _read_workdir(
  path: str | os.PathLike, step: int | None
) -> tuple[dict[str, Any], dict[str, Any], Tokenizer | None]:
  """Parameters, config and tokenizer of a run."""
  params, config = load_params(path, step)
  for field in ("model", "objective"):
    if field not in config:
      raise ValueError(
        f"{path}: the checkpoint's config has no {field!r}; it is not one of"
        " bertjax.train."
      )
  folder = pathlib.Path(path) / "tokenizer"
  return params, config, load_tokenizer(folder) if folder.is_dir() else None


@dataclasses.dataclass(frozen=True)
class Description:
  """What a model folder says of itself.

  Attributes:
    spec: `config.model`.
    tokenizer: folder of its tokenizer; None if it has none.
  """

  spec: dict[str, Any]
  tokenizer: pathlib.Path | None


def describe(path: str | os.PathLike) -> Description:
  """Model and tokenizer of a folder, without reading the weights.

  Raises:
    ValueError: the folder holds no model, or one that is not ours.
  """
  origin, folder = origin_of(path), pathlib.Path(path)
  if origin == WORKDIR:
    spec = published.read_json(folder / "config.json").get("model", {})
    tokenizer = folder / "tokenizer"
    return Description(spec, tokenizer if tokenizer.is_dir() else None)
  if origin == TF1:
    config = published.read_json(folder / tf1.CONFIG)
    spec = tf1.spec_from_config(config, str(folder))
  else:
    where = folder / published.CONFIG
    spec = model_spec.spec_from_config(published.read_json(where), str(where))
  has_one = published.read_tokenizer(folder) is not None
  return Description(spec, folder if has_one else None)


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
    path: a workdir, a Hugging Face folder, or an original BERT release.
    dtype: compute dtype. With bfloat16 the matrices and the token table are
      cast once, here; the rest stays float32.
    step: which checkpoint of a workdir; the newest intact one by default.
    scan: whether layers are stacked; by default as saved, or stacked.
    ignore: regexes of published tensors that may be left out.
    **options: further options of `config.model` to replace, such as
      `keep_layers`; they must not change the parameters.

  Raises:
    ValueError: the folder holds no model, or one that is not ours.
    CheckpointError: all checkpoints of the workdir are damaged.
  """
  origin = origin_of(path)
  config = None
  if origin == WORKDIR:
    if ignore:
      raise ValueError(f"ignore={list(ignore)!r} is for published folders.")
    params, config, tokenizer = _read_workdir(path, step)
    vocab_size = len(params["encoder"]["embeddings"]["token"]["embedding"])
    spec = model_spec.resolve({**config["model"], "vocab_size": vocab_size})
    objective_spec = dict(config["objective"])
    if scan is not None:
      params = with_scan(params, spec["num_layers"], scan)
  else:
    if step is not None:
      raise ValueError(f"step={step}: {path} is not a workdir.")
    found = _PUBLISHED[origin](path, scan=scan is not False, ignore=ignore)
    params, tokenizer = found.params, found.tokenizer
    spec = model_spec.resolve(found.spec)
    objective_spec = found.objective
  spec["scan"] = names.is_scanned(params)
  if tokenizer is not None and tokenizer.vocab_size > spec["vocab_size"]:
    raise ValueError(
      f"{path}: the tokenizer has {tokenizer.vocab_size} pieces, the model"
      f" {spec['vocab_size']} rows; they do not belong together."
    )
  return LoadedModel(
    objective=_objective(spec | options, objective_spec, dtype),
    params=jax.tree.map(jnp.asarray, cast_matrices(params, dtype)),
    tokenizer=tokenizer,
    spec=spec,
    objective_spec=objective_spec,
    origin=origin,
    config=config,
    path=str(path),
  )


def _objective(
  spec: Mapping[str, Any], objective_spec: Mapping[str, Any], dtype: Dtype
) -> nn.Module:
  encoder = registry.build(MODELS, spec, "model", dtype=dtype)
  return registry.build(
    OBJECTIVES, objective_spec, "objective", encoder=encoder
  )


def from_experiment(experiment: "Experiment", params: Any) -> LoadedModel:
  """The model of a run that is in memory, on one device.

  Args:
    experiment: the run.
    params: its parameters, all of them addressable from this process.
  """
  settings = experiment.settings
  host = jax.device_get(params)
  vocab_size = len(host["encoder"]["embeddings"]["token"]["embedding"])
  return LoadedModel(
    objective=experiment.objective,
    params=jax.tree.map(jnp.asarray, host),
    tokenizer=experiment.data.tokenizer,
    spec=model_spec.resolve({**settings.model, "vocab_size": vocab_size}),
    objective_spec=dict(settings.objective),
    origin=WORKDIR,
    config=settings.to_json(),
    path="the run in memory",
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


def load_params_for(
  path: str | os.PathLike,
  target: Any,
  *,
  fresh: Sequence[str] = (),
  renames: Sequence[tuple[str, str]] = (),
  allow_missing: Sequence[str] = (),
  ignore: Sequence[str] = (),
  step: int | None = None,
) -> Any:
  """Parameters of a saved or published model, fitted to another model's tree.

  Args:
    path: what `load_model` reads.
    target: the other model's parameters or their shapes.
    fresh: parts of the target that stay without value where the saved model has
      none. With any, heads of the saved model that the target lacks are left.
    renames: `(regex, replacement)`, applied in order with `re.sub` to the names
      of the saved parameters (in our spelling, layers as the target has them).
    allow_missing: regexes of target parameters that may stay without value.
    ignore: regexes of saved parameters (after renaming) or of published tensors
      that are left out.
    step: which checkpoint of a workdir.

  Returns:
    A tree like `target` of numpy arrays; None where `fresh` or `allow_missing`
    applies.

  Raises:
    ValueError: a parameter of either side that nothing explains, another shape,
      or a pattern that matches nothing.
  """
  wanted = names.flatten(target)
  scan = any(n.startswith("encoder/layers/") for n in wanted)
  origin = origin_of(path)
  skipped: set[str] = set()
  if origin == WORKDIR:
    params, config, _ = _read_workdir(path, step)
    # `num_layers` may come from `size`.
    num_layers = model_spec.resolve({"vocab_size": 0, **config["model"]})[
      "num_layers"
    ]
    params = with_scan(params, num_layers, scan)
  else:
    # Published tensors that `ignore` names never become parameters of ours.
    theirs = published.tensor_names(path)
    skipped = {p for p in ignore if names.matching(theirs, [p])}
    params = _PUBLISHED[origin](path, scan=scan, ignore=sorted(skipped)).params
  have: dict[str, np.ndarray] = {}
  for name, leaf in names.flatten(params).items():
    new = name
    for pattern, replacement in renames:
      new = re.sub(pattern, replacement, new)
    if new in have:
      raise ValueError(f"init_from.renames maps two parameters to {new!r}.")
    have[new] = np.asarray(leaf)
  names.refuse_unused(
    (p for p, _ in renames), names.flatten(params), "init_from.renames"
  )
  names.refuse_unused(
    (p for p in ignore if p not in skipped), have, "init_from.ignore"
  )
  names.refuse_unused(allow_missing, wanted, "init_from.allow_missing")
  for name in names.matching(have, ignore):
    del have[name]
  problems = []
  if fresh:
    others = set(names.HEADS) - set(target)
    have = {k: v for k, v in have.items() if k.split("/")[0] not in others}
  parts = {name.split("/")[0] for name in have}
  absent = {
    name
    for name in set(wanted) - set(have)
    if name.split("/")[0] not in set(fresh) - parts
  }
  if missing := absent - names.matching(absent, allow_missing):
    problems.append(
      f"it lacks {names.listed(missing)} (init_from.allow_missing)"
    )
  if extra := set(have) - set(wanted):
    problems.append(
      f"this model has no {names.listed(extra)} (init_from.ignore or renames)"
    )
  problems += _shape_problems(have, wanted, fresh)
  if problems:
    raise ValueError(
      f"{path} does not explain this model's parameters: "
      + "; ".join(problems)
      + "."
    )
  return names.nest({name: have.get(name) for name in wanted})


def _shape_problems(
  have: Mapping[str, np.ndarray],
  wanted: Mapping[str, Any],
  fresh: Sequence[str],
) -> list[str]:
  problems = []
  for name in sorted(set(have) & set(wanted)):
    theirs, ours = tuple(have[name].shape), tuple(wanted[name].shape)
    if theirs == ours:
      continue
    same_width = theirs[1:] == ours[1:]
    tables = ("encoder/embeddings/token/embedding", "mlm_head/bias")
    if same_width and name in tables:
      if name == "mlm_head/bias" and problems:
        continue  # said already
      problems.append(
        f"its vocabulary has {theirs[0]} rows, this model's {ours[0]} (use its"
        " tokenizer: data.tokenizer = dict(name='folder', path=...))"
      )
    elif same_width and name == "encoder/embeddings/position/embedding":
      problems.append(
        f"its table of positions has {theirs[0]} rows, this model's {ours[0]}"
        " (model.max_positions, model.position_offset)"
      )
    else:
      part = name.split("/")[0]
      hint = f" (init_from.ignore=['^{part}/'] begins untrained)"
      problems.append(
        f"{name} is {theirs} there and {ours} here"
        + (hint if part in fresh else "")
      )
  return problems[:3]
