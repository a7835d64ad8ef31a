r"""Evaluates a trained run or a published checkpoint on any source.

  python -m bertjax.evaluate --model=runs/quick --split=test
  python -m bertjax.evaluate --model=FOLDER --split=train \
      --source='{"name": "text_files", "train": "docs/*.txt"}'

Masked accuracy and loss, beside what guessing by frequency achieves, and
pseudo-perplexity.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from bertjax import cli, registry
from bertjax.config import cache_path
from bertjax.data.text import TextData
from bertjax.evals import EVALUATORS, unigram_baseline
from bertjax.evals.objective import read_batches
from bertjax.loading import load_model
from bertjax.parallel.mesh import make_mesh

# For a published model, which brings no `data` of its own.
_DATA = dict(
  source=dict(name="python_docs"),
  seq_len=128,
  batch_size=32,
  instances=dict(name="packed"),
  masking=dict(rate=0.15),
)


def evaluate(
  path: str | os.PathLike,
  *,
  split: str = "test",
  source: Mapping[str, Any] | None = None,
  evaluators: Sequence[str] = ("objective", "pseudo_perplexity"),
  num_batches: int | None = 50,
  num_rows: int = 16,
  data: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """Metrics of a model on a split of a source.

  Args:
    path: a workdir, or a published folder.
    split: of the source.
    source: a name of `SOURCES` and its options; by default that of the run, or
      `python_docs` for a published model.
    evaluators: names of `EVALUATORS`.
    num_batches: of the evaluator "objective"; None reads the whole split.
    num_rows: of the evaluator "pseudo_perplexity".
    data: further options of `TextData` to replace, such as `seq_len`.

  Raises:
    ValueError: unknown names, or a folder that holds no model.
  """
  model = load_model(path)
  saved = {}
  if model.origin == "workdir":
    config = json.loads((pathlib.Path(path) / "config.json").read_text())
    if config.get("data", {}).pop("name", "text") == "text":
      saved = config.get("data", {})
  spec = {**_DATA, **saved, **(data or {})}
  if source is not None:
    spec["source"] = dict(source)
  text = registry.call(
    TextData,
    spec | {"tokenizer": model.need_tokenizer()},
    "data",
    seed=0,
    cache_dir=cache_path(),
  )
  # One device: the batch need not divide over anything.
  mesh = make_mesh(devices=jax.devices()[:1])
  options = {
    "objective": {"num_batches": num_batches},
    "pseudo_perplexity": {"num_rows": num_rows},
  }
  values = unigram_baseline(
    text.token_counts(split),
    read_batches(text, split, num_batches, None),
  )
  for name in evaluators:
    evaluator = registry.build(
      EVALUATORS,
      {"name": name, "split": split, **options.get(name, {})},
      "evaluators",
      objective=model.objective,
      data=text,
      mesh=mesh,
    )
    values |= evaluator({"params": model.params}, jax.random.key(0))
  return values


_MODEL = flags.DEFINE_string("model", None, "Workdir or published folder.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the source.")
_SOURCE = flags.DEFINE_string("source", None, "JSON of the source's options.")
_DATA_FLAG = flags.DEFINE_string("data", None, "JSON of TextData's options.")
_EVALUATORS = flags.DEFINE_list(
  "evaluators", ["objective", "pseudo_perplexity"], "What to measure."
)
_NUM_BATCHES = flags.DEFINE_integer("num_batches", 50, "Batches to read.")
_NUM_ROWS = flags.DEFINE_integer("num_rows", 16, "Rows for the perplexity.")


def main(argv: list[str]) -> None:
  if len(argv) > 1 or not _MODEL.value:
    raise app.UsageError("Usage: python -m bertjax.evaluate --model=FOLDER")
  cli.quiet()
  with cli.clear_errors():
    values = evaluate(
      _MODEL.value,
      split=_SPLIT.value,
      source=json.loads(_SOURCE.value) if _SOURCE.value else None,
      evaluators=_EVALUATORS.value,
      num_batches=_NUM_BATCHES.value,
      num_rows=_NUM_ROWS.value,
      data=json.loads(_DATA_FLAG.value) if _DATA_FLAG.value else None,
    )
  for name, value in values.items():
    print(f"{name:24s} {value:.6g}")


if __name__ == "__main__":
  app.run(main)
