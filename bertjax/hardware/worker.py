"""The process in which `compile_for` compiles: from a request to a result.

python -m bertjax.hardware.worker FOLDER
"""

import pathlib
import pickle
import sys
import traceback

import jax

from bertjax import garbage
from bertjax.hardware import compiling, topologies


def work(folder: pathlib.Path) -> None:
  """Answers `FOLDER/request.pickle` by `FOLDER/result.pickle`.

  The result is a pair: (HLO text, memory) or the exception, and the target's
  info.
  """
  info = None
  try:
    request = (folder / compiling.REQUEST).read_bytes()
    topology, target, kwargs = pickle.loads(request)
    garbage.spare_imports()
    lowered = target(topologies.devices(topology), **kwargs)
    if isinstance(lowered, tuple):
      lowered, info = lowered
    written = pickle.dumps((_compiled(lowered), info))
  except Exception as err:
    written = pickle.dumps((_picklable(err), info))
  (folder / compiling.RESULT).write_bytes(written)


def _compiled(lowered: jax.stages.Lowered) -> tuple[str, dict[str, int]]:
  try:
    compiled = lowered.compile()
  except Exception as err:
    # Pallas has a class of its own for what the compiler says of a kernel.
    if isinstance(err.__cause__, jax.errors.JaxRuntimeError):
      raise jax.errors.JaxRuntimeError(str(err)) from err
    raise
  stats = compiled.memory_analysis()
  memory = dict(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )
  return compiled.as_text(), memory


def _picklable(err: Exception) -> Exception:
  trace = "".join(traceback.format_exception(err))
  try:
    same = str(pickle.loads(pickle.dumps(err))) == str(err)
  except Exception:  # not every exception can be pickled
    same = False
  if not same:
    return RuntimeError(trace)
  err.add_note(f"In the compiling process:\n{trace}")
  return err


if __name__ == "__main__":
  work(pathlib.Path(sys.argv[1]))
