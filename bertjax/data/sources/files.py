"""Files as sources: patterns, splits, ids, fingerprints, errors.

A format (`formats.py`) is a function from a path to numbered records;
`FileSource` does the rest. Names that end in .gz, .bz2, .xz or .zst are read
compressed; a byte order mark at the start of UTF-8 is no text. Paths may be
URLs (`remote`).
"""

import bz2
import codecs
import functools
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bertjax.data.sources import base, remote


def _open_zstd(path: str | io.BufferedIOBase, mode: str) -> io.BufferedIOBase:
  """Reads Zstandard, of one frame or several; `mode` is "rb"."""
  import pyarrow

  raw = pyarrow.OSFile(path, mode) if isinstance(path, str) else path
  return pyarrow.CompressedInputStream(raw, "zstd")


OPENERS = {
  ".gz": gzip.open,
  ".bz2": bz2.open,
  ".xz": lzma.open,
  ".zst": _open_zstd,
}
_WHOLE = 64 * 2**20  # bytes up to which a file's full content is hashed
_DIVIDE = (
  "Its option fractions, such as dict(train=0.9, test=0.1), divides it by the"
  " hash of the text."
)
_SAMPLES, _SAMPLE = 16, 2**20
# Identifies sources whose features may be bytes; 2: as strings, not as b'...'.
BYTES = 2


class Record(NamedTuple):
  """What a format yields.

  Attributes:
    key: number or name of the record within its file.
    text: the document; None: there is none, only features.
    features: further features of the example.
    id: the record's own id, if it has one.
  """

  key: int | str
  text: str | None
  features: Mapping[str, Any] = {}
  id: str | None = None


Read = Callable[[str], Iterator[Record]]


def open_binary(path: str) -> io.BufferedIOBase:
  """Opens a file for reading, decompressed by its suffix."""
  opener = OPENERS.get(os.path.splitext(path)[1])
  if not remote.is_url(path):
    return (opener or open)(path, "rb")
  raw = remote.open_raw(path)
  return raw if opener is None else opener(raw, "rb")


def open_text(path: str, encoding: str = "utf-8") -> io.TextIOWrapper:
  """Like `open_binary`, decoded; keeps the file's own line ends."""
  if codecs.lookup(encoding).name == "utf-8":
    encoding = "utf-8-sig"  # passes over a byte order mark
  return io.TextIOWrapper(open_binary(path), encoding=encoding, newline="")


