"""Names of the authors' Point-BERT checkpoints (PyTorch) and ours.

A released file holds one of four models: the tokenizer, the pre-trained encoder
(with a copy of the tokenizer, the momentum encoder and its queue), a classifier
or a part segmenter. Averages of BatchNorm are mapped along with parameters:
their names end in "mean" and "var".
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bertjax.interop.names import (
  NameMap,
  Row,
  flatten,
  from_published,
  nest,
  to_published,
)

_VECTORS = re.compile(r"(cls_token|cls_pos|mask_token)$")
_FUSED = re.compile(r"attn\.qkv\.weight$")
_QKV = ("query", "key", "value")
_STATISTICS = ("mean", "var")
# Matrices that the authors have as convolutions, and axes of size 1 of these.
_CONVOLUTIONS = (
  (re.compile(r"(first|second|final)_conv\.\d\.weight$"), 1),
  (re.compile(r"dgcnn_[12]\.(input_trans|layer5\.0)\.weight$"), 1),
  (re.compile(r"dgcnn_(pro_)?[12]\.layer[1-4]\.0\.weight$"), 2),
  (re.compile(r"(mlp_convs\.\d|^conv[12])\.weight$"), 1),
)

_MINI_POINT_NET = (
  ("point_in", "linear", "first_conv.0"),
  ("point_norm", "batch_norm", "first_conv.1"),
  ("point_out", "linear", "first_conv.3"),
  ("patch_in", "linear", "second_conv.0"),
  ("patch_norm", "batch_norm", "second_conv.1"),
  ("patch_out", "linear", "second_conv.3"),
)
_LAYER = (
  ("attention_norm", "norm", "norm1"),
  ("attention/query", "matrix", "attn.query"),
  ("attention/key", "matrix", "attn.key"),
  ("attention/value", "matrix", "attn.value"),
  ("attention/output", "heads", "attn.proj"),
  ("mlp_norm", "norm", "norm2"),
  ("mlp/up", "linear", "mlp.fc1"),
  ("mlp/down", "linear", "mlp.fc2"),
)
_GRAPH = (
  ("input", "linear", "input_trans"),
  *((f"edge_{i}", "matrix", f"layer{i + 1}.0") for i in range(4)),
  *((f"edge_{i}_norm", "norm", f"layer{i + 1}.1") for i in range(4)),
  ("output", "matrix", "layer5.0"),
  ("output_norm", "norm", "layer5.1"),
)
_FOLDING = (
  ("coarse_in", "linear", "mlp.0"),
  ("coarse_middle", "linear", "mlp.2"),
  ("coarse_out", "linear", "mlp.4"),
  ("fold_0", "linear", "final_conv.0"),
  ("fold_norm_0", "batch_norm", "final_conv.1"),
  ("fold_1", "linear", "final_conv.3"),
  ("fold_norm_1", "batch_norm", "final_conv.4"),
  ("fold_out", "linear", "final_conv.6"),
)

# Leaves of a module of each kind: ours, theirs, leading axes that are inputs.
_LEAVES = {
  "matrix": (("kernel", "weight", 1),),
  "linear": (("kernel", "weight", 1), ("bias", "bias", 0)),
  "heads": (("kernel", "weight", 2), ("bias", "bias", 0)),
  "norm": (("scale", "weight", 0), ("bias", "bias", 0)),
  "batch_norm": (
    ("scale", "weight", 0),
    ("bias", "bias", 0),
    ("mean", "running_mean", 0),
    ("var", "running_var", 0),
  ),
}


def _rows(modules: Iterable, ours: str = "", theirs: str = "") -> list[Row]:
  """Rows of modules under a prefix of either side."""
  return [
    Row(
      f"{ours}{module}/{leaf}",
      f"{theirs}{name}.{published}",
      num_inputs=inputs,
      transposed=inputs > 0,
    )
    for module, kind, name in modules
    for leaf, published, inputs in _LEAVES[kind]
  ]


def _trunk(theirs: str = "") -> list[Row]:
  """The Transformer and what it reads."""
  embeddings, positions = "encoder/embeddings/", "encoder/positions/"
  return [
    *_rows(_MINI_POINT_NET, f"{embeddings}patches/", f"{theirs}encoder."),
    *_rows([("project", "linear", "reduce_dim")], embeddings, theirs),
    Row(f"{embeddings}cls", f"{theirs}cls_token"),
    Row(f"{positions}cls", f"{theirs}cls_pos"),
    *_rows([("up", "linear", "pos_embed.0")], positions, theirs),
    *_rows([("down", "linear", "pos_embed.2")], positions, theirs),
    *_rows(_LAYER, "encoder/layers_{i}/", theirs + "blocks.blocks.{i}."),
    *_rows([("final_norm", "norm", "norm")], "encoder/", theirs),
  ]


def _tokenizer(theirs: str = "") -> list[Row]:
  """The discrete autoencoder."""
  return [
    *_rows(_MINI_POINT_NET, "encoder/embed/", f"{theirs}encoder."),
    *_rows(_GRAPH, "encoder/to_codes/", f"{theirs}dgcnn_1."),
    Row("encoder/codebook", f"{theirs}codebook", num_inputs=1),
    *_rows(_GRAPH, "encoder/from_codes/", f"{theirs}dgcnn_2."),
    *_rows(_FOLDING, "encoder/decode/", f"{theirs}decoder."),
  ]


def _pretraining() -> list[Row]:
  q = "transformer_q."
  heads = (
    ("token_head", "linear", "lm_head"),
    ("contrast_head/dense", "linear", "cls_head.0"),
    ("contrast_head/output", "linear", "cls_head.2"),
  )
  mask = Row("encoder/embeddings/mask", f"{q}mask_token")
  return [*_trunk(q), mask, *_rows(heads, theirs=q)]


_CLASSIFIER = (
  ("classifier/dense", "linear", "cls_head_finetune.0"),
  ("classifier/classes", "linear", "cls_head_finetune.3"),
)


def _propagations() -> list[tuple[str, str, str]]:
  modules = []
  for level in range(3):
    for i in range(2):
      ours, theirs = f"carry_{level}", f"propagation_{level}"
      modules += [
        (f"{ours}/dense_{i}", "linear", f"{theirs}.mlp_convs.{i}"),
        (f"{ours}/norm_{i}", "batch_norm", f"{theirs}.mlp_bns.{i}"),
      ]
  for level in (1, 2):
    for i in range(2):
      ours, theirs = f"refine_{level}/edge_{i}", f"dgcnn_pro_{level}.layer"
      modules += [
        (ours, "matrix", f"{theirs}{i + 1}.0"),
        (f"{ours}_norm", "norm", f"{theirs}{i + 1}.1"),
      ]
  return modules


_SEGMENTER = (
  *_propagations(),
  ("dense", "linear", "conv1"),
  ("norm", "batch_norm", "bn1"),
  ("classes", "linear", "conv2"),
)


@dataclasses.dataclass(frozen=True)
class Kind:
  """One of the models that are released.

  Attributes:
    known_by: a tensor that only it has.
    objective: ours, a name of `OBJECTIVES`.
    table: the names.
  """

  known_by: str
  objective: str
  table: NameMap


_COUNTERS = r"num_batches_tracked$"

# In the order in which a file is asked what it is.
KINDS: dict[str, Kind] = {
  "pretrained": Kind(
    "transformer_q.cls_token",
    "masked_points",
    NameMap(
      tuple(_pretraining()),
      ignored=(_COUNTERS, r"^transformer_k\.", r"^dvae\.", r"^queue(_ptr)?$"),
    ),
  ),
  "tokenizer": Kind(
    "codebook",
    "point_reconstruction",
    NameMap(tuple(_tokenizer()), ignored=(_COUNTERS,)),
  ),
  "classifier": Kind(
    "cls_head_finetune.0.weight",
    "point_classification",
    NameMap((*_trunk(), *_rows(_CLASSIFIER)), ignored=(_COUNTERS,)),
  ),
  "segmenter": Kind(
    "propagation_0.mlp_convs.0.weight",
    "part_segmentation",
    NameMap(
      (*_trunk(), *_rows(_SEGMENTER, "segmenter/")), ignored=(_COUNTERS,)
    ),
  ),
}
# The tokenizer that a file of a pre-trained model holds beside it.
TEACHER = NameMap(tuple(_tokenizer("dvae.")), ignored=(_COUNTERS,))


def plain(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """State dict of a released file, every matrix by itself in two dimensions.

  The prefix of PyTorch's data parallelism goes, convolutions over one point are
  linear maps, and queries, keys and values are three maps.
  """
  found: dict[str, np.ndarray] = {}
  for name, x in tensors.items():
    name = name.removeprefix("module.")
    x = np.asarray(x)
    if _VECTORS.search(name):
      x = x.reshape(-1)
    elif x.ndim > 2 and set(x.shape[2:]) == {1}:
      x = x.reshape(x.shape[:2])
    if _FUSED.search(name):
      for part, matrix in zip(_QKV, np.split(x, 3)):
        found[name.replace("qkv", part)] = matrix
    else:
      found[name] = x
  return found


def kind_of(tensors: Mapping[str, np.ndarray], where: str) -> Kind:
  """What a (plain) state dict holds.

  Raises:
    ValueError: none of the models that are released.
  """
  for kind in KINDS.values():
    if kind.known_by in tensors:
      return kind
  some = ", ".join(kind.known_by for kind in KINDS.values())
  raise ValueError(f"{where} is no checkpoint of Point-BERT: it has no {some}.")


def to_ours(
  tensors: Mapping[str, np.ndarray],
  table: NameMap,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  num_layers: int = 0,
  scan: bool = True,
  where: str = "checkpoint",
) -> dict[str, Any]:
  """A (plain) state dict as our `params` and `batch_stats`.

  Args:
    tensors: arrays by their name.
    table: of `KINDS`, or `TEACHER`.
    shapes: of our parameters and averages by path name, layers apart.
    num_layers: depth l of the Transformer, if there is one.
    scan: stack the layers.
    where: the file, for messages.

  Raises:
    ValueError: missing or unexpected tensors, or wrong shapes.
  """
  tree = from_published(
    tensors, table, shapes, num_layers=num_layers, scan=scan, where=where
  )
  return {
    "params": _split(tree, statistics=False),
    "batch_stats": _split(tree, statistics=True),
  }


def to_theirs(
  variables: Mapping[str, Any], table: NameMap, *, num_layers: int = 0
) -> dict[str, np.ndarray]:
  """Our `params` and `batch_stats` as the released state dict, float32.

  Args:
    variables: the two collections.
    table: of `KINDS`, or `TEACHER`.
    num_layers: depth l of the Transformer, if there is one.

  Raises:
    ValueError: a parameter that the released model does not have.
  """
  whole = _merged(variables["params"], variables.get("batch_stats", {}))
  return released(to_published(whole, table, num_layers=num_layers))


def released(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `plain`, but for the prefix of data parallelism."""
  found: dict[str, np.ndarray] = {}
  for name, x in tensors.items():
    if _VECTORS.search(name):
      x = x.reshape(1, 1, -1)
    elif x.ndim == 2:
      for pattern, axes in _CONVOLUTIONS:
        if pattern.search(name):
          x = x.reshape(*x.shape, *[1] * axes)
    if name.endswith("attn.query.weight"):
      x = np.concatenate(
        [tensors[name.replace("query", part)] for part in _QKV]
      )
      name = name.replace("query", "qkv")
    elif re.search(r"attn\.(key|value)\.weight$", name):
      continue
    found[name] = x
  return found


def _merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves of two trees."""
  return nest({**flatten(a), **flatten(b)})


def _split(tree: Mapping[str, Any], *, statistics: bool) -> dict[str, Any]:
  """The leaves that are averages, or those that are not."""
  found = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      if inner := _split(value, statistics=statistics):
        found[name] = inner
    elif (name in _STATISTICS) == statistics:
      found[name] = value
  return found
