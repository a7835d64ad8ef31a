r"""Moves models between bertjax and published layouts, and proves it.

  python -m bertjax.convert --from=FOLDER --to=runs/imported --format=bertjax
  python -m bertjax.convert --from=runs/mlm --to=export --format=huggingface
  python -m bertjax.convert --from=runs/points --to=points.pth \
      --format=point_bert

Before it reports success it reads what it wrote and compares: every parameter
must be equal bit for bit (after rounding, with a 16-bit --dtype) and so must
the hidden states and logits of a ragged batch, or of some clouds of points.
PyTorch is not needed.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from bertjax import cli
from bertjax.checkpoint import Checkpointer
from bertjax.interop import (
  model_spec,
  names,
  point_bert_files,
  published,
)
from bertjax.loading import LoadedModel, load_model
from bertjax.objectives.frozen import FROZEN
from bertjax.registry import lookup


@dataclasses.dataclass(frozen=True)
class Conversion:
  """What was written and checked.

  Attributes:
    path: the new folder.
    origin: kind of the source: workdir, huggingface, tf1 or point_bert.
    heads: which heads it has.
    num_parameters: number of values.
    num_tensors: parameters compared.
    logits: some values of the output that were compared.
  """

  path: str
  origin: str
  heads: tuple[str, ...]
  num_parameters: int
  num_tensors: int
  logits: tuple[float, ...]


def write_workdir(model: LoadedModel, folder: pathlib.Path, dtype: str) -> None:
  """Writes a workdir with one checkpoint, of step 0 or the source's config."""
  if dtype != "float32":
    raise ValueError(f"dtype={dtype!r}: a workdir holds float32 parameters.")
  folder = published.new_folder(folder)
  config = {"dtype": "float32"} | (model.config or {})
  config |= {"model": model.spec, "objective": model.objective_spec}
  if model.preprocess:
    data = {"preprocess": list(model.preprocess)}
    config["data"] = config.get("data", {}) | data
  published.write_json(folder / "config.json", config)
  if model.tokenizer is not None:
    model.tokenizer.save(folder / "tokenizer")
  checkpointer = Checkpointer(folder, save_async=False)
  checkpointer.save(
    0,
    {"params": model.params, "extra": dict(model.extra)},
    iterator_state={},
    config=config,
  )
  checkpointer.wait()


def _write_huggingface(
  model: LoadedModel, folder: pathlib.Path, dtype: str
) -> None:
  published.write_huggingface(
    folder,
    model.spec,
    model.params,
    model.tokenizer,
    objective=model.objective_spec,
    dtype=dtype,
  )


def _write_tf1(model: LoadedModel, folder: pathlib.Path, dtype: str) -> None:
  if dtype != "float32":
    raise ValueError(f"dtype={dtype!r}: the original layout is float32 only.")
  published.write_tf1(
    folder,
    model.spec,
    model.params,
    model.tokenizer,
    objective=model.objective_spec,
  )


def _write_point_bert(
  model: LoadedModel, path: pathlib.Path, dtype: str
) -> None:
  if dtype != "float32":
    raise ValueError(f"dtype={dtype!r}: the authors' layout is float32 only.")
  point_bert_files.write(
    path, model.spec, model.objective_spec, model.variables
  )
  said = model_spec.resolve(point_bert_files.describe(path))
  other = {
    name: model.spec[name]
    for name in point_bert_files.UNSAID
    if name in said and model.spec[name] != said[name]
  }
  if other:
    logging.warning("%s does not say %s: whoever loads it must.", path, other)


class Format(NamedTuple):
  """A layout.

  Attributes:
    write: writes a model there.
    units: of what it has models: "tokens", "points".
    unsaid: options of `config.model` that it does not keep.
  """

  write: Callable[[LoadedModel, pathlib.Path, str], None]
  units: tuple[str, ...]
  unsaid: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
  "bertjax": Format(write_workdir, ("tokens", "points")),
  "huggingface": Format(_write_huggingface, ("tokens",)),
  "tf1": Format(_write_tf1, ("tokens",)),
  "point_bert": Format(_write_point_bert, ("points",), point_bert_files.UNSAID),
}


