"""Published parameter names and layouts <-> ours: one table, both directions.

A row pairs one of our parameters with one published tensor (per layer, where
the names hold "{i}"). Published matrices are two-dimensional; ours may split an
axis into heads. PyTorch stores a matrix as [out, in], TensorFlow 1 as [in,
out].
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bertjax.expressions import regex

flatten = functools.partial(traverse_util.flatten_dict, sep="/")
nest = functools.partial(traverse_util.unflatten_dict, sep="/")

_SHOWN = 5  # names listed in an error before "and n more"


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a name map.

  Attributes:
    ours: our path; a stacked parameter is written `encoder/layers_{i}/...`.
    theirs: the published name.
    num_inputs: leading axes of our matrix that are inputs; 0 for what is no
      matrix of a linear map, which is only reshaped.
    transposed: whether the published matrix is [out, in].
  """

  ours: str
  theirs: str
  num_inputs: int = 0
  transposed: bool = False


@dataclasses.dataclass(frozen=True)
class NameMap:
  """How one family of checkpoints names things.

  Attributes:
    rows: the table.
    renames: `(regex, replacement)` from older spellings to that of the table.
    ignored: regexes of what is no parameter of the model.
    aliases: a name that repeats another tensor, and that tensor's name.
  """

  rows: tuple[Row, ...]
  renames: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def canonical(self, name: str) -> str:
    """The spelling of the table."""
    for pattern, replacement in self.renames:
      name = re.sub(pattern, replacement, name)
    return name


# Our module, its kind, and its name in Hugging Face's BERT and RoBERTa. "in1"
# and "in2" are linear maps with one and two leading input axes.
_MODULES = (
  ("encoder/embeddings/token", "table", "{m}.embeddings.word_embeddings"),
  ("encoder/embeddings/position", "table",
   "{m}.embeddings.position_embeddings"),
  ("encoder/embeddings/type", "table", "{m}.embeddings.token_type_embeddings"),
  ("encoder/embeddings/norm", "norm", "{m}.embeddings.LayerNorm"),
  ("{l}/attention/query", "in1", "{m}.{e}.attention.self.query"),
  ("{l}/attention/key", "in1", "{m}.{e}.attention.self.key"),
  ("{l}/attention/value", "in1", "{m}.{e}.attention.self.value"),
  ("{l}/attention/output", "in2", "{m}.{e}.attention.output.dense"),
  ("{l}/attention_norm", "norm", "{m}.{e}.attention.output.LayerNorm"),
  ("{l}/mlp/up", "in1", "{m}.{e}.intermediate.dense"),
  ("{l}/mlp/down", "in1", "{m}.{e}.output.dense"),
  ("{l}/mlp_norm", "norm", "{m}.{e}.output.LayerNorm"),
  ("pooler/dense", "in1", "{m}.pooler.dense"),
)  # fmt: skip
_BERT_HEADS = (
  ("mlm_head/transform", "in1", "cls.predictions.transform.dense"),
  ("mlm_head/norm", "norm", "cls.predictions.transform.LayerNorm"),
  ("mlm_head", "bias", "cls.predictions"),
  ("pair_head", "in1", "cls.seq_relationship"),
)
_ROBERTA_HEADS = (
  ("mlm_head/transform", "in1", "lm_head.dense"),
  ("mlm_head/norm", "norm", "lm_head.layer_norm"),
  ("mlm_head", "bias", "lm_head"),
)
# Heads of fine-tuning objectives, by family and objective.
_CLASSIFIER = ("classifier", "in1", "classifier")
_FINE_TUNING = {
  ("bert", "classification"): (_CLASSIFIER,),
  ("bert", "token_classification"): (_CLASSIFIER,),
  ("bert", "span_qa"): (("span", "in1", "qa_outputs"),),
  ("bert", "multiple_choice"): (_CLASSIFIER,),
  # The dense layer of RoBERTa's classification head is BERT's pooler.
  ("roberta", "classification"): (
    ("pooler/dense", "in1", "classifier.dense"),
    ("classifier", "in1", "classifier.out_proj"),
  ),
  ("roberta", "token_classification"): (_CLASSIFIER,),
  ("roberta", "span_qa"): (("span", "in1", "qa_outputs"),),
  ("roberta", "multiple_choice"): (_CLASSIFIER,),
}
# Leaves of a module of each kind: ours, PyTorch's.
_LEAVES = {
  "table": (("embedding", "weight"),),
  "norm": (("scale", "weight"), ("bias", "bias")),
  "in1": (("kernel", "weight"), ("bias", "bias")),
  "in2": (("kernel", "weight"), ("bias", "bias")),
  "bias": (("bias", "bias"),),
}


