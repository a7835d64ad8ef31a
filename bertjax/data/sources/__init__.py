"""Sources of text by name: `registry.build(SOURCES, config, "data.source")`.

Every source also takes `preprocess`, `filters`, `select` and `split`: rows of
`PREPROCESSORS`, of `FILTERS`, arguments of `Selected`, a row of `SPLITS`. They
act in this order.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.data.sources.base import Example, HashSplit, Source
from bertjax.data.sources.corpora import CORPORA, corpus
from bertjax.data.sources.filters import FILTERS, Filtered
from bertjax.data.sources.formats import (
  csv,
  jsonl,
  parquet,
  text_files,
  tfrecord,
)
from bertjax.data.sources.grammar import Grammar
from bertjax.data.sources.mixture import Mixture
from bertjax.data.sources.options import CHANGES, with_changes
from bertjax.data.sources.preprocess import (
  PREPROCESSORS,
  Preprocessed,
  text_function,
)
from bertjax.data.sources.pubmed import pubmed_xml
from bertjax.data.sources.python_docs import PythonDocs
from bertjax.data.sources.select import SCORERS, Selected
from bertjax.data.sources.seqio_source import seqio, to_seqio_task
from bertjax.data.sources.splits import SPLITS
from bertjax.data.sources.tfds_source import tfds

__all__ = [
  "CORPORA",
  "FILTERS",
  "PREPROCESSORS",
  "SCORERS",
  "SOURCES",
  "SPLITS",
  "Example",
  "Filtered",
  "Grammar",
  "HashSplit",
  "Mixture",
  "Preprocessed",
  "PythonDocs",
  "Selected",
  "Source",
  "text_function",
  "to_seqio_task",
]


def _mixture(
  sources: Sequence[Mapping[str, Any]],
  dupe_factors: Sequence[float] | None = None,
  weights: Sequence[float] | None = None,
  alpha: float | None = None,
  targets: Sequence[float] | None = None,
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
    targets=targets,
    unit=unit,
  )


SOURCES: dict[str, Callable[..., Source]] = {
  name: with_changes(builder, tuple(CHANGES))
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