class FileSource:
  """Files that match patterns, one group of patterns a split."""

  def __init__(
    self,
    name: str,
    paths: Mapping[str, Sequence[str]],
    read: Read,
    options: Mapping[str, Any],
    licence: str = "unknown",
    hints: Mapping[str, str] = {},
  ):
    """Args:
    name: for messages.
    paths: patterns (`**` goes into folders) or paths by split.
    read: a format.
    options: of the format; JSON-like, for the fingerprint.
    licence: of the texts.
    hints: see `base.Source`.

    Raises:
      ValueError: a pattern that matches no file, or a file in two splits.
    """
    self.name, self.licence = name, licence
    self.splits, self.hints = tuple(paths), hints
    self._read, self._options = read, dict(options)
    self._files = {
      split: self._match(split, patterns) for split, patterns in paths.items()
    }
    split_of: dict[str, str] = {}
    for split, files in self._files.items():
      for file in files:
        first = split_of.setdefault(_real(file), split)
        if first != split:
          raise ValueError(
            f"paths: {file!r} of source {name!r} is in split {first!r} and in"
            f" {split!r}; it can be in one."
          )
    folders = {
      os.path.dirname(_place(f))
      for files in self._files.values()
      for f in files
    }
    # Ids must not depend on where a corpus lies.
    self._root = os.path.commonpath(folders)

  def _match(self, split: str, patterns: Sequence[str]) -> list[str]:
    found = set()
    for pattern in patterns:
      pattern = str(pattern)
      files = _matching(pattern)
      if not files and remote.is_url(pattern):
        raise ValueError(
          f"paths: {pattern!r} of source {self.name!r}, split {split!r},"
          " matches no file."
        )
      if not files:
        pattern = os.path.expanduser(pattern)
        found_instead = (
          f"is a folder; write {os.path.join(pattern, '*')!r} for its files"
          if os.path.isdir(pattern)
          else f"matches no file (working folder {os.getcwd()})"
        )
        raise ValueError(
          f"paths: {pattern!r} of source {self.name!r}, split {split!r},"
          f" {found_instead}."
        )
      found.update(files)
    kept: dict[str, str] = {}  # under one name each
    for file in sorted(found):
      kept.setdefault(_real(file), file)
    return list(kept.values())

  def _id(self, path: str) -> str:
    inside = os.path.relpath(_place(path), self._root)
    return inside.replace(os.sep, "/")

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      self.name,
      self._options,
      [
        (split, [(self._id(f), content_of(f)) for f in files])
        for split, files in self._files.items()
      ],
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    """`id` = "file:record", the file's path below the folder of all files."""
    read = (example for part in self.parts(split) for example in part())
    return base.nonempty(read, self.name, split)

  def parts(self, split: str) -> Sequence[base.Part]:
    """One a file."""
    base.check_split(self, split)
    return [functools.partial(self._of, path) for path in self._files[split]]

  def _of(self, path: str) -> Iterator[base.Example]:
    for record in self._records(path):
      key = record.id or f"{self._id(path)}:{record.key}"
      text = {} if record.text is None else {"text": record.text}
      yield {"id": key, **text, **record.features}

  def _records(self, path: str) -> Iterator[Record]:
    try:
      yield from self._read(path)
    except UnicodeDecodeError as err:
      raise ValueError(
        f"{undecodable(path, err)}; repair it, or set `encoding` if the file"
        " has another one."
      ) from err
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as err:
      # The system's own errors carry a number and name the file.
      if getattr(err, "errno", None) is not None:
        raise
      raise ValueError(
        f"{path} is not a whole compressed file: {err}."
      ) from err


def _matching(pattern: str) -> list[str]:
  if remote.is_url(pattern):
    return remote.match(pattern)
  pattern = os.path.expanduser(pattern)
  files = [f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f)]
  if os.path.isfile(pattern):
    files.append(pattern)  # a name may hold brackets
  return files


def _place(path: str) -> str:
  """An absolute path, also of a URL, of which relative ones can be taken."""
  return os.path.abspath(f"/{path}" if remote.is_url(path) else path)


def undecodable(path: str, err: UnicodeDecodeError) -> str:
  """Which line of a file is no text, and why; the file if it has no lines."""
  where = _undecodable_line(path, err.encoding) or path
  return (
    f"{where} is not {err.encoding} text ({err.reason}:"
    f" {err.object[err.start : err.start + 4]!r})"
  )


def _real(path: str) -> str:
  """The same for all names of a file; of a URL itself."""
  return path if remote.is_url(path) else os.path.realpath(path)


def _undecodable_line(path: str, encoding: str) -> str | None:
  """Where the first line stands that is no text; None if lines are no bytes."""
  if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):
    return None
  # Latin-1 keeps each byte as it is, whatever kind of stream this is.
  with io.TextIOWrapper(open_binary(path), "latin-1", newline="\n") as lines:
    for number, line in enumerate(lines, 1):
      try:
        line.encode("latin-1").decode(encoding)
      except UnicodeDecodeError:
        return f"{path}, line {number}"
  return None


def content_of(path: str) -> str:
  """Digest of a file's content.

  Files above 64 MB are sampled at 16 places, and their time of change counts:
  hashing a whole Wikipedia would delay every start by half a minute.
  """
  if remote.is_url(path):
    return _digest(path, *remote.size_and_change(path))
  stat = os.stat(path)
  return _digest(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=65_536)
def _digest(path: str, size: int, changed_ns: int) -> str:
  with remote.open_raw(path) if remote.is_url(path) else open(path, "rb") as f:
    if size <= _WHOLE:
      return hashlib.file_digest(f, "sha256").hexdigest()
    digest = hashlib.sha256(f"{size} {changed_ns}".encode())
    for i in range(_SAMPLES):
      f.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
      digest.update(f.read(_SAMPLE))
  return digest.hexdigest()


