"""Released files of Point-BERT: a `.pth` each, read and written without torch.

What a file does not say is taken as published: 64 patches of 32 points (128 for
parts) and heads of width 64. `load_model(path, patches=...)` says otherwise.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bertjax import registry
from bertjax.data.shapes.files import ShapeNetPart
from bertjax.interop import names, point_bert, tensors, torch_files
from bertjax.interop.published import Published
from bertjax.models import MODELS
from bertjax.objectives import build_objective
from bertjax.objectives.frozen import frozen_variables, with_frozen
from bertjax.objectives.masked_points import Options
from bertjax.objectives.momentum import QUEUE, SLOW

SUFFIXES = (".pth", ".pt")
_HEAD_DIM, _PATCH_SIZE = 64, 32
# What a tokenizer that only gives patches their codes can do without.
_DECODING = ("encoder/from_codes/", "encoder/decode/")
_POINTS = 1024


def is_file(path: str | os.PathLike) -> bool:
  """Whether this is a file of PyTorch's, and no folder."""
  path = pathlib.Path(path)
  return path.suffix in SUFFIXES and path.is_file()


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Tensors of a released file by name, as `point_bert.plain` has them."""
  return point_bert.plain(tensors.read_torch_file(pathlib.Path(path)))


def describe(path: str | os.PathLike) -> dict[str, Any]:
  """Our `config.model` of a released file.

  Raises:
    ValueError: it holds none of the released models.
  """
  found = read_tensors(path)
  return _model(found, point_bert.kind_of(found, str(path)))


def read(
  path: str | os.PathLike, *, scan: bool = True, ignore: Sequence[str] = ()
) -> Published:
  """A released file as our spec, parameters and averages.

  Args:
    path: the file.
    scan: stack the layers' parameters.
    ignore: regexes of tensors to leave out.

  Raises:
    ValueError: it does not hold one of the released models.
  """
  found, where = read_tensors(path), str(path)
  kind = point_bert.kind_of(found, where)
  names.refuse_unused(ignore, found, f"{where}: ignore")
  left_out = names.matching(found, ignore)
  found = {name: x for name, x in found.items() if name not in left_out}
  spec = _model(found, kind)
  objective = _objective(found, kind, where)
  shapes, layers = _shapes(spec, objective)
  variables = point_bert.to_ours(
    found, kind.table, shapes, num_layers=layers, scan=scan, where=where
  )
  params = variables.pop("params")
  if kind.objective == "masked_points":
    variables = with_frozen(
      variables, {"tokenizer": _teacher(found, objective["tokenizer"], where)}
    )
  return Published(spec, objective, params, None, "float32", variables)


# Of `config.model`, what a file does not say and `load_model` must be told.
UNSAID = ("patches", "patch_size", "num_heads", "skip_near_origin")


def write(
  path: str | os.PathLike,
  spec: Mapping[str, Any],
  objective: Mapping[str, Any],
  variables: Mapping[str, Any],
) -> None:
  """Writes what the authors' code reads.

  A pre-trained model goes with its tokenizer, its momentum encoder and its
  queue. Where it has neither of the two last ones yet, there are those that a
  run begins with: the encoder itself, and random keys.

  Args:
    path: a new file, `.pth`.
    spec: `config.model`.
    objective: `config.objective`.
    variables: all collections.

  Raises:
    ValueError: the file is there, is to be called otherwise, or the authors
      have no such model.
  """
  path = pathlib.Path(path)
  if path.suffix not in SUFFIXES:
    raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}.")
  if path.exists():
    raise ValueError(f"{path} is there already; name a new file.")
  made = _released(spec, objective, variables)
  path.parent.mkdir(parents=True, exist_ok=True)
  torch_files.write_torch_file(made, path, "base_model")


def _released(
  spec: Mapping[str, Any],
  objective: Mapping[str, Any],
  variables: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """The state dict of a model."""
  for kind in point_bert.KINDS.values():
    if kind.objective == objective["name"]:
      break
  else:
    raise ValueError(
      f"objective.name={objective['name']!r} has no released form."
    )
  layers = spec.get("num_layers", 0)
  if kind.objective != "masked_points":
    return point_bert.to_theirs(variables, kind.table, num_layers=layers)
  if "contrast_head" not in variables["params"]:
    raise ValueError(
      "objective.contrast and objective.mixed_contrast are both off: the"
      " authors' pre-trained model always has a contrast head."
    )
  found = point_bert.to_theirs(variables, kind.table, num_layers=layers)
  slow = point_bert.to_theirs(_slow(variables), kind.table, num_layers=layers)
  found |= {
    k.replace("transformer_q", "transformer_k"): x for k, x in slow.items()
  }
  (teacher,) = frozen_variables(variables).values()
  if "decode" not in teacher["params"] and spec["patch_size"] != _PATCH_SIZE:
    raise ValueError(
      f"model.patch_size={spec['patch_size']}: without the tokenizer's decoder,"
      " which a run does not keep, the authors' layout is of patches of"
      f" {_PATCH_SIZE} points."
    )
  teacher = {name: {"encoder": tree} for name, tree in teacher.items()}
  return (
    found
    | point_bert.to_theirs(teacher, point_bert.TEACHER)
    | _queue(objective, variables)
  )


def _slow(variables: Mapping[str, Any]) -> dict[str, Any]:
  """The collections of the momentum encoder, whose averages are the other's."""
  copy = variables.get(SLOW, {}).get("slow")
  if copy is None or copy["updated"] < 0:  # it is made in the first step
    return dict(variables)
  return {**variables, "params": {**variables["params"], **copy["params"]}}


