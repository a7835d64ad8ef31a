"""Sources of text by name: `registry.build(SOURCES, config, "data.source")`.

Every source takes `preprocess`, a list of names of `PREPROCESSORS`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.data.sources.base import Example, HashSplit, Source
from bertjax.data.sources.corpora import CORPORA, corpus
from bertjax.data.sources.formats import (
  csv,
  jsonl,
  parquet,
  text_files,
  tfrecord,
)
from bertjax.data.sources.grammar import Grammar
from bertjax.data.sources.mixture import Mixture
from bertjax.data.sources.preprocess import PREPROCESSORS, Preprocessed
from bertjax.data.sources.pubmed import pubmed_xml
from bertjax.data.sources.python_docs import PythonDocs
from bertjax.data.sources.seqio_source import seqio, to_seqio_task
from bertjax.data.sources.tfds_source import tfds

__all__ = [
  "CORPORA",
  "PREPROCESSORS",
  "SOURCES",
  "Example",
  "Grammar",
  "HashSplit",
  "Mixture",
  "Preprocessed",
  "PythonDocs",
  "Source",
  "to_seqio_task",
]


def _mixture(
  sources: Sequence[Mapping[str, Any]],
  dupe_factors: Sequence[float] | None = None,
  weights: Sequence[float] | None = None,
  alpha: float | None = None,
  unit: str = "characters",
) -> Mixture:
  """`Mixture` of sources that are themselves rows of `SOURCES`."""
  built = [
    registry.build(SOURCES, spec, f"data.source.sources[{i}]")
    for i, spec in enumerate(sources)
  ]
  return Mixture(
    built,
    dupe_factors=dupe_factors,
    weights=weights,
    alpha=alpha,
    unit=unit,
  )


def _with_preprocess(builder: Callable[..., Source]) -> Callable[..., Source]:
  """The same builder with one more option, `preprocess`."""

  @functools.wraps(builder)
  def build(*args, preprocess: Sequence[str] = (), **options):
    source = builder(*args, **options)
    return Preprocessed(source, preprocess) if preprocess else source

  signature = inspect.signature(builder)
  option = inspect.Parameter(
    "preprocess", inspect.Parameter.KEYWORD_ONLY, default=()
  )
  build.__signature__ = signature.replace(
    parameters=[*signature.parameters.values(), option]
  )
  return build


SOURCES: dict[str, Callable[..., Source]] = {
  name: _with_preprocess(builder)
  for name, builder in {
    "corpus": corpus,
    "csv": csv,
    "grammar": Grammar,
    "jsonl": jsonl,
    "mixture": _mixture,
    "parquet": parquet,
    "pubmed_xml": pubmed_xml,
    "python_docs": PythonDocs,
    "seqio": seqio,
    "text_files": text_files,
    "tfds": tfds,
    "tfrecord": tfrecord,
  }.items()
}