def _torch_rows(modules, model: str) -> tuple[Row, ...]:
  rows = []
  fill = {"m": model, "l": "encoder/layers_{i}", "e": "encoder.layer.{i}"}
  for ours, kind, theirs in modules:
    for leaf, published in _LEAVES[kind]:
      matrix = leaf == "kernel"
      rows.append(
        Row(
          f"{ours.format(**fill)}/{leaf}",
          f"{theirs.format(**fill)}.{published}",
          num_inputs={"in1": 1, "in2": 2}[kind] if matrix else 0,
          transposed=matrix,
        )
      )
  return tuple(rows)


# Heads of the original code; run_classifier's has no scope of its own.
_TF1_SCOPES = {
  "cls.seq_relationship": "cls/seq_relationship/",
  "classifier": "",
  "qa_outputs": "cls/squad/",
}


def _tf1_row(row: Row) -> Row:
  """TensorFlow 1 has PyTorch's paths, other leaves, and matrices [in, out]."""
  head, last = row.theirs.rsplit(".", 1)
  if head in _TF1_SCOPES:
    leaf = {"weight": "output_weights", "bias": "output_bias"}[last]
    # Heads are what the original, too, keeps as [out, in].
    return dataclasses.replace(row, theirs=_TF1_SCOPES[head] + leaf)
  name = row.theirs.replace("layer.{i}", "layer_{i}").replace(".", "/")
  for pattern, replacement in (
    ("LayerNorm/weight$", "LayerNorm/gamma"),
    ("LayerNorm/bias$", "LayerNorm/beta"),
    ("embeddings/weight$", "embeddings"),
    ("^cls/predictions/bias$", "cls/predictions/output_bias"),
    ("/weight$", "/kernel"),
  ):
    name = re.sub(pattern, replacement, name)
  return dataclasses.replace(row, theirs=name, transposed=False)