def _queue(
  objective: Mapping[str, Any], variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """The keys that wait [c, k], and where the next ones go [1]."""
  if QUEUE in variables:
    queue = variables[QUEUE]["queue"]
    keys, place = np.asarray(queue["keys"]), int(queue["next"])
  else:
    width = variables["params"]["contrast_head"]["output"]["bias"].size
    size = objective.get("queue_size", Options().queue_size)
    keys = np.random.default_rng(0).normal(size=(size, width))
    keys, place = keys / np.linalg.norm(keys, axis=1, keepdims=True), 0
  return {
    "queue": np.ascontiguousarray(keys.T, np.float32),
    "queue_ptr": np.array([place], np.int64),
  }


def _teacher(
  found: Mapping[str, np.ndarray], spec: Mapping[str, Any], where: str
) -> dict[str, Any]:
  """The collections of the tokenizer beside a pre-trained encoder."""
  shapes, _ = _shapes(spec, {"name": "point_reconstruction"})
  if not _decodes(found, "dvae."):
    shapes = {k: v for k, v in shapes.items() if not k.startswith(_DECODING)}
  only = {k: v for k, v in found.items() if k.startswith("dvae.")}
  tree = point_bert.to_ours(only, point_bert.TEACHER, shapes, where=where)
  return {name: collection["encoder"] for name, collection in tree.items()}


def _model(
  found: Mapping[str, np.ndarray], kind: point_bert.Kind
) -> dict[str, Any]:
  """Our `config.model`, read off the shapes."""
  if kind.objective == "point_reconstruction":
    return _tokenizer(found, "")
  pretrained = kind.objective == "masked_points"
  prefix = "transformer_q." if pretrained else ""
  layer = re.compile(rf"{re.escape(prefix)}blocks\.blocks\.(\d+)\.")
  layers = {m[1] for m in map(layer.match, found) if m}
  emb_dim, features = found[f"{prefix}reduce_dim.weight"].shape
  return dict(
    name="point_bert",
    patches=128 if kind.objective == "part_segmentation" else 64,
    patch_size=_patch_size(found, "dvae.") if pretrained else _PATCH_SIZE,
    num_layers=len(layers),
    emb_dim=emb_dim,
    num_heads=max(1, emb_dim // _HEAD_DIM),
    mlp_dim=found[f"{prefix}blocks.blocks.0.mlp.fc1.bias"].size,
    patch_features=features,
    shrink=_shrink(found, prefix),
  )


def _tokenizer(found: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
  vocab_size, features = found[f"{prefix}codebook"].shape
  return dict(
    name="point_tokenizer",
    patches=64,
    patch_size=_patch_size(found, prefix),
    vocab_size=vocab_size,
    features=features,
    shrink=_shrink(found, prefix),
  )


def _decodes(found: Mapping[str, np.ndarray], prefix: str) -> bool:
  """Whether a tokenizer is whole."""
  return any(name.startswith(f"{prefix}decoder.") for name in found)


def _patch_size(found: Mapping[str, np.ndarray], prefix: str) -> int:
  if not _decodes(found, prefix):
    return _PATCH_SIZE
  return 4 * found[f"{prefix}decoder.mlp.4.bias"].size // 3


def _shrink(found: Mapping[str, np.ndarray], prefix: str) -> int:
  return 128 // found[f"{prefix}encoder.first_conv.0.bias"].size


def _objective(
  found: Mapping[str, np.ndarray], kind: point_bert.Kind, where: str
) -> dict[str, Any]:
  """Our `config.objective`, read off the shapes."""
  spec: dict[str, Any] = {"name": kind.objective}
  if kind.objective == "masked_points":
    spec["tokenizer"] = _tokenizer(found, "dvae.")
    spec["contrast_dim"] = found["transformer_q.cls_head.0.bias"].size
    spec["queue_size"] = found["queue"].shape[1]
  elif kind.objective == "point_classification":
    spec["num_classes"] = found["cls_head_finetune.3.bias"].size
  elif kind.objective == "part_segmentation":
    count = found["conv2.bias"].size
    if count != 1 + max(map(max, ShapeNetPart.class_parts)):
      raise ValueError(
        f"{where} has {count} parts; only the 50 of ShapeNetPart are known by"
        " their categories."
      )
    spec["class_parts"] = ShapeNetPart.class_parts
    spec["labels"] = ShapeNetPart.classes
  return spec


def _shapes(
  spec: Mapping[str, Any], objective: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], int]:
  """Shapes of parameters and averages by name, layers apart; and how many."""
  model = registry.build(MODELS, spec, "model")
  module = build_objective(objective, model)
  count = max(_POINTS, module.least_points)
  batch = {
    "points": jnp.zeros((1, count, 3)),
    "labels": jnp.zeros((1,), jnp.int32),
    "category": jnp.zeros((1,), jnp.int32),
    "parts": jnp.zeros((1, count), jnp.int32),
  }
  keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
  variables = nn.meta.unbox(
    jax.eval_shape(lambda b: module.init(keys, b, train=False), batch)
  )
  layers, shapes = getattr(model, "num_layers", 0), {}
  for tree in (variables["params"], variables.get("batch_stats", {})):
    for name, leaf in names.flatten(tree).items():
      if name.startswith("encoder/layers/"):
        for i in range(layers):
          apart = name.replace("layers/", f"layers_{i}/", 1)
          shapes[apart] = tuple(leaf.shape[1:])
      else:
        shapes[name] = tuple(leaf.shape)
  return shapes, layers
