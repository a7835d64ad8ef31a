"""Compiles a program for a topology in a process of its own.

The compilers read their dump options once, when they are loaded, and may end
the process; so each program is compiled by `python -m bertjax.hardware.worker`.
"""

import dataclasses
import functools
import importlib
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from bertjax.hardware import bundles, gpu, hlo, topologies
from bertjax.hardware.bundles import Schedule
from bertjax.hardware.chips import Chip
from bertjax.hardware.topologies import Topology

REQUEST, RESULT = "request.pickle", "result.pickle"
# (devices, **kwargs) -> what to compile, or that and anything picklable.
Target = Callable[..., jax.stages.Lowered | tuple[jax.stages.Lowered, Any]]


class OutOfMemory(ValueError):
  """The compiler found that the program does not fit.

  Attributes:
    needed: bytes per device, if the compiler says so.
    available: bytes per device, likewise.
    info: what the target returned beside the lowered program.
  """

  def __init__(
    self,
    message: str,
    needed: float | None = None,
    available: float | None = None,
    info: Any = None,
  ):
    super().__init__(message)
    self.needed, self.available, self.info = needed, available, info


class CompilerEnded(RuntimeError):
  """The compiling process came to no result; the message is one line."""


# What keeps one program from being compiled, and tells nothing of the next.
FAILURES = (CompilerEnded, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device, as the compiler assigned them.

  Attributes:
    arguments: inputs.
    outputs: results, those in donated inputs included.
    aliased: results that lie in donated inputs.
    temporaries: all else that lives during the program.
    code: the program itself.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    """What the program occupies while it runs."""
    return (
      self.arguments
      + self.outputs
      - self.aliased
      + self.temporaries
      + self.code
    )


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program that cannot run here.

  Attributes:
    topology: that it was compiled for.
    text: its optimized HLO.
    memory: bytes per device.
    info: what the target returned beside the lowered program.
    schedules: TPU: by operation, how it is issued.
    kernels: GPU: what each kernel occupies.
  """

  topology: Topology
  text: str
  memory: Memory
  info: Any = None
  schedules: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)
  kernels: Sequence[gpu.Kernel] = ()

  @property
  def module(self) -> hlo.Module:
    """The parsed HLO."""
    return hlo.Module(self.text)


def compile_for(
  topology: str | Topology,
  target: Target,
  *,
  timeout_s: float = 3600,
  keep_dump: str | os.PathLike | None = None,
  **kwargs: Any,
) -> Program:
  """Compiles what `target(devices, **kwargs)` lowers.

  Args:
    topology: a name as `topologies.parse` takes it, or a topology.
    target: a function of a module, or a partial of one, which another process
      can import. It gets the topology's devices, for a mesh and shardings, and
      returns `jax.jit(...).lower(...)`; or a pair of that and anything
      picklable, which ends up in `Program.info`.
    timeout_s: seconds until the compiler is stopped.
    keep_dump: folder to leave the compiler's dump in.
    **kwargs: picklable arguments of the target.

  Raises:
    CompilerMissing: the compiler for this chip is not installed.
    OutOfMemory: the program needs more memory than a chip has.
    CompilerEnded: the compiler failed, died or took too long.
    Exception: whatever the target raised.
  """
  if isinstance(topology, str):
    topology = topologies.parse(topology)
  topologies.require_compiler(topology.chip)
  with tempfile.TemporaryDirectory(prefix="compile-") as name:
    folder = pathlib.Path(name)
    dump = folder / "dump"
    dump.mkdir()
    request = topology, _importable(target), kwargs
    (folder / REQUEST).write_bytes(pickle.dumps(request))
    _run_worker(folder, _environment(topology, dump), timeout_s)
    text, sizes, info = _load(folder / RESULT)
    memory = Memory(**sizes)
    if topology.chip.platform == "cuda":
      _check_room(memory, topology.chip, info)
    if keep_dump is not None:
      shutil.copytree(dump, keep_dump, dirs_exist_ok=True)
    program = Program(topology, text, memory, info)
    if topology.chip.platform == "cuda":
      return dataclasses.replace(program, kernels=gpu.read_kernels(dump))
    schedules = bundles.read_dump(dump, topology.chip)
    return dataclasses.replace(program, schedules=schedules)


def _importable(target: Target) -> Target:
  """The target by a name that the other process finds as well.

  Raises:
    ValueError: it is defined inside a function, or typed in interactively.
  """
  function = getattr(target, "func", target)
  module = sys.modules.get(function.__module__)
  if function.__module__ == "__main__":
    spec = getattr(module, "__spec__", None)
    if spec is not None:  # python -m package.module
      name = spec.name.removesuffix(".__main__")
      return _renamed(target, function, name)
  elif getattr(module, function.__qualname__, None) is function:
    return target
  raise ValueError(
    f"target={function.__qualname__} cannot be imported by the compiling"
    " process; define it at the top of a module that is not run as a script."
  )


def _renamed(target: Target, function: Target, module_name: str) -> Target:
  found = getattr(importlib.import_module(module_name), function.__name__)
  if target is function:
    return found
  return functools.partial(found, *target.args, **target.keywords)


def _environment(topology: Topology, dump: pathlib.Path) -> dict[str, str]:
  environment = dict(
    os.environ,
    JAX_PLATFORMS="cpu",
    # A cached program would not be dumped.
    JAX_ENABLE_COMPILATION_CACHE="false",
    PYTHONPATH=os.pathsep.join(path for path in sys.path if path),
  )
  # Whatever the CPU is spared, a plan is of the optimized program.
  environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
  if topology.chip.platform == "cuda":
    return environment | gpu.environment(dump)
  flags = (
    f"--xla_jf_dump_to={dump}",
    "--xla_jf_dump_llo_text=true",
    "--xla_jf_dump_llo_pass_label_regex=final_bundles",
  )
  given = environment.get("LIBTPU_INIT_ARGS", "")
  return environment | {"LIBTPU_INIT_ARGS": " ".join((given, *flags)).strip()}


def _run_worker(
  folder: pathlib.Path, environment: Mapping[str, str], timeout_s: float
) -> None:
  command = [sys.executable, "-m", "bertjax.hardware.worker", str(folder)]
  try:
    done = subprocess.run(
      command,
      env=environment,
      capture_output=True,
      text=True,
      errors="replace",
      timeout=timeout_s,
      check=False,
    )
  except subprocess.TimeoutExpired as err:
    raise CompilerEnded(
      f"The compiler took longer than timeout_s={timeout_s:g}; compile a"
      " smaller program, or fewer layers."
    ) from err
  if not (folder / RESULT).exists():
    logging.debug("The compiler wrote:\n%s", done.stderr)
    raise CompilerEnded(_how_it_ended(done.returncode, done.stderr))


def _how_it_ended(code: int, errors: str) -> str:
  """One line on a process that left no result.

  Args:
    code: that it returned; negative: a signal.
    errors: what it wrote.
  """
  said = [line.strip() for line in errors.splitlines() if line.strip()]
  # Of glog's lines those that begin with F are why it ended; Python's last is.
  fatal = [line for line in said if re.match(r"F\d{4} ", line)] or said[-1:]
  why = f": {fatal[0]}" if fatal else ""
  if code == -signal.SIGKILL:
    return (
      "The compiler was killed, probably because this machine has too little"
      f" memory; compile with nothing beside it, or fewer layers{why}"
    )
  name = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
  return (
    f"The compiler ended with {name}{why} (all that it wrote: --verbosity=1)"
  )


def _load(path: pathlib.Path) -> tuple[str, dict[str, int], Any]:
  result, info = pickle.loads(path.read_bytes())
  if not isinstance(result, BaseException):
    return *result, info
  if not isinstance(result, jax.errors.JaxRuntimeError):
    raise result
  line = _first_line(str(result))
  # What ran out may be another memory, such as VMEM.
  if "RESOURCE_EXHAUSTED" in line and _HBM.search(line):
    raise _out_of_memory(line, info) from result
  raise CompilerEnded(f"The compiler failed: {line}") from result


def _first_line(message: str) -> str:
  """Of an error; what only names its kind is continued by the next."""
  first, *rest = message.split("\n")
  return f"{first} {rest[0]}" if first.endswith(":") and rest else first


_HBM = re.compile(r"(\bon |\bspace[ =])hbm\b", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# Of the compiler's own sum, or of a single allocation that is too large.
_NEEDED = (
  re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
  re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)


def _check_room(memory: Memory, chip: Chip, info: Any) -> None:
  """What XLA's compiler for GPUs leaves to their allocator."""
  if memory.total > chip.hbm_bytes:
    raise _lack(memory.total, chip.hbm_bytes, info)


def _out_of_memory(message: str, info: Any) -> OutOfMemory:
  match = next(filter(None, (p.search(message) for p in _NEEDED)), None)
  if match is None:
    return OutOfMemory(message, info=info)
  needed = float(match[1]) * _UNITS[match[2]]
  available = float(match[3]) * _UNITS[match[4]]
  return _lack(needed, available, info)


def _lack(needed: float, available: float, info: Any) -> OutOfMemory:
  return OutOfMemory(
    f"The program needs {needed / 2**30:.2f} GiB of HBM per device;"
    f" {available / 2**30:.2f} GiB are available.",
    needed,
    available,
    info,
  )
