"""Plain formats: text, JSON lines, CSV, Parquet, TFRecord."""

import csv as csv_lib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bertjax.data.sources import base, remote
from bertjax.data.sources.files import (
  BYTES,
  OPENERS,
  Record,
  file_source,
  open_text,
  pick,
)

_WHOLE_FILES = (
  'A file is one document here; documents="blank_line" divides files at blank'
  " lines."
)


def read_text(path: str, documents: str, encoding: str) -> Iterator[Record]:
  """One document a file, or documents between blank lines."""
  with open_text(path, encoding) as f:
    if documents == "file":
      yield Record(0, f.read())
      return
    begin, lines = 1, []
    for number, line in enumerate(f, 1):
      if line.strip():
        begin = begin if lines else number
        lines.append(line.rstrip("\r\n"))
      elif lines:
        yield Record(begin, "\n".join(lines))
        lines = []
    if lines:
      yield Record(begin, "\n".join(lines))


def read_jsonl(path: str, encoding: str, **fields: Any) -> Iterator[Record]:
  """One JSON object a line; blank lines are passed over."""
  with open_text(path, encoding) as f:
    for number, line in enumerate(f, 1):
      if not line.strip():
        continue
      where = f"{path}, line {number}"
      try:
        record = json.loads(line)
      except json.JSONDecodeError as err:
        raise ValueError(f"{where} is not JSON: {err}.") from err
      if not isinstance(record, dict):
        raise ValueError(f"{where} holds no JSON object: {line[:40]!r}.")
      text, key, features = pick(record, where, **fields)
      yield Record(number, text, features, key)


def read_cells(
  path: str,
  encoding: str,
  delimiter: str | None,
  columns: Sequence[str] | None,
  quotes: bool | None,
) -> Iterator[tuple[int, dict[str, str]]]:
  """Line number and cells by column of a table's rows; see `csv`.

  Raises:
    ValueError: a row of more or fewer cells than there are columns, or a
      quotation mark that none closes.
  """
  bare = path
  while os.path.splitext(bare)[1] in OPENERS:
    bare = os.path.splitext(bare)[0]
  if delimiter is None:
    delimiter = "\t" if bare.endswith((".tsv", ".tab")) else ","
  if quotes is None:
    quotes = delimiter != "\t"
  # A document may be longer than csv's 128 kB; the limit is the library's own.
  csv_lib.field_size_limit(min(sys.maxsize, 2**31 - 1))
  quoting = csv_lib.QUOTE_MINIMAL if quotes else csv_lib.QUOTE_NONE
  question = f"are delimiter={delimiter!r} and quotes={quotes} right?"
  with open_text(path, encoding) as f:
    # strict: else a mark that none closes takes the rest of the file for a cell
    rows = csv_lib.reader(f, delimiter=delimiter, quoting=quoting, strict=True)
    begin = 1
    try:
      header = list(columns) if columns is not None else next(rows, [])
      begin = rows.line_num + 1
      for row in rows:
        if row and len(row) != len(header):
          raise ValueError(
            f"{path}, line {rows.line_num} has {len(row)} cells, not"
            f" {len(header)} ({', '.join(header)}); {question}"
          )
        if row:
          yield rows.line_num, dict(zip(header, row))
        begin = rows.line_num + 1
    except csv_lib.Error as err:
      raise ValueError(
        f"{path}, line {begin} begins no whole row ({err}); {question}"
      ) from err


def read_csv(
  path: str,
  encoding: str,
  delimiter: str | None,
  columns: Sequence[str] | None,
  quotes: bool | None,
  **fields: Any,
) -> Iterator[Record]:
  """Rows under a header, or under given column names."""
  for number, cells in read_cells(path, encoding, delimiter, columns, quotes):
    text, key, features = pick(cells, f"{path}, line {number}", **fields)
    yield Record(number, text, features, key)