_LEGACY_NORM = (
  (r"LayerNorm\.gamma$", "LayerNorm.weight"),
  (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
_BUFFERS = (r"embeddings\.(position_ids|token_type_ids)$",)

BERT = NameMap(
  _torch_rows((*_MODULES, *_BERT_HEADS), "bert"),
  renames=(*_LEGACY_NORM, (r"^(embeddings|encoder|pooler)\.", r"bert.\1.")),
  ignored=_BUFFERS,
  aliases={
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
  },
)
ROBERTA = NameMap(
  _torch_rows((*_MODULES, *_ROBERTA_HEADS), "roberta"),
  renames=(*_LEGACY_NORM, (r"^(embeddings|encoder|pooler)\.", r"roberta.\1.")),
  ignored=_BUFFERS,
  aliases={
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
  },
)


def name_map(family: str, objective: str) -> NameMap:
  """The names of a family of Hugging Face's with the heads of an objective.

  Args:
    family: "bert" or "roberta".
    objective: a name of `OBJECTIVES`.
  """
  plain = {"bert": BERT, "roberta": ROBERTA}[family]
  if (family, objective) not in _FINE_TUNING:
    return plain
  modules = {module[0]: module for module in _MODULES}
  modules |= {module[0]: module for module in _FINE_TUNING[family, objective]}
  unused = ()
  if objective in ("token_classification", "span_qa"):
    # Older files have a pooler that these heads do not use.
    del modules["pooler/dense"]
    unused = (rf"^{family}\.pooler\.",)
  return NameMap(
    _torch_rows(tuple(modules.values()), family),
    renames=plain.renames,
    ignored=(*plain.ignored, *unused),
  )


_TF1_IGNORED = (r"/adam_[mv]$", r"^global_step$")
TF1 = NameMap(tuple(map(_tf1_row, BERT.rows)), ignored=_TF1_IGNORED)


def tf1_map(objective: str) -> NameMap:
  """The names of the original code with the heads of an objective.

  `run_classifier.py` has "classification", `run_squad.py` "span_qa", whose
  pooler is there but unused; every other objective gets the pre-training heads.
  """
  if objective not in ("classification", "span_qa"):
    return TF1
  unused = (r"^bert/pooler/",) if objective == "span_qa" else ()
  rows = name_map("bert", objective).rows
  return NameMap(tuple(map(_tf1_row, rows)), ignored=(*_TF1_IGNORED, *unused))


HEADS = (
  "mlm_head", "lm_head", "pooler", "pair_head", "classifier", "span",
  "token_head", "contrast_head", "segmenter",
)  # fmt: skip
# Parameters beside the heads of which only pre-training has any use.
PRETRAINING_ONLY = ("encoder/embeddings/mask",)


def heads_of(params: Mapping[str, Any]) -> frozenset[str]:
  """Which of `HEADS` a parameter tree has."""
  return frozenset(h for h in HEADS if h in params)


def is_scanned(params: Mapping[str, Any]) -> bool:
  """Whether the encoder's layers are stacked."""
  return "layers" in params["encoder"]


def unstacked(params: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
  """Leaves by path name, `layers_0`, `layers_1`... apart (views of numpy)."""
  flat = {}
  for name, leaf in flatten(params).items():
    if name.startswith("encoder/layers/"):
      for i in range(num_layers):
        key = name.replace("encoder/layers/", f"encoder/layers_{i}/", 1)
        flat[key] = leaf[i]
    else:
      flat[name] = leaf
  return flat


def stacked(flat: Mapping[str, np.ndarray], num_layers: int) -> dict[str, Any]:
  """The inverse of `unstacked` for a scanned encoder, by path name."""
  out = {}
  for name, leaf in flat.items():
    if name.startswith("encoder/layers_0/"):
      rest = name.removeprefix("encoder/layers_0/")
      out[f"encoder/layers/{rest}"] = np.stack(
        [flat[f"encoder/layers_{i}/{rest}"] for i in range(num_layers)]
      )
    elif not re.match(r"encoder/layers_\d+/", name):
      out[name] = leaf
  return out


def _their_shape(row: Row, shape: Sequence[int]) -> tuple[int, ...]:
  """The published shape of our parameter of `shape` (one layer)."""
  if not row.num_inputs:
    if row.ours.endswith("/embedding"):
      return tuple(shape)
    return (math.prod(shape),)
  n_in = math.prod(shape[: row.num_inputs])
  n_out = math.prod(shape[row.num_inputs :])
  return (n_out, n_in) if row.transposed else (n_in, n_out)


def _to_ours(row: Row, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  return (x.T if row.transposed else x).reshape(shape)


def _to_theirs(row: Row, x: np.ndarray) -> np.ndarray:
  if row.transposed:
    n_in = math.prod(x.shape[: row.num_inputs])
    return np.ascontiguousarray(x.reshape(n_in, -1).T)
  return np.ascontiguousarray(x.reshape(_their_shape(row, x.shape)))


def _expanded(rows: Iterable[Row], num_layers: int) -> list[Row]:
  out = []
  for row in rows:
    if "{i}" in row.ours:
      for i in range(num_layers):
        out.append(
          dataclasses.replace(
            row,
            ours=row.ours.format(i=i),
            theirs=row.theirs.format(i=i),
          )
        )
    else:
      out.append(row)
  return out


def listed(names: Iterable[str]) -> str:
  """The first few names, sorted, and how many more there are."""
  names = sorted(names)
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
  """The names in which one of the regexes is found."""
  patterns = [regex(p) for p in patterns]
  return {n for n in names if any(p.search(n) for p in patterns)}


def refuse_unused(
  patterns: Iterable[str], names: Iterable[str], field: str
) -> None:
  """Raises ValueError for a regex that matches none of the names."""
  names = list(names)
  for pattern in patterns:
    if not matching(names, [pattern]):
      raise ValueError(
        f"{field}: pattern {pattern!r} matches nothing; there are"
        f" {listed(names)}."
      )


def _resolve_aliases(
  tensors: dict[str, Any], table: NameMap, where: str
) -> None:
  for alias, original in table.aliases.items():
    if alias not in tensors:
      continue
    copy = tensors.pop(alias)
    if original not in tensors:
      tensors[original] = copy
    elif not np.array_equal(copy, tensors[original]):
      raise ValueError(
        f"{where}: {alias} differs from {original}; bertjax ties them, so this"
        " model with untied weights cannot be read."
      )


def from_published(
  tensors: Mapping[str, np.ndarray],
  table: NameMap,
  shapes: Mapping[str, Sequence[int]],
  *,
  num_layers: int,
  scan: bool = True,
  ignore: Sequence[str] = (),
  where: str = "checkpoint",
) -> dict[str, Any]:
  """Published tensors as our parameter tree, float32.

  A head none of whose tensors are there is left out. All else must be
  explained: every tensor of the file by the table, every parameter by the file.

  Args:
    tensors: arrays by published name.
    table: the family's names.
    shapes: of our parameters by path name, with every head, layers apart.
    num_layers: depth l.
    scan: stack the layers.
    ignore: regexes of further published names to leave out.
    where: the file or folder, for messages.

  Raises:
    ValueError: missing or unexpected tensors, or wrong shapes.
  """
  refuse_unused(ignore, tensors, f"{where}: ignore")
  dropped = matching(tensors, (*table.ignored, *ignore))
  named: dict[str, np.ndarray] = {}
  for name in sorted(set(tensors) - dropped):
    key = table.canonical(name)
    if key in named:
      raise ValueError(f"{where} holds {key} twice, once as {name}.")
    named[key] = tensors[name]
  _resolve_aliases(named, table, where)
  rows = [r for r in _expanded(table.rows, num_layers) if r.ours in shapes]
  present = {r.ours.split("/")[0] for r in rows if r.theirs in named}
  rows = [r for r in rows if r.ours.split("/")[0] in present | {"encoder"}]
  explained = {r.theirs for r in rows}
  problems = []
  if missing := explained - set(named):
    problems.append(f"missing tensors: {listed(missing)}")
  if extra := set(named) - explained:
    problems.append(
      f"unexpected tensors: {listed(extra)} (name what may be left out in"
      " ignore=[regex])"
    )
  wrong = []
  for r in rows:
    expected = _their_shape(r, shapes[r.ours])
    if r.theirs in named and tuple(named[r.theirs].shape) != expected:
      wrong.append(
        f"{r.theirs} is {tuple(named[r.theirs].shape)} instead of {expected}"
      )
  if wrong:
    problems.append(f"wrong shapes: {listed(wrong)}")
  if problems:
    raise ValueError(
      f"{where} does not fit the model of its configuration; "
      + "; ".join(problems)
      + "."
    )
  flat = {
    r.ours: np.asarray(
      _to_ours(r, named[r.theirs], shapes[r.ours]), np.float32, order="C"
    )
    for r in rows
  }
  return nest(stacked(flat, num_layers) if scan else flat)


def to_published(
  params: Mapping[str, Any], table: NameMap, *, num_layers: int
) -> dict[str, np.ndarray]:
  """Our parameter tree under published names and in published layouts.

  Aliases are not written: neither format stores a tensor twice.

  Raises:
    ValueError: a parameter that the format has no name for.
  """
  flat = unstacked(jax.tree.map(np.asarray, params), num_layers)
  rows = {r.ours: r for r in _expanded(table.rows, num_layers)}
  if unknown := set(flat) - set(rows):
    raise ValueError(
      f"The format has no name for the parameters {listed(unknown)}."
    )
  return {
    rows[name].theirs: _to_theirs(rows[name], leaf)
    for name, leaf in flat.items()
  }