def convert(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  format: str,
  dtype: str = "float32",
  step: int | None = None,
  tokenizer: bool = True,
  ignore: Sequence[str] = (),
) -> Conversion:
  """Reads a model, writes it in another layout and compares the two.

  Args:
    source: a workdir or a published folder.
    target: a new or empty folder; a new file of "point_bert".
    format: key of `FORMATS`.
    dtype: of the weights written: key of `published.DTYPES`.
    step: which checkpoint of a workdir.
    tokenizer: whether the tokenizer goes along.
    ignore: regexes of published tensors to leave out.

  Raises:
    ValueError: the source is no model of ours, the target is not empty, the
      model has no such form, or what was written reads back differently.
  """
  write, units, unsaid = lookup(FORMATS, format, "format")
  stored = lookup(published.DTYPES, dtype, "dtype")
  model = load_model(source, step=step, ignore=ignore)
  if _unit(model) not in units:
    others = [k for k, v in FORMATS.items() if _unit(model) in v.units]
    raise ValueError(
      f"format={format!r}: {source} has model.name={model.spec['name']!r},"
      f" which reads {_unit(model)}; its layouts are {', '.join(others)}."
    )
  if not tokenizer:
    model = dataclasses.replace(model, tokenizer=None)
  target = pathlib.Path(target)
  write(model, target, dtype)
  if model.preprocess and format != "bertjax":
    steps = list(model.preprocess)
    published.write_json(target / published.PREPROCESS, {"preprocess": steps})
    logging.warning(
      "Other libraries will not apply this model's data.preprocess, which"
      " stands in %s: prepare their texts with %s.",
      published.PREPROCESS,
      steps,
    )
  rounded = jax.tree.map(
    lambda x: np.asarray(x).astype(stored).astype(np.float32), model.params
  )
  # Published folders do not say how attention is computed, only what it is; to
  # be equal bit for bit it must be computed alike.
  how = {k: v for k, v in model.spec.items() if k in ("attend", *unsaid)}
  again = load_model(target, scan=model.spec.get("scan"), **how)
  count = _compare_params(
    {"params": rounded} | _kept(model),
    {"params": again.params} | _kept(again),
    str(target),
  )
  logits = _compare_outputs(
    dataclasses.replace(model, params=rounded), again, str(target)
  )
  if model.tokenizer is not None:
    _compare_tokenizers(model.tokenizer, again.need_tokenizer(), str(target))
  return Conversion(
    path=str(target),
    origin=model.origin,
    heads=tuple(sorted(model.heads)),
    num_parameters=model.num_parameters,
    num_tensors=count,
    logits=tuple(float(x) for x in logits),
  )


def _unit(model: LoadedModel) -> str:
  return "tokens" if "max_positions" in model.spec else "points"


def _kept(model: LoadedModel) -> dict[str, Any]:
  """Collections that every layout of a model has beside its parameters."""
  return {k: v for k, v in model.extra.items() if k in ("batch_stats", FROZEN)}


def _compare_params(wanted: Any, found: Any, where: str) -> int:
  wanted, found = names.flatten(wanted), names.flatten(found)
  differ = set(wanted) ^ set(found)
  differ |= {
    k for k in set(wanted) & set(found) if not _same_bits(wanted[k], found[k])
  }
  if differ:
    raise ValueError(
      f"{where} was written, but reads back differently:"
      f" {names.listed(differ)}. Do not use it; please report this."
    )
  return len(wanted)


def _same_bits(a: Any, b: Any) -> bool:
  a, b = np.asarray(a), np.asarray(b)
  return (
    a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
  )


def outputs(model: LoadedModel) -> dict[str, np.ndarray]:
  """All that a model says of a fixed batch, ragged if it is of tokens."""
  batch = _BATCHES[_unit(model)](model)

  @jax.jit
  def run(variables, batch):
    return model.objective.apply(variables, batch, method="outputs")

  return jax.device_get(run(model.variables, batch))


