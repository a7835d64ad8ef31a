"""Corpora of any size by Apache Beam: caches, statistics, vocabularies.

  python -m bertjax.data.beam cache --config=configs/bert.py:base --stage=phase1

A source is an iterator, so nobody knows where its millionth document stands.
Of a source that has parts, such as files, `readers` workers count the documents
of each, then read the part of the corpus that is theirs. Other sources, and a
single file, are gone through by each of them, who works on every `readers`-th
block: reading is paid for by each, all that is dear (tokenising, hashing,
counting words) by one. What workers exchange lies in a folder or at a URL
that all of them see (`storage`).
"""

try:
  import apache_beam  # noqa: F401
except ImportError as err:
  raise ImportError(
    "Beam pipelines need Apache Beam: pip install 'bertjax[beam]'."
  ) from err
