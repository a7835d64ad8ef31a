r"""Evaluates a trained run or a published checkpoint on any source.

  python -m bertjax.evaluate --model=runs/quick --split=test
  python -m bertjax.evaluate --model=FOLDER --split=train \
      --source='{"name": "text_files", "paths": "docs/*.txt"}'
  python -m bertjax.evaluate --model=FOLDER --split=validation \
      --data='{"name": "task", "task": {"name": "glue/sst2"}}'

  python -m bertjax.evaluate --model=runs/dvae --evaluators=reconstruction

Of a masked LM its accuracy, loss and pseudo-perplexity, of a fine-tuned model
the task's metrics, beside what guessing by frequency achieves. A name that
several evaluators give is preceded by theirs, as in task_metrics/accuracy.
"""

import collections
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from bertjax import cli, registry
from bertjax.config import cache_path
from bertjax.data.dataset import EVALUATION_SEED
from bertjax.evals import EVALUATORS
from bertjax.experiment import build_data, takes
from bertjax.loading import LoadedModel, load_model
from bertjax.parallel import hosts
from bertjax.parallel.mesh import make_mesh

# For a model that brings no `data` of its own.
_ANY = dict(seq_len=128, batch_size=32)
_TEXT = dict(
  source=dict(name="python_docs"),
  instances=dict(name="packed"),
  masking=dict(rate=0.15),
)
# What compares the devices of a run under way measures no saved model.
_MEASURES = {k: v for k, v in EVALUATORS.items() if k != "replicas"}


def _data_spec(
  model: LoadedModel,
  split: str,
  source: Mapping[str, Any] | None,
  data: Mapping[str, Any],
) -> dict[str, Any]:
  """`config.data` of what is read: the run's own unless another is named."""
  saved = dict((model.config or {}).get("data", {}))
  name = data.get("name", saved.get("name", "text"))
  elsewhere = source and not takes({"name": name}, "source")
  if name != saved.get("name", "text") or elsewhere:
    # Other data have other options.
    saved, name = {}, data.get("name", "text")
  needed = {k: v for k, v in _ANY.items() if takes({"name": name}, k)}
  text = dict(_TEXT)
  if pair := model.objective_spec.get("pair_task"):
    text["instances"] = dict(name=pair)  # others have no `pair_labels`
  spec = {**needed, **(text if name == "text" else {}), **saved}
  other = source or "source" in data or "source" not in saved
  if name == "text" and other:
    # Guessing needs frequencies, and a foreign source may have one split only.
    spec["train_split"] = split
  if model.preprocess and name in ("text", "task"):
    spec["preprocess"] = model.preprocess
  spec |= {} if source is None else {"source": dict(source)}
  return spec | dict(data) | {"name": name}


def _what(
  spec: Mapping[str, Any], split: str, rows: int, read: Mapping[str, int]
) -> str:
  """What values depend on beside the model: two runs of this may differ.

  Args:
    spec: `config.data`.
    split: of its source.
    rows: that it has.
    read: by evaluator, at most how many of them it reads; the others read all.
  """
  source = spec.get("source") or spec.get("task") or spec
  lengths = [f"{k}={spec[k]}" for k in ("seq_len", "num_points") if k in spec]
  parts = [f"{name} reads {n}" for name, n in read.items() if n < rows]
  return (
    f"{source.get('name', spec['name'])}, split {split!r}, {rows} rows of"
    f" {', '.join(lengths)}"
    + (f", of which {', '.join(parts)}" if parts else "")
  )


