"""Files that all workers see, in a folder of any of Beam's file systems.

A folder is a local path, or a URL such as gs://bucket/folder. What goes to a
URL is made on the worker's own disk, sent under a name of its own, and renamed.
"""

import contextlib
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence

from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from bertjax.data.cache_shards import UNFINISHED

_AS_IT_IS = CompressionTypes.UNCOMPRESSED  # whatever a name ends in


def is_local(folder: str) -> bool:
  """Whether a folder is a path of this machine."""
  return FileSystems.get_scheme(folder) is None


def make(folder: str) -> None:
  """Makes a folder, where the file system has such a thing."""
  if is_local(folder):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  elif not FileSystems.exists(folder):
    FileSystems.mkdirs(folder)


def find(folder: str, pattern: str) -> list[str]:
  """Names of the files of a folder that match, in order."""
  if is_local(folder):  # whose name may hold brackets
    return sorted(path.name for path in pathlib.Path(folder).glob(pattern))
  (matched,) = FileSystems.match([FileSystems.join(folder, pattern)])
  return sorted(
    FileSystems.split(file.path)[1] for file in matched.metadata_list
  )


def remove(folder: str, names: Iterable[str]) -> None:
  """Removes files; those that are not there are gone already."""
  for name in names:
    path = FileSystems.join(folder, name)
    if is_local(folder):
      pathlib.Path(path).unlink(missing_ok=True)
    elif FileSystems.exists(path):
      FileSystems.delete([path])


def remove_folder(folder: str) -> None:
  """Removes a folder and all files in it."""
  if is_local(folder):
    shutil.rmtree(folder)
    return
  remove(folder, find(folder, "*"))
  if FileSystems.exists(folder):  # an object store has files alone
    FileSystems.delete([folder])


@contextlib.contextmanager
def opened(folder: str, names: Sequence[str] = ()) -> Iterator[pathlib.Path]:
  """The folder itself if it is local, else a temporary one.

  Args:
    folder: path or URL.
    names: files that the temporary one holds, too, if they are there.
  """
  if is_local(folder):
    yield pathlib.Path(folder)
    return
  with tempfile.TemporaryDirectory(prefix="bertjax-") as scratch:
    fetch(folder, names, pathlib.Path(scratch))
    yield pathlib.Path(scratch)


def fetch(folder: str, names: Iterable[str], to: pathlib.Path) -> None:
  """Copies the files that are there into a local folder."""
  for name in names:
    path = FileSystems.join(folder, name)
    if not FileSystems.exists(path):
      continue
    with (
      FileSystems.open(path, compression_type=_AS_IT_IS) as source,
      open(to / name, "wb") as target,
    ):
      shutil.copyfileobj(source, target, 2**20)


def send(opened_as: pathlib.Path, folder: str, names: Iterable[str]) -> None:
  """Copies files that were made in an `opened` folder to where it is.

  Each appears whole, in the order given, and takes the place of one that is
  there, but on a file system whose rename refuses that (HDFS).
  """
  if is_local(folder):
    return  # made there
  for name in names:
    path = FileSystems.join(folder, name)
    unfinished = f"{path}.{uuid.uuid4().hex}{UNFINISHED}"
    with (
      open(opened_as / name, "rb") as source,
      FileSystems.create(unfinished, compression_type=_AS_IT_IS) as target,
    ):
      shutil.copyfileobj(source, target, 2**20)
    FileSystems.rename([unfinished], [path])