def file_source(
  name: str,
  paths: str | Sequence[str] | Mapping[str, str | Sequence[str]],
  read: Callable[..., Iterator[Record]],
  options: Mapping[str, Any],
  fractions: Mapping[str, float] | None,
  licence: str,
  hints: Mapping[str, str] = {},
  identity: Mapping[str, Any] = {},
) -> base.Source:
  """A source from a config's options.

  Args:
    name: of the format.
    paths: patterns, or patterns by split.
    read: `read(path, **options)`.
    options: of the format.
    fractions: share of each split, dealt out by the hash of the text; None
      makes everything the training split when `paths` names no splits.
    licence: of the texts.
    hints: see `base.Source`.
    identity: what else decides the examples, for the fingerprint; JSON-like.

  Raises:
    ValueError: splits given twice, by `paths` and by `fractions`; a feature
      whose name has a meaning of its own; an encoding or a delimiter that is
      none.
  """
  try:
    codecs.lookup(options.get("encoding", "utf-8"))
  except LookupError as err:
    raise ValueError(
      f"source {name!r}: encoding={options['encoding']!r} is unknown to Python;"
      " write utf-8, latin-1, utf-16, ..."
    ) from err
  delimiter = options.get("delimiter")
  if delimiter is not None and len(delimiter) != 1:
    raise ValueError(
      f"source {name!r}: delimiter={delimiter!r} must be one character."
    )
  for feature in options.get("features", ()):
    if feature in ("copy", "component"):
      raise ValueError(
        f"source {name!r}: features may not hold {feature!r}, which says how"
        " the document takes part in a mixture; rename the field."
      )
  if hasattr(paths, "items"):
    if fractions is not None:
      raise ValueError(
        f"source {name!r}: paths already names splits"
        f" ({', '.join(paths.keys())}); remove fractions or the names."
      )
    by_split = {k: base.strings(v) for k, v in paths.items()}
  else:
    by_split = {"train": base.strings(paths)}
    hints = {"splits": _DIVIDE, **hints}
  options = {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in options.items()
  }
  bound = functools.partial(read, **options)
  known = {**options, **identity}
  source = FileSource(name, by_split, bound, known, licence, hints)
  return source if fractions is None else base.HashSplit(source, fractions)


def plain(value: Any) -> Any:
  """A value of a record, with lists and strings for arrays and bytes.

  Raises:
    UnicodeDecodeError: bytes that are no UTF-8.
  """
  if isinstance(value, Mapping):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, list):
    return [plain(v) for v in value]
  return value.item() if isinstance(value, np.generic) else value


def _readable(value: Any) -> Any:
  try:
    return plain(value)
  except UnicodeDecodeError:
    return value  # such as a digest, by which examples can still be grouped


def pick(
  record: Mapping[str, Any],
  where: str,
  text_field: str,
  id_field: str | None,
  features: Sequence[str],
) -> tuple[str, str | None, dict[str, Any]]:
  """(text, id, features) of a record; bytes of UTF-8 are strings.

  Raises:
    ValueError: a missing field, or a text that is not a string; names `where`
      and the fields that exist.
  """
  for field in (text_field, id_field, *features):
    if field is not None and field not in record:
      raise ValueError(
        f"{where} has no field {field!r}; it has"
        f" {', '.join(sorted(map(str, record)))}."
      )
  text = record[text_field]
  if isinstance(text, bytes):
    text = text.decode("utf-8")
  if not isinstance(text, str):
    raise ValueError(
      f"{where}: field {text_field!r} holds {type(text).__name__}, not a"
      " string; choose another text_field."
    )
  key = None if id_field is None else record[id_field]
  key = key.decode("utf-8") if isinstance(key, bytes) else key
  return (
    text,
    None if key is None else str(key),
    {name: _readable(record[name]) for name in features},
  )