def _tokens(model: LoadedModel) -> dict[str, np.ndarray]:
  length = min(16, model.max_positions)
  tokens = np.random.default_rng(0).integers(
    0, model.spec["vocab_size"], (2, length), np.int32
  )
  segment_ids = np.ones((2, length), np.int32)
  segment_ids[1, length // 2 :] = 0
  return {"tokens": tokens, "segment_ids": segment_ids}


def _clouds(model: LoadedModel) -> dict[str, np.ndarray]:
  count = model.objective.least_points
  cloud = np.random.default_rng(0).normal(size=(2, count, 3))
  category = np.zeros(2, np.int32)
  return {"points": cloud.astype(np.float32), "category": category}


_BATCHES = {"tokens": _tokens, "points": _clouds}


def _compare_outputs(
  model: LoadedModel, again: LoadedModel, where: str
) -> np.ndarray:
  """Some values of the last output; they must be equal bit for bit."""
  wanted, found = outputs(model), outputs(again)
  for name in wanted:
    if not _same_bits(wanted[name], found[name]):
      difference = np.abs(wanted[name] - found[name]).max()
      raise ValueError(
        f"{where} has equal parameters, but its {name} differ by up to"
        f" {difference:.3g}: its configuration does not say the same. Do not"
        " use it; please report this."
      )
  return next(reversed(list(wanted.values()))).reshape(-1)[:4]


# Text with what tokenizers disagree about most.
_TEXTS = ("The quick brown fox, 12.5% café", "don't [MASK] 東京 \t x", "")


def _compare_tokenizers(wanted: Any, found: Any, where: str) -> None:
  for text in _TEXTS:
    a = wanted.encode(text, parse_special=True)
    b = found.encode(text, parse_special=True)
    if not np.array_equal(a, b):
      raise ValueError(
        f"{where}: the tokenizer that was written reads {text!r} differently:"
        f" {found.pieces(b)} instead of {wanted.pieces(a)}."
      )


def _define_flags() -> None:
  flags.DEFINE(
    cli.PATH,
    "from",
    None,
    "Workdir, Hugging Face folder, release of BERT or .pth of Point-BERT.",
  )
  flags.DEFINE(
    cli.PATH, "to", None, "New folder; of the format point_bert a new file."
  )
  flags.DEFINE_enum("format", None, list(FORMATS), "Layout to write.")
  flags.DEFINE_enum(
    "dtype", "float32", list(published.DTYPES), "Type of the weights written."
  )
  flags.DEFINE_integer(
    "step",
    None,
    "Checkpoint of a workdir; the best by keep.best_metric, or the newest.",
  )
  flags.DEFINE_bool("tokenizer", True, "Whether the tokenizer goes along.")
  flags.DEFINE_multi_string("ignore", [], "Regex of tensors to leave out.")


def main(argv: list[str]) -> None:
  f = flags.FLAGS
  source = f["from"].value
  if len(argv) > 1 or not (source and f.to and f.format):
    raise app.UsageError(
      "Usage: python -m bertjax.convert --from=FOLDER --to=FOLDER"
      f" --format={'|'.join(FORMATS)}"
    )
  if not f["verbosity"].present:  # Orbax tells much at the default level
    logging.set_verbosity(logging.WARNING)
  with cli.clear_errors():
    done = convert(
      source,
      f.to,
      format=f.format,
      dtype=f.dtype,
      step=f.step,
      tokenizer=f.tokenizer,
      ignore=f.ignore,
    )
  values = ", ".join(f"{x:.5f}" for x in done.logits)
  print(f"{source} ({done.origin}) -> {done.path} ({f.format}, {f.dtype})")
  print(f"{done.num_parameters:,} parameters, heads: "
        f"{', '.join(done.heads) or 'none'}")  # fmt: skip
  print(
    f"Read back: {done.num_tensors} arrays and all outputs equal bit for bit"
    f" (first outputs: {values})."
  )


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
