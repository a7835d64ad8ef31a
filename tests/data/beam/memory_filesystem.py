"""An object store in memory for Beam: mem://bucket/name, no folders."""

import io
import time

from apache_beam.io import filesystem
from apache_beam.io.filesystem import CompressionTypes

FILES: dict[str, bytes] = {}


class _Upload(io.BytesIO):
  """Is there once it is closed, as an object is."""

  def __init__(self, path):
    super().__init__()
    self._path = path

  def close(self):
    if not self.closed:
      FILES[self._path] = self.getvalue()
    super().close()


class MemoryFileSystem(filesystem.FileSystem):
  @classmethod
  def scheme(cls):
    return "mem"

  def join(self, basepath, *paths):
    return "/".join([basepath.rstrip("/"), *paths])

  def split(self, path):
    return tuple(path.rsplit("/", 1))

  def mkdirs(self, path):
    """There are no folders."""

  def has_dirs(self):
    return False

  def _list(self, dir_or_prefix):
    for path in sorted(FILES):
      if path.startswith(dir_or_prefix):
        yield self.metadata(path)

  def create(self, path, mime_type=None, compression_type=None):
    del mime_type, compression_type
    return _Upload(path)

  def open(self, path, mime_type=None, compression_type=CompressionTypes.AUTO):
    del mime_type
    # As Beam's own do: by the name unless it is told otherwise.
    if compression_type == CompressionTypes.AUTO and path.endswith(".gz"):
      raise AssertionError(f"{path} would be decompressed twice")
    return io.BytesIO(FILES[path])

  def copy(self, source_file_names, destination_file_names):
    for source, destination in zip(source_file_names, destination_file_names):
      FILES[destination] = FILES[source]

  def rename(self, source_file_names, destination_file_names):
    self.copy(source_file_names, destination_file_names)
    self.delete(source_file_names)

  def exists(self, path):
    return path in FILES

  def size(self, path):
    return len(FILES[path])

  def last_updated(self, path):
    return time.time()

  def checksum(self, path):
    return str(hash(FILES[path]))

  def metadata(self, path):
    return filesystem.FileMetadata(path, len(FILES[path]), 1.0)

  def delete(self, paths):
    for path in paths:
      FILES.pop(path, None)
