"""Labelled examples from files and TFDS: whole records, not documents.

Pre-training sources give texts; a task wants several fields, also lists and
nested ones. These sources keep every field and share the rest (patterns,
splits, ids, fingerprints, errors, the option `split`) with
`bertjax.data.sources`.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bertjax import registry
from bertjax.data.sources import base, files, formats
from bertjax.data.sources.files import Record
from bertjax.data.sources.options import with_changes
from bertjax.data.sources.package_docstrings import PackageDocstrings
from bertjax.data.sources.tfds_source import TfdsSource

Reader = Callable[..., Iterator[dict[str, Any]]]


def _read(path: str, *, rows: Reader, **options: Any) -> Iterator[Record]:
  for number, fields in enumerate(rows(path, **options), 1):
    yield Record(number, None, fields)


def _jsonl(path: str, encoding: str) -> Iterator[dict[str, Any]]:
  with files.open_text(path, encoding) as f:
    for number, line in enumerate(f, 1):
      if line.strip():
        try:
          yield dict(json.loads(line))
        except (TypeError, ValueError) as err:
          raise ValueError(
            f"{path}, line {number} is no JSON object: {err}."
          ) from err


def _csv(path: str, **options: Any) -> Iterator[dict[str, Any]]:
  return (cells for _, cells in formats.read_cells(path, **options))


def _cells(line: str) -> list[str]:
  """Cells between tabs, which may hold spaces; without any, between spaces.

  Spaces are those of ASCII: a no-break space belongs to its word.
  """
  if "\t" in line:
    return [cell.strip(" ") for cell in line.rstrip(" \t\r\n").split("\t")]
  return re.findall(r"\S+", line, re.ASCII)


def _columns(
  path: str, encoding: str, word_column: int, label_column: int
) -> Iterator[dict[str, Any]]:
  words, labels = [], []
  with files.open_text(path, encoding) as f:
    for number, line in enumerate([*f, ""], 1):
      cells = _cells(line)
      if any(cells) and cells[0] != "-DOCSTART-":
        try:
          words.append(cells[word_column])
          labels.append(cells[label_column])
        except IndexError as err:
          raise ValueError(
            f"{path}, line {number} has {len(cells)} columns, too few for"
            f" word_column={word_column} and label_column={label_column}."
          ) from err
      elif words:
        yield {"words": words, "labels": labels}
        words, labels = [], []


def _squad(path: str, encoding: str) -> Iterator[dict[str, Any]]:
  with files.open_text(path, encoding) as f:
    try:
      for article in json.load(f)["data"]:
        for paragraph in article["paragraphs"]:
          for question in paragraph["qas"]:
            yield _asked(question, paragraph["context"])
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as err:
      raise ValueError(
        f"{path} is not as SQuAD, one JSON object of articles with 'paragraphs'"
        f" and 'qas' under 'data' ({type(err).__name__}: {err}). Objects with"
        " the fields of the task, one a line, are for the source 'jsonl'."
      ) from err


def _asked(question: Any, context: Any) -> dict[str, Any]:
  answers = question.get("answers", [])
  return {
    "id": question["id"],
    "context": context,
    "question": question["question"],
    "answers": {
      key: [a[key] for a in answers] for key in ("text", "answer_start")
    },
  }


def _files(name: str, rows: Reader, **options: Any) -> Callable[..., Any]:
  """A builder over files, with the format's options and their defaults."""

  def build(paths, fractions, licence, **given):
    return files.file_source(
      name,
      paths,
      functools.partial(_read, rows=rows),
      {"encoding": "utf-8"} | options | given,
      fractions,
      licence,
    )

  return build


def jsonl(paths, encoding="utf-8", fractions=None, licence="unknown"):
  """One JSON object a line."""
  return _files("jsonl", _jsonl)(paths, fractions, licence, encoding=encoding)


def csv_table(
  paths,
  delimiter: str | None = None,
  columns: Sequence[str] | None = None,
  quotes: bool | None = None,
  encoding: str = "utf-8",
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
):
  """Tables; for the options see `bertjax.data.sources.formats.csv`."""
  options = dict(
    delimiter=delimiter,
    columns=None if columns is None else tuple(columns),
    quotes=quotes,
    encoding=encoding,
  )
  return _files("csv", _csv)(paths, fractions, licence, **options)


def columns(
  paths,
  word_column: int = 0,
  label_column: int = -1,
  encoding: str = "utf-8",
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
):
  """A word and its tag a line, blank lines between sentences (CoNLL)."""
  options = dict(
    word_column=word_column, label_column=label_column, encoding=encoding
  )
  return _files("columns", _columns)(paths, fractions, licence, **options)


def squad_json(paths, encoding="utf-8", fractions=None, licence="unknown"):
  """The JSON files of SQuAD 1.1 and 2.0."""
  return _files("squad", _squad)(paths, fractions, licence, encoding=encoding)


def docstrings(
  packages: Sequence[str],
  min_words: int = 5,
  fractions: Mapping[str, float] | None = None,
) -> base.HashSplit:
  """Docstrings of installed packages, dealt out by the hash of their text."""
  shares = fractions or {"train": 0.8, "validation": 0.1, "test": 0.1}
  return base.HashSplit(PackageDocstrings(tuple(packages), min_words), shares)


class TfdsRecords(TfdsSource):
  """All fields of a prepared TFDS dataset."""

  def __init__(
    self,
    builder: str,
    fields: Sequence[str],
    data_dir: str | None = None,
    splits: Mapping[str, str] | None = None,
    licence: str = "unknown",
  ):
    first, *rest = fields
    super().__init__(builder, first, rest, data_dir, splits, licence)
    self._fields = tuple(fields)

  def examples(self, split: str) -> Iterator[base.Example]:
    base.check_split(self, split)
    config = self._tfds.ReadConfig(
      interleave_cycle_length=1, add_tfds_id=True, try_autocache=False
    )
    try:
      dataset = self._builder.as_dataset(
        split=self._splits[split], shuffle_files=False, read_config=config
      )
    except AssertionError as err:
      raise ValueError(self._unprepared()) from err
    records = (
      {"id": files.plain(r["tfds_id"])}
      | {k: files.plain(r[k]) for k in self._fields}
      for r in self._tfds.as_numpy(dataset)
    )
    return base.nonempty(records, self.name, split)


def tfds(
  builder: str,
  fields: Sequence[str],
  data_dir: str | None = None,
  splits: Mapping[str, str] | None = None,
  licence: str = "unknown",
) -> TfdsRecords:
  """A dataset that TFDS has prepared; needs the extra `tfds`."""
  return TfdsRecords(builder, fields, data_dir, splits, licence)


READERS: dict[str, Callable[..., base.Source]] = {
  name: with_changes(builder, ("split",))
  for name, builder in {
    "columns": columns,
    "csv": csv_table,
    "docstrings": docstrings,
    "jsonl": jsonl,
    "squad": squad_json,
    "tfds": tfds,
  }.items()
}


def build_source(
  spec: Mapping[str, Any], fields: Sequence[str], field: str
) -> base.Source:
  """The source of a task.

  Args:
    spec: a row of `READERS` and its options.
    fields: what the task reads; TFDS is told.
    field: the config field that holds `spec`, for messages.
  """
  context = {"fields": tuple(fields)} if spec.get("name") == "tfds" else {}
  return registry.build(READERS, spec, field, **context)
