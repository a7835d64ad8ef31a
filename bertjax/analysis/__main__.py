r"""Measures tokenizers on a corpus from the command line.

  python -m bertjax.analysis fertility --model=runs/quick --model=FOLDER \
      --source='{"name": "text_files", "paths": "docs/*.txt"}' --split=train

A line a folder: a workdir, a published model, or a tokenizer alone.
"""

import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import app, flags

from bertjax import cli, loading, registry
from bertjax.analysis import ANALYSES
from bertjax.checkpoint import located
from bertjax.data.sources import SOURCES, text_function
from bertjax.data.tokenizers import load_tokenizer
from bertjax.interop import published


def measure(
  analysis: str,
  folder: str,
  source: Mapping[str, Any],
  *,
  split: str = "train",
  max_documents: int | None = None,
) -> dict[str, float]:
  """One analysis of one tokenizer on a split.

  Args:
    analysis: key of `ANALYSES`.
    folder: a workdir (of a grid or of stages as `load_model` reads it), a
      published model, or a tokenizer alone.
    source: a name of `SOURCES` and its options.
    split: of the source.
    max_documents: read at most so many.

  Raises:
    ValueError: unknown names, or a folder without a tokenizer.
  """
  run = registry.lookup(ANALYSES, analysis, "analysis")
  built = registry.build(SOURCES, source, "source")

  def texts() -> Iterator[str]:
    examples = itertools.islice(built.examples(split), max_documents)
    return (example["text"] for example in examples)

  path = pathlib.Path(located(folder))
  if (path / "checkpoints").is_dir():  # the rest needs no weights, nor a spec
    found = loading.describe(folder)
    if found.tokenizer is None:
      raise ValueError(f"{folder} holds no tokenizer.")
    path, preprocess = found.tokenizer, found.preprocess
  else:
    preprocess = published.read_preprocess(path)
  clean = text_function(preprocess, "data.preprocess")
  return run(load_tokenizer(path), texts(), clean)


def _define_flags() -> None:
  flags.DEFINE_multi(
    cli.PATH,
    flags.ArgumentSerializer(),
    "model",
    [],
    "Folder; may be given several times.",
  )
  flags.DEFINE_string(
    "source", '{"name": "python_docs"}', "JSON of the source's options."
  )
  flags.DEFINE_string("split", "test", "Split of the source.")
  flags.DEFINE_integer(
    "max_documents", None, "Read at most so many.", lower_bound=1
  )


def main(argv: list[str]) -> None:
  f = flags.FLAGS
  if len(argv) != 2 or not f.model:
    raise app.UsageError(
      f"Usage: python -m bertjax.analysis {'|'.join(ANALYSES)} --model=FOLDER"
    )
  cli.quiet()
  cli.keep_compiled()
  with cli.clear_errors():
    source = cli.json_object("source", f.source)
    for folder in f.model:
      values = measure(
        argv[1],
        folder,
        source,
        split=f.split,
        max_documents=f.max_documents,
      )
      shown = "  ".join(f"{name} {value:.6g}" for name, value in values.items())
      print(f"{folder}  {shown}")


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
