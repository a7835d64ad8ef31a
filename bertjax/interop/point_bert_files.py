"""Released files of Point-BERT: a `.pth` each, read without torch.

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
from bertjax.interop import names, point_bert, tensors
from bertjax.interop.published import Published
from bertjax.models import MODELS
from bertjax.objectives import build_objective
from bertjax.objectives.frozen import with_frozen

SUFFIXES = (".pth", ".pt")
_HEAD_DIM = 64
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


def _teacher(
  found: Mapping[str, np.ndarray], spec: Mapping[str, Any], where: str
) -> dict[str, Any]:
  """The collections of the tokenizer beside a pre-trained encoder."""
  shapes, _ = _shapes(spec, {"name": "point_reconstruction"})
  only = {k: v for k, v in found.items() if k.startswith("dvae.")}
  tree = point_bert.to_ours(only, point_bert.TEACHER, shapes, where=where)
  return {name: collection["encoder"] for name, collection in tree.items()}


def _model(
  found: Mapping[str, np.ndarray], kind: point_bert.Kind
) -> dict[str, Any]:
  """Our `config.model`, read off the shapes."""
  if kind.objective == "point_reconstruction":
    return _tokenizer(found, "")
  prefix = "transformer_q." if kind.objective == "masked_points" else ""
  layer = re.compile(rf"{re.escape(prefix)}blocks\.blocks\.(\d+)\.")
  layers = {m[1] for m in map(layer.match, found) if m}
  emb_dim, features = found[f"{prefix}reduce_dim.weight"].shape
  return dict(
    name="point_bert",
    patches=128 if kind.objective == "part_segmentation" else 64,
    patch_size=32,
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
    patch_size=4 * found[f"{prefix}decoder.mlp.4.bias"].size // 3,
    vocab_size=vocab_size,
    features=features,
    shrink=_shrink(found, prefix),
  )


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
  count = max(_POINTS, model.least_points)
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
