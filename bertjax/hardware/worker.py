"""The process in which `compile_for` compiles: from a request to a result.

python -m bertjax.hardware.worker FOLDER
"""

import pathlib
import pickle
import sys
import traceback
from typing import Any

from bertjax.hardware import compiling, topologies


def work(folder: pathlib.Path) -> None:
  """Answers `FOLDER/request.pickle` by `FOLDER/result.pickle`.

  The result is (HLO text, memory, info), or the exception.
  """
  try:
    result = _compiled(*pickle.loads((folder / compiling.REQUEST).read_bytes()))
    written = pickle.dumps(result)
  except Exception as err:
    written = _pickled(err)
  (folder / compiling.RESULT).write_bytes(written)


def _compiled(topology, target, kwargs) -> tuple[str, dict[str, int], Any]:
  lowered = target(topologies.devices(topology), **kwargs)
  lowered, info = lowered if isinstance(lowered, tuple) else (lowered, None)
  compiled = lowered.compile()
  stats = compiled.memory_analysis()
  memory = dict(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )
  return compiled.as_text(), memory, info


def _pickled(err: Exception) -> bytes:
  trace = "".join(traceback.format_exception(err))
  try:
    written = pickle.dumps(err)
    if str(pickle.loads(written)) == str(err):
      err.add_note(f"In the compiling process:\n{trace}")
      return pickle.dumps(err)
  except Exception:  # not every exception can be pickled
    pass
  return pickle.dumps(RuntimeError(trace))


if __name__ == "__main__":
  work(pathlib.Path(sys.argv[1]))