def read_parquet(
  path: str, text_field: str, id_field: str | None, features: Sequence[str]
) -> Iterator[Record]:
  """Rows of a Parquet file; reads only the columns it needs."""
  import pyarrow.parquet

  try:
    table = pyarrow.parquet.ParquetFile(
      remote.open_raw(path) if remote.is_url(path) else path
    )
  except pyarrow.ArrowInvalid as err:
    raise ValueError(f"{path} is not a whole Parquet file: {err}") from err
  with table:
    names = dict.fromkeys(table.schema_arrow.names)
    wanted = [n for n in (text_field, id_field, *features) if n is not None]
    for name in wanted:
      if name not in names:
        raise ValueError(
          f"{path} has no column {name!r}; it has {', '.join(sorted(names))}."
        )
    number = 0
    for batch in table.iter_batches(
      batch_size=1024, columns=list(dict.fromkeys(wanted))
    ):
      for record in batch.to_pylist():
        where = f"{path}, row {number}"
        text, key, rest = pick(record, where, text_field, id_field, features)
        yield Record(number, text, rest, key)
        number += 1


def read_tfrecord(path: str, **fields: Any) -> Iterator[Record]:
  """tf.Example records; a feature of one value is that value."""
  from bertjax.data.sources import tensorflow_io

  for number, record in enumerate(tensorflow_io.read_examples(path)):
    text, key, features = pick(record, f"{path}, record {number}", **fields)
    yield Record(number, text, features, key)


# Builders: rows of `SOURCES`.


def text_files(
  paths,
  documents: str = "file",
  encoding: str = "utf-8",
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
) -> base.Source:
  """Plain text.

  Args:
    paths: patterns, or patterns by split.
    documents: "file": one document a file; "blank_line": documents between
      blank lines, one sentence a line, as in BERT's input files (use the
      splitter "lines").
    encoding: of the files.
    fractions: share of each split, by hash of the text.
    licence: of the texts.
  """
  if documents not in ("file", "blank_line"):
    raise ValueError(f"documents={documents!r} must be 'file' or 'blank_line'.")
  options = dict(documents=documents, encoding=encoding)
  hints = {"examples": _WHOLE_FILES} if documents == "file" else {}
  return file_source(
    "text_files", paths, read_text, options, fractions, licence, hints
  )


def jsonl(
  paths,
  text_field: str = "text",
  id_field: str | None = None,
  features: Sequence[str] = (),
  encoding: str = "utf-8",
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
) -> base.Source:
  """One JSON object a line; `features` are further fields to keep."""
  options = dict(
    text_field=text_field,
    id_field=id_field,
    features=tuple(features),
    encoding=encoding,
  )
  return file_source("jsonl", paths, read_jsonl, options, fractions, licence)


def csv(
  paths,
  text_field: str = "text",
  id_field: str | None = None,
  features: Sequence[str] = (),
  delimiter: str | None = None,
  columns: Sequence[str] | None = None,
  quotes: bool | None = None,
  encoding: str = "utf-8",
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
) -> base.Source:
  """Tables.

  Args:
    paths: patterns, or patterns by split.
    text_field: column of the document.
    id_field: column of its id.
    features: further columns to keep.
    delimiter: None is a tab in .tsv and .tab files, else a comma.
    columns: names of those of files without a header.
    quotes: whether a cell may stand in `"`, with delimiters and line ends in
      it. None: unless cells are divided by tabs, for such tables, GLUE's among
      them, hold single quotation marks.
    encoding: of the files.
    fractions: share of each split, by hash of the text.
    licence: of the texts.
  """
  options = dict(
    text_field=text_field,
    id_field=id_field,
    features=tuple(features),
    delimiter=delimiter,
    columns=None if columns is None else tuple(columns),
    quotes=quotes,
    encoding=encoding,
  )
  return file_source("csv", paths, read_csv, options, fractions, licence)


def parquet(
  paths,
  text_field: str = "text",
  id_field: str | None = None,
  features: Sequence[str] = (),
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
) -> base.Source:
  """Parquet files, read in batches of rows."""
  options = dict(
    text_field=text_field, id_field=id_field, features=tuple(features)
  )
  return file_source(
    "parquet",
    paths,
    read_parquet,
    options,
    fractions,
    licence,
    identity={"bytes": BYTES} if features else {},
  )


def tfrecord(
  paths,
  text_field: str = "text",
  id_field: str | None = None,
  features: Sequence[str] = (),
  fractions: Mapping[str, float] | None = None,
  licence: str = "unknown",
) -> base.Source:
  """TFRecord files of tf.Example; needs the extra `tfds`."""
  options = dict(
    text_field=text_field, id_field=id_field, features=tuple(features)
  )
  return file_source(
    "tfrecord",
    paths,
    read_tfrecord,
    options,
    fractions,
    licence,
    identity={"bytes": BYTES} if features else {},
  )
