"""The corpus that every machine already has: documentation inside Python.

The help topics of `pydoc`, and the docstrings of the standard library and of
the installed packages. A document is one help topic, or the docstrings of one
module in the order of its lines. Whole packages are held out, so that the test
split asks about packages that training never saw.
"""

import concurrent.futures
import contextlib
import difflib
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence

from absl import logging

from bertjax.data.sources import base, docstrings

_VERSION = 1  # of the scan below; part of the fingerprint
_SPLITS = ("train", "validation", "test")
_STDLIB = "python"  # the name of the standard library as a package
# Tests describe themselves, not their subject; `_pb2` and `_vendor`ed code has
# no text of its own.
_SKIPPED_FOLDERS = {
  "__pycache__",
  "idle_test",
  "site-packages",
  "dist-packages",
  "test",
  "tests",
}
_SKIPPED_FILE = re.compile(r"(^test_.*|.*_test|.*_pb2|^conftest)\.py$")
# Chosen so that the packages of a core installation give held-out splits of a
# few per cent each; names hash to the same split on every machine.
_SALT = "bertjax-19324"

# A package's files: name, and (path inside, absolute path, version of content).
_Files = list[tuple[str, str, str]]


def _is_wanted(path: str) -> bool:
  *folders, file = path.split("/")
  return (
    file.endswith(".py")
    and not _SKIPPED_FILE.match(file)
    and not _SKIPPED_FOLDERS.intersection(folders)
    and ".." not in folders
  )


def _stdlib_files() -> _Files:
  root = sysconfig.get_paths()["stdlib"]
  found = []
  for folder, folders, files in os.walk(root):
    folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS]
    for file in files:
      path = os.path.join(folder, file)
      inside = os.path.relpath(path, root).replace(os.sep, "/")
      # pydoc_data holds the topics, which are read as text instead.
      if _is_wanted(inside) and not inside.startswith("pydoc_data/"):
        found.append((inside, path, str(os.path.getsize(path))))
  return sorted(found)


def site_packages() -> list[str]:
  """Folders of installed packages, in the order in which Python searches."""
  return [
    path
    for path in dict.fromkeys(sys.path)
    if os.path.basename(path) in ("site-packages", "dist-packages")
    and os.path.isdir(path)
  ]


def installed(folders: Sequence[str]) -> dict[str, tuple[str, _Files]]:
  """`{distribution: (version, files)}`, sorted by name; bertjax left out."""
  found = {}
  for dist in importlib.metadata.distributions(path=list(folders)):
    name = re.sub(r"[-_.]+", "-", dist.metadata["Name"] or "").lower()
    if not name or name == "bertjax" or name in found:
      continue  # of two installations Python imports the first
    files = []
    for file in dist.files or ():
      if _is_wanted(str(file)):
        content = file.hash.value if file.hash else str(file.size)
        files.append((str(file), str(file.locate()), content))
    if files:
      found[name] = (dist.version, sorted(files))
  return dict(sorted(found.items()))


