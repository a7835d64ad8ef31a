"""Public corpora as rows: which reader, which field, which licence.

None is downloaded. `prepare` says how to get the data to `data_dir`; every
reader below is tested on small files of the same format.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from bertjax import registry
from bertjax.data.sources import base, formats, pubmed, tfds_source

_READERS = {
  "csv": formats.csv,
  "jsonl": formats.jsonl,
  "parquet": formats.parquet,
  "pubmed_xml": pubmed.pubmed_xml,
  "text_files": formats.text_files,
  "tfds": tfds_source.tfds,
  "tfrecord": formats.tfrecord,
}
# Corpora that come as one split: documents are dealt out by hash.
_HELD_OUT = {"train": 0.98, "validation": 0.01, "test": 0.01}


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One row.

  Attributes:
    reader: name of a reader.
    options: its options; "{language}" is filled in. `paths` lie below the
      corpus's `data_dir`.
    licence: of the texts.
    prepare: how to get the data.
    language: default for "{language}", None when there is no choice.
  """

  reader: str
  options: Mapping[str, Any]
  licence: str
  prepare: str
  language: str | None = None


def _tfds(builder, licence, text_field="text", language=None, **options):
  return Corpus(
    "tfds",
    {"builder": builder, "text_field": text_field, **options},
    licence,
    f"tfds build {builder}",
    language,
  )


_THREE = {"train": "train", "validation": "validation", "test": "test"}
_TWO = {"train": "train", "test": "test"}
_C4 = {"train": "train", "validation": "validation"}
_ONE = dict(splits={"train": "train"}, fractions=_HELD_OUT)

CORPORA: dict[str, Corpus] = {
  "arxiv_papers": _tfds(
    "scientific_papers/arxiv",
    "authors' copyright; for research",
    "article",
    splits=_THREE,
  ),
  "big_patent": _tfds(
    "big_patent/all", "CC-BY-4.0", "description", splits=_THREE
  ),
  "books": Corpus(
    "text_files",
    dict(paths="**/*.txt", documents="file", fractions=_HELD_OUT),
    "as the books: check each",
    "a folder of one text file a book (BookCorpus form: set `documents`)",
  ),
  "c4": _tfds("c4/en", "ODC-BY 1.0 and Common Crawl terms", splits=_C4),
  "cc100": Corpus(
    "text_files",
    dict(paths="{language}.txt*", documents="blank_line", fractions=_HELD_OUT),
    "Common Crawl terms",
    "https://data.statmt.org/cc-100: <language>.txt.xz",
    "en",
  ),
  "dolma": Corpus(
    "jsonl",
    dict(paths="**/*.json*", id_field="id", fractions=_HELD_OUT),
    "ODC-BY 1.0",
    "the published .json.gz shards",
  ),
  "fineweb": Corpus(
    "parquet",
    dict(paths="**/*.parquet", id_field="id", fractions=_HELD_OUT),
    "ODC-BY 1.0 and Common Crawl terms",
    "the published Parquet shards",
  ),
  "lm1b": _tfds("lm1b", "Apache-2.0 (WMT news crawl)", splits=_TWO),
  "mc4": _tfds(
    "c4/multilingual",
    "ODC-BY 1.0 and Common Crawl terms",
    language="en",
    splits={"train": "{language}", "validation": "{language}-validation"},
  ),
  "openwebtext": Corpus(
    "jsonl",
    dict(paths="**/*.jsonl*", fractions=_HELD_OUT),
    "CC0 for the packaging; pages as their owners say",
    "JSON lines with `text`",
  ),
  "oscar": Corpus(
    "jsonl",
    dict(
      paths="{language}*/*.jsonl*", text_field="content", fractions=_HELD_OUT
    ),
    "CC0 for the packaging; Common Crawl terms",
    "OSCAR 22.01 or later: <language>_meta/*.jsonl.gz",
    "en",
  ),
  "pg19": _tfds(
    "pg19", "Apache-2.0 (public-domain books)", "book_text", splits=_THREE
  ),
  "pubmed": Corpus(
    "pubmed_xml",
    dict(paths="**/pubmed*.xml*", fractions=_HELD_OUT),
    "NLM: free with attribution; abstracts may be under copyright",
    "https://ftp.ncbi.nlm.nih.gov/pubmed/baseline: pubmed*.xml.gz",
  ),
  "pubmed_papers": _tfds(
    "scientific_papers/pubmed",
    "authors' copyright; for research",
    "article",
    splits=_THREE,
  ),
  "wiki40b": _tfds(
    "wiki40b/{language}", "CC BY-SA 3.0", language="en", splits=_THREE
  ),
  "wikipedia": _tfds(
    "wikipedia/20230601.{language}", "CC BY-SA 3.0", language="en", **_ONE
  ),
  # TFDS knows this older snapshot only where it has been prepared.
  "wikipedia_2022": _tfds(
    "wikipedia/20220301.{language}", "CC BY-SA 3.0", language="en", **_ONE
  ),
}


def _fill(value: Any, language: str | None) -> Any:
  if isinstance(value, str) and language is not None:
    return value.replace("{language}", language)
  if isinstance(value, Mapping):
    return {key: _fill(item, language) for key, item in value.items()}
  return value


def corpus(
  corpus: str,
  data_dir: str | None = None,
  language: str | None = None,
  fractions: Mapping[str, float] | None = None,
) -> base.Source:
  """A public corpus by name.

  Args:
    corpus: key of `CORPORA`.
    data_dir: TFDS's data folder, or the folder of the corpus's files.
    language: for corpora of several languages.
    fractions: instead of the row's own shares; for corpora that are divided
      by hash.

  Raises:
    ValueError: unknown corpus, a language where there is no choice, files
      without `data_dir`, or what the reader raises.
  """
  row = registry.lookup(CORPORA, corpus, "corpus")
  if language is not None and row.language is None:
    raise ValueError(
      f"language={language!r}: corpus {corpus!r} has no choice of languages;"
      " remove it."
    )
  options = _fill(row.options, language or row.language)
  if fractions is not None:
    if "fractions" not in options:
      raise ValueError(
        f"fractions: corpus {corpus!r} has splits of its own; remove them."
      )
    options["fractions"] = fractions
  if "paths" in options:
    if data_dir is None:
      raise ValueError(
        f"data_dir is required for corpus {corpus!r}. How to get it:"
        f" {row.prepare}."
      )
    options["paths"] = os.path.join(data_dir, options["paths"])
  else:
    options["data_dir"] = data_dir
  return _READERS[row.reader](**options, licence=row.licence)
