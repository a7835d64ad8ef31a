"""Files at URLs (gs://, hdfs://, s3://), by Apache Beam's file systems.

The same on the workers of a Beam pipeline, whose images hold what their own
store needs, as on the machine that starts it; there gs:// needs
`pip install 'apache-beam[gcp]'`.
"""

import io
import re
from typing import Any

_URL = re.compile(r"[a-zA-Z][-a-zA-Z0-9+.]*://")


def is_url(path: str) -> bool:
  """Whether a path is none of this machine's."""
  return _URL.match(path) is not None


def _file_systems() -> Any:
  try:
    from apache_beam.io.filesystems import FileSystems
  except ImportError as err:
    raise ImportError(
      "paths that are URLs need Apache Beam: pip install 'bertjax[beam]'."
    ) from err
  return FileSystems


def match(pattern: str) -> list[str]:
  """URLs of the files that match; `*` stays in a folder, `**` does not."""
  (matched,) = _file_systems().match([pattern])
  return [file.path for file in matched.metadata_list]


def open_raw(path: str) -> io.BufferedIOBase:
  """Opens a file for reading, its bytes as they are; it can seek."""
  from apache_beam.io.filesystem import CompressionTypes

  return _file_systems().open(
    path, compression_type=CompressionTypes.UNCOMPRESSED
  )


def size_and_change(path: str) -> tuple[int, int]:
  """Bytes of a file, and when it changed, in ns."""
  (matched,) = _file_systems().match([path])
  if not matched.metadata_list:
    raise FileNotFoundError(f"{path} is not there any more.")
  (file,) = matched.metadata_list
  return file.size_in_bytes, int(file.last_updated_in_seconds * 1e9)