def _told_apart(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Values of evaluators by name, preceded by theirs where several give it."""
  counts = collections.Counter(
    name for values in found.values() for name in values
  )
  return {
    f"{evaluator}/{name}" if counts[name] > 1 else name: value
    for evaluator, values in found.items()
    for name, value in values.items()
  }


def evaluate(
  path: str | os.PathLike,
  *,
  split: str = "test",
  source: Mapping[str, Any] | None = None,
  evaluators: Sequence[str] | None = None,
  num_batches: int | None = None,
  num_rows: int = 16,
  data: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Metrics of a model on a split of a source, which is told first.

  Args:
    path: a workdir, or a published folder.
    split: of the source.
    source: a name of `SOURCES`, or of points of `SHAPE_SOURCES`, and its
      options; by default that of the run, or `python_docs` for a published
      model.
    evaluators: names of `EVALUATORS` but "replicas"; by default those that suit
      the data.
    num_batches: of the evaluator "objective"; 0 reads the whole split, None as
      much as suits the data: some of a corpus, all of what is labelled.
    num_rows: of the evaluator "pseudo_perplexity".
    data: options of `config.data` to replace, such as `seq_len`, or with `name`
      a row of `DATA` and its options; the tokenizer is the model's.

  Returns:
    Values by name; one that several evaluators measure is preceded by theirs,
    as in "objective/accuracy".

  Raises:
    ValueError: unknown names, a model that does not fit the data, or a folder
      that holds no model.
  """
  if "replicas" in (evaluators or ()):
    raise ValueError(
      "evaluators: 'replicas' compares the devices of a run under way; a saved"
      " model is on one. Set config.evals.replicas of the run instead."
    )
  if "tokenizer" in (data or {}):
    raise ValueError(
      f"data.tokenizer={data['tokenizer']!r}: a model reads by its own"
      " tokenizer; leave it out."
    )
  model = load_model(path)
  spec = _data_spec(model, split, source, data or {})
  if takes(spec, "tokenizer"):
    spec["tokenizer"] = model.need_tokenizer()
  cache = (model.config or {}).get("cache_dir")
  built = build_data(spec, seed=0, cache_dir=cache_path(cache))
  # What does not say so, as older runs, has one label a text.
  built.objective({"multilabel": False, **model.objective_spec})
  stream = built.dataset(split).reseeded(EVALUATION_SEED)
  chosen, rows = evaluators or built.evaluators, stream.rows_per_epoch(0)
  if num_batches is None:
    num_batches = built.evaluated_batches
  most = {"pseudo_perplexity": num_rows}
  if num_batches:
    most["objective"] = num_batches * built.batch_size
  read = {name: most[name] for name in chosen if name in most}
  hosts.say(f"Evaluating {path} on {_what(spec, split, rows, read)}.")
  # One device: the batch need not divide over anything.
  mesh = make_mesh(devices=jax.devices()[:1])
  options = {
    "objective": {"num_batches": num_batches or None},
    "pseudo_perplexity": {"num_rows": num_rows},
  }
  baseline, found = {}, {}
  for name in chosen:
    evaluator = registry.build(
      _MEASURES,
      {"name": name, "split": split, **options.get(name, {})},
      "evaluators",
      objective=model.objective,
      data=built,
      mesh=mesh,
    )
    baseline |= evaluator.baseline()  # the same of all who have one
    found[name] = evaluator(model.variables, jax.random.key(0))
  return baseline | _told_apart(found)


_MODEL = flags.DEFINE(cli.PATH, "model", None, cli.MODEL)
_SPLIT = flags.DEFINE_string("split", "test", "Split of the source.")
_SOURCE = flags.DEFINE_string("source", None, "JSON of the source's options.")
_DATA_FLAG = flags.DEFINE_string("data", None, "JSON of options of data.")
_EVALUATORS = flags.DEFINE_list(
  "evaluators",
  None,
  f"What to measure, of {', '.join(_MEASURES)}; by default what suits the"
  " data.",
)
_NUM_BATCHES = flags.DEFINE_integer(
  "num_batches",
  None,
  "Batches that the objective reads, 0: all; by default some of a corpus, all"
  " of what is labelled.",
  lower_bound=0,
)
_NUM_ROWS = flags.DEFINE_integer(
  "num_rows", 16, "Rows for the perplexity.", lower_bound=1
)


def main(argv: list[str]) -> None:
  if len(argv) > 1 or not _MODEL.value:
    raise app.UsageError("Usage: python -m bertjax.evaluate --model=FOLDER")
  cli.quiet()
  cli.keep_compiled()
  with cli.clear_errors():
    values = evaluate(
      _MODEL.value,
      split=_SPLIT.value,
      source=cli.json_object("source", _SOURCE.value or None),
      evaluators=_EVALUATORS.value,
      num_batches=_NUM_BATCHES.value,
      num_rows=_NUM_ROWS.value,
      data=cli.json_object("data", _DATA_FLAG.value or None),
    )
  for name, value in values.items():
    print(f"{name:24s} {value:.6g}")


if __name__ == "__main__":
  cli.run(main)