def assign_splits(
  packages: Iterable[str], validation_rate: float, test_rate: float
) -> dict[str, str]:
  """`{package: split}` by a hash of the package's name.

  A package keeps its split whatever else is installed. The exception is an
  installation so small that a held-out split would get no package: that split
  takes the training package nearest to it in hash order.
  """

  def position(name: str) -> float:
    digest = hashlib.blake2b(f"{_SALT}/{name}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64

  order = sorted(packages, key=lambda name: (position(name), name))
  splits = dict.fromkeys(order, "train")
  for name in order:
    if position(name) < test_rate:
      splits[name] = "test"
    elif position(name) < test_rate + validation_rate:
      splits[name] = "validation"
  for split, rate in (("test", test_rate), ("validation", validation_rate)):
    spare = [name for name in order if splits[name] == "train"]
    if rate and split not in splits.values() and len(spare) > 1:
      splits[spare[0]] = split
  return splits


def scan(paths: Sequence[str]) -> list[list[str]]:
  """Docstrings of each file, parsed on all cores."""
  workers = min(os.cpu_count() or 1, 8, 1 + len(paths) // 200)
  if workers == 1 or not sys.executable:
    return [docstrings.of_file(path) for path in paths]

  def run(part: Sequence[str]) -> list[list[str]]:
    script = [sys.executable, "-I", "-S", "-X", "utf8", docstrings.__file__]
    done = subprocess.run(
      script,
      input="\n".join(part).encode("utf-8"),
      stdout=subprocess.PIPE,
      check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    parts = pool.map(run, [paths[i::workers] for i in range(workers)])
    found: list[list[str]] = [[] for _ in paths]
    for i, part in enumerate(parts):
      found[i::workers] = part
  return found


def _topics() -> list[tuple[str, list[str]]]:
  from pydoc_data import topics

  return [
    (f"{_STDLIB}/topics/{name}", [docstrings.clean(text)])
    for name, text in sorted(topics.topics.items())
  ]


class PythonDocs:
  """See the module; built by `python_docs`."""

  name = "python_docs"
  licence = (
    "each package's own, mostly Apache-2.0, BSD or MIT; PSF-2.0 for Python"
  )
  splits = _SPLITS

  def __init__(
    self,
    packages: Sequence[str] | None = None,
    min_chars: int = 200,
    max_documents: int | None = None,
    validation_rate: float = 0.05,
    test_rate: float = 0.05,
    site_folders: Sequence[str] | None = None,
    cache_dir: str | None = None,
  ):
    """Args:
    packages: names of distributions to read, and "python" for the standard
      library and the help topics; None reads all that is installed.
    min_chars: shorter documents are left out.
    max_documents: at most so many documents a split, spread evenly over it.
    validation_rate: share of packages held out for validation.
    test_rate: share of packages held out for test.
    site_folders: folders of installed packages; None takes those of the
      running interpreter.
    cache_dir: where the extracted text is kept; None takes
      `$XDG_CACHE_HOME/bertjax` or `~/.cache/bertjax`.

    Raises:
      ValueError: a package that is not installed; rates that leave nothing.
    """
    if not (
      0 <= validation_rate < 1
      and 0 <= test_rate < 1
      and validation_rate + test_rate < 1
    ):
      raise ValueError(
        f"validation_rate={validation_rate} and test_rate={test_rate} of"
        " source 'python_docs' must be at least 0 and sum to less than 1."
      )
    if max_documents is not None and max_documents < 1:
      raise ValueError(
        f"max_documents={max_documents} of source 'python_docs' must be at"
        " least 1, or None for all."
      )
    self._installed = installed(
      site_packages() if site_folders is None else site_folders
    )
    self._has_stdlib = packages is None or _STDLIB in packages
    if packages is not None:
      for name in packages:
        if name != _STDLIB and name not in self._installed:
          close = difflib.get_close_matches(name, self._installed, n=3)
          hint = f" Close: {', '.join(close)}." if close else ""
          raise ValueError(
            f"packages: {name!r} is not an installed distribution with"
            f" Python files.{hint}"
          )
      self._installed = {
        name: value
        for name, value in self._installed.items()
        if name in packages
      }
    self.package_splits = assign_splits(
      self._installed, validation_rate, test_rate
    )
    if self._has_stdlib:
      self.package_splits = {_STDLIB: "train", **self.package_splits}
    self._min_chars, self._max_documents = min_chars, max_documents
    self._cache_dir = cache_dir or os.path.join(
      os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
      "bertjax",
    )
    self._stdlib = _stdlib_files() if self._has_stdlib else []
    self._documents: dict[str, list[base.Example]] | None = None

  def _corpus_fingerprint(self) -> str:
    return base.fingerprint_of(
      _VERSION,
      platform.python_implementation(),
      platform.python_version(),
      [(inside, content) for inside, _, content in self._stdlib],
      [
        (name, version, [(inside, content) for inside, _, content in files])
        for name, (version, files) in self._installed.items()
      ],
      sorted(self.package_splits.items()),
      self._min_chars,
    )

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      "python_docs", self._corpus_fingerprint(), self._max_documents
    )

  def _extract(self) -> Iterator[tuple[str, base.Example]]:
    """(split, document) pairs; training first, so that it keeps shared text."""
    packages = {name: files for name, (_, files) in self._installed.items()}
    if self._has_stdlib:
      packages = {_STDLIB: self._stdlib, **packages}
    order = [
      (split, name, inside, path)
      for split in _SPLITS
      for name, files in packages.items()
      if self.package_splits[name] == split
      for inside, path, _ in files
    ]
    texts = scan([path for *_, path in order])
    modules = [("train", *topic) for topic in _topics()]
    if not self._has_stdlib:
      modules = []
    modules += [
      (split, f"{name}/{inside}", found)
      for (split, name, inside, _), found in zip(order, texts)
    ]
    seen = set()
    for split, key, paragraphs in modules:
      new = []
      for text in paragraphs:
        digest = base.text_hash(text)
        if digest not in seen:
          seen.add(digest)
          new.append(text)
      text = "\n\n".join(new)
      if len(text) >= self._min_chars:
        yield split, {"id": key, "text": text}

  def _load(self) -> dict[str, list[base.Example]]:
    path = os.path.join(
      self._cache_dir, f"python_docs-{self._corpus_fingerprint()}.jsonl.gz"
    )
    documents: dict[str, list[base.Example]] = {s: [] for s in _SPLITS}
    try:
      with gzip.open(path, "rt", encoding="utf-8") as f:
        for line in f:
          split, example = json.loads(line)
          documents[split].append(example)
      return documents
    except FileNotFoundError:
      logging.info("python_docs: reading the installed packages.")
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as err:
      logging.warning("corrupt cache file %s (%s): rebuilding it.", path, err)
    documents = {s: [] for s in _SPLITS}
    for split, example in self._extract():
      documents[split].append(example)
    os.makedirs(self._cache_dir, exist_ok=True)
    # Not `tempfile`, whose files only their owner may read.
    partial = os.path.join(self._cache_dir, f"partial-{uuid.uuid4().hex}")
    try:
      with gzip.open(partial, "wt", compresslevel=1, encoding="utf-8") as f:
        for split, examples in documents.items():
          for example in examples:
            f.write(json.dumps((split, example)) + "\n")
      os.replace(partial, path)
    except BaseException:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(partial)
      raise
    return documents

  def examples(self, split: str) -> Iterator[base.Example]:
    """`{"id": "package/path/of/module.py", "text": docstrings}`."""
    base.check_split(self, split)
    if self._documents is None:
      self._documents = self._load()
    documents = self._documents[split]
    if self._max_documents is not None and documents:
      n = min(self._max_documents, len(documents))
      documents = [documents[i * len(documents) // n] for i in range(n)]
    return base.nonempty(map(dict, documents), self.name, split)
