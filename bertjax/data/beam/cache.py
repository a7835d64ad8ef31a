"""Token caches by Apache Beam, the same bytes as in process.

  reader           tokenises some of the shards  -> a draft of each
  by digest        a document is kept by the first shard that holds it
  by shard         the draft without what earlier shards keep -> the shard

Drafts and shards are files that appear whole: a pipeline that was killed, or
whose workers were, keeps all those that it finished when it is started again,
by Beam or in process. A worker holds one batch of documents, and the digests
and lengths of one shard. All workers see drafts and shards: in the folder of
the cache, or in a `shared` one of any of Beam's file systems, from which the
shards are then copied.
"""

import collections
import pathlib
from collections.abc import Container, Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from bertjax.data import cache as cache_lib
from bertjax.data import cache_shards
from bertjax.data.beam import storage
from bertjax.data.beam.pipeline import pipeline_options
from bertjax.data.beam.reading import Share, Shares

_DRAFTS = "drafts"
_READ = 256  # records at a time


def make_shards(
  job: cache_shards.Job,
  folder: pathlib.Path,
  *,
  readers: int = 1,
  options: PipelineOptions | None = None,
  shared: str | None = None,
) -> list[dict[str, Any]]:
  """A `MakeShards` for `build_cache` whose work a Beam runner distributes.

  Args:
    job: what to make.
    folder: of the unfinished cache.
    readers: workers that read and tokenise at the same time.
    options: see `pipeline_options`.
    shared: folder or URL that all workers see; they leave the shards there,
      below the name of the cache. None: they see `folder`.

  Returns:
    The states of all shards, without digests.

  Raises:
    ValueError: `readers` below 1.
  """
  shares = Shares(job.source, job.split, readers)
  place = str(folder)
  if shared is not None:
    name = folder.name.partition(".")[0]
    place = FileSystems.join(shared, f"{name}.shards")
  drafts = FileSystems.join(place, _DRAFTS)
  for made in (place, drafts):
    storage.make(made)
    unfinished = storage.find(made, f"*{cache_shards.UNFINISHED}")
    storage.remove(made, unfinished)  # of workers that were killed
  # A mixture finds its factors once, here, and takes them along.
  next(iter(job.source.examples(job.split)), None)
  with beam.Pipeline(options=options or pipeline_options()) as pipeline:
    shards = (
      pipeline | shares | "Tokenise" >> beam.FlatMap(_drafted, job, place)
    )
    repeated = (
      shards
      | "Digests" >> beam.FlatMap(_digests)
      | "ByDigest" >> beam.GroupByKey()
      | "Repeated" >> beam.FlatMap(_repeated)
    )
    numbers = shards | "Numbers" >> beam.Map(lambda shard: (shard[0], None))
    _ = (
      {"numbers": numbers, "seen": repeated}
      | "ByShard" >> beam.CoGroupByKey()
      | "Finish" >> beam.Map(_finish, place)
    )
  storage.remove_folder(drafts)
  return _states(place, folder)


def _drafted(
  share: Share, job: cache_shards.Job, place: str
) -> Iterator[tuple[int, bytes]]:
  """Writes the drafts of a reader's shards; (shard, joined digests) of each."""
  drafts = FileSystems.join(place, _DRAFTS)
  if storage.is_local(drafts) and not pathlib.Path(drafts).is_dir():
    raise FileNotFoundError(
      f"{drafts} is not there on this worker; --shared must be a folder or a"
      " URL (gs://...) that all workers see."
    )
  blocks = share.blocks(job.source, job.split, job.documents_per_shard)
  for shard, examples in blocks:
    state = _finished(place, shard) or _finished(drafts, shard)
    if state is None:
      with storage.opened(drafts) as folder:
        state = job.write(folder, shard, examples, seen=())
        storage.send(folder, drafts, _files(shard))
    yield shard, state["digests"].tobytes()


def _files(shard: int) -> tuple[str, str]:
  """Of a shard; the last one says that it is whole."""
  return cache_lib.shard_name(shard), cache_shards.state_name(shard)


def _finished(place: str, shard: int) -> dict[str, Any] | None:
  """`finished_shard` of a folder or URL."""
  with storage.opened(place, _files(shard)) as folder:
    return cache_shards.finished_shard(folder, shard)


def _digests(element: tuple[int, bytes]) -> Iterator[tuple[bytes, int]]:
  shard, joined = element
  size = cache_lib.DIGEST_BYTES
  for start in range(0, len(joined), size):
    yield joined[start : start + size], shard


def _repeated(
  element: tuple[bytes, Iterable[int]],
) -> Iterator[tuple[int, bytes]]:
  """(shard, digest) for each shard that holds what an earlier one keeps."""
  digest, shards = element
  first, *later = sorted(set(shards))
  del first
  for shard in later:
    yield shard, digest


def _finish(element: tuple[int, dict[str, Iterable[Any]]], place: str) -> int:
  """Writes a shard from its draft, unless it is there."""
  shard, grouped = element
  drafts = FileSystems.join(place, _DRAFTS)
  if _finished(place, shard) is None:
    with (
      storage.opened(drafts, _files(shard)) as drafted,
      storage.opened(place) as folder,
    ):
      draft = cache_shards.finished_shard(drafted, shard)
      if draft is None:
        raise FileNotFoundError(
          f"the draft of shard {shard} in {drafts} is missing or damaged; start"
          " again to have it made anew."
        )
      counts = collections.Counter(
        {name: int(draft[name]) for name in cache_shards.COUNTS}
      )
      kept = _unseen(drafted, shard, draft, set(grouped["seen"]), counts)
      cache_shards.write_shard(folder, shard, kept, counts)
      storage.send(folder, place, _files(shard))
  storage.remove(drafts, _files(shard))
  return shard


def _unseen(
  drafts: pathlib.Path,
  shard: int,
  draft: dict[str, Any],
  seen: Container[bytes],
  counts: collections.Counter[str],
) -> Iterator[cache_shards.Kept]:
  """The draft's documents, but for those that earlier shards keep."""
  digests = cache_shards.digests_of(draft)
  components = draft["document_sources"].tolist()
  reader = cache_lib.open_shard(drafts / cache_lib.shard_name(shard))
  for start in range(0, len(digests), _READ):
    numbers = range(start, min(start + _READ, len(digests)))
    for i, record in zip(numbers, reader.read(list(numbers))):
      if digests[i] in seen:
        counts["duplicates"] += 1
        continue
      document = cache_lib.unpack_record(record)
      yield cache_shards.Kept(document, digests[i], components[i])


def _states(place: str, folder: pathlib.Path) -> list[dict[str, Any]]:
  """States of all shards; what only their making needed is left out.

  Copies the shards that `folder` lacks, if they were made elsewhere.
  """
  states = []
  for shard in range(len(storage.find(place, cache_shards.STATES))):
    state = cache_shards.finished_shard(folder, shard)
    if state is None and place != str(folder):
      storage.fetch(place, _files(shard), folder)
      state = cache_shards.finished_shard(folder, shard)
    if state is None:
      raise cache_lib.CorruptCacheError(
        f"shard {shard} of {place} is missing or damaged; start again to have"
        " it made anew."
      )
    states.append({k: v for k, v in state.items() if k != "digests"})
  return states
