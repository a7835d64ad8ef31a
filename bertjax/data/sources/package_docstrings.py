"""Docstrings of installed packages, each with the package it is from.

Labelled text that every machine has: to tell libraries apart by how they
describe their parts.
"""

import difflib
from collections.abc import Iterator, Sequence

from bertjax.data.sources import base, python_docs


class PackageDocstrings:
  """One split, "train", of `{"id", "text", "package"}`; no text twice.

  A text is the first paragraph of a docstring.
  """

  name = "package_docstrings"
  licence = python_docs.PythonDocs.licence
  splits = ("train",)

  def __init__(self, packages: Sequence[str], min_words: int = 5):
    """Finds the files, without reading them.

    Args:
      packages: names of installed distributions.
      min_words: shorter texts are left out.

    Raises:
      ValueError: fewer than two packages, or one that is not installed.
    """
    if len(packages) < 2:
      raise ValueError(f"packages={packages!r} must name two or more.")
    installed = python_docs.installed(python_docs.site_packages())
    for name in packages:
      if name not in installed:
        close = difflib.get_close_matches(name, installed, n=3)
        raise ValueError(
          f"packages: {name!r} is not an installed distribution with Python"
          f" files. Close: {', '.join(close) or 'none'}."
        )
    self._packages = {name: installed[name] for name in packages}
    self._min_words = min_words

  def fingerprint(self) -> str:
    return base.fingerprint_of(
      self.name,
      [
        (name, version, [(inside, content) for inside, _, content in files])
        for name, (version, files) in self._packages.items()
      ],
      self._min_words,
    )

  def examples(self, split: str) -> Iterator[base.Example]:
    base.check_split(self, split)
    return base.nonempty(self._read(), self.name, split)

  def _read(self) -> Iterator[base.Example]:
    seen = set()
    for package, (_, files) in self._packages.items():
      found = python_docs.scan([path for _, path, _ in files])
      for (inside, _, _), texts in zip(files, found):
        for number, docstring in enumerate(texts):
          text = " ".join(docstring.split("\n\n")[0].split())
          digest = base.text_hash(text)
          if digest in seen or len(text.split()) < self._min_words:
            continue
          seen.add(digest)
          key = f"{package}/{inside}#{number}"
          yield {"id": key, "text": text, "package": package}
