"""What the pipelines share: options, and results that come back."""

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from bertjax.data.beam import storage

# `DirectRunner` first tries a runner that it downloads.
_LOCAL = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


def pipeline_options(flags: Sequence[str] = ()) -> PipelineOptions:
  """Beam's options from its flags; without `--runner` it runs in memory here.

  Raises:
    ValueError: a flag that Beam in memory would ignore; other runners may
      have flags that only they know.
  """
  given = PipelineOptions(list(flags))
  if "runner" in given.get_all_options(drop_default=True):
    return given
  known = given.get_all_options()
  every = given.get_all_options(retain_unknown_options=True)
  if unknown := sorted(every.keys() - known.keys()):
    raise ValueError(
      f"--{unknown[0]} is no flag of Apache Beam; flags of ours go before the"
      " '--'."
    )
  return PipelineOptions([*flags, f"--runner={_LOCAL}"])


def results(
  build: Callable[[beam.Pipeline], beam.PCollection],
  options: PipelineOptions | None,
  scratch: str,
) -> Iterator[Any]:
  """Runs a pipeline; yields its results one by one, in any order.

  Args:
    build: from a pipeline to a collection of JSON values.
    options: see `pipeline_options`.
    scratch: folder or URL that all workers see, for a temporary one.
  """
  folder = FileSystems.join(scratch, f"beam-{uuid.uuid4().hex}")
  storage.make(folder)
  try:
    with beam.Pipeline(options=options or pipeline_options()) as pipeline:
      _ = (
        build(pipeline)
        | "Encode" >> beam.Map(json.dumps)
        | "Write" >> beam.io.WriteToText(FileSystems.join(folder, "part"))
      )
    for name in storage.find(folder, "part*"):
      with FileSystems.open(FileSystems.join(folder, name)) as lines:
        yield from map(json.loads, lines)
  finally:
    storage.remove_folder(folder)
