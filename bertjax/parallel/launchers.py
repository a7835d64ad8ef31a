"""Which process of which job this is, by what started it.

A row of `LAUNCHERS` names the variables that a launcher sets: Slurm's srun,
Open MPI's mpirun, MPICH's, or a job manifest with `JAX_NUM_PROCESSES`,
`JAX_PROCESS_ID` and `JAX_COORDINATOR_ADDRESS`. TPU machines know each other;
there JAX asks the platform.
"""

import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping

PORT = 8476  # of the coordinator, where a launcher has no port of its own

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Place:
  """One process among those of a job.

  Attributes:
    source: what says so, for messages.
    coordinator_address: `host:port` of process 0; None, with what follows:
      JAX asks the TPU platform.
    num_processes: of the job.
    process_id: of this process, from 0.
    local_device_ids: devices of this process, where several processes share a
      machine; None: all that the machine has.
  """

  source: str
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Launcher:
  """Names of the variables that a launcher sets for each process.

  Attributes:
    name: for messages.
    num_processes: of the job.
    process_id: of this process.
    local_id: of this process among those on its machine.
    local_count: processes on this machine.
    coordinator: `host:port` of process 0, or None if this launcher does not
      tell; JAX_COORDINATOR_ADDRESS is asked first.
  """

  name: str
  num_processes: str
  process_id: str
  local_id: str = ""
  local_count: Callable[[Environment], int] = lambda env: 1
  coordinator: Callable[[Environment], str | None] = lambda env: None


def first_host(nodes: str) -> str:
  """The first of a Slurm node list such as `tpu-[003-005,9],login`."""
  match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
  if match is None:
    raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no host.")
  prefix, number, suffix = match.groups(default="")
  return prefix + number + suffix


def _slurm_coordinator(env: Environment) -> str | None:
  if "SLURM_STEP_NODELIST" not in env:
    return None
  # Two jobs on a machine need two ports: JAX chooses them like this as well.
  port = 65536 - 4096 + int(env.get("SLURM_JOB_ID", "0")) % 4096
  return f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}"


def _slurm_local_count(env: Environment) -> int:
  """Of `4(x2),1`: the most tasks that any machine has."""
  tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "1")
  return max(int(part.split("(")[0]) for part in tasks.split(","))


def _variable(name: str) -> Callable[[Environment], int]:
  return lambda env: int(env.get(name, "1"))


LAUNCHERS = (
  Launcher("JAX_NUM_PROCESSES", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
  Launcher(
    "Slurm",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    _slurm_local_count,
    _slurm_coordinator,
  ),
  Launcher(
    "Open MPI",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    _variable("OMPI_COMM_WORLD_LOCAL_SIZE"),
  ),
  Launcher(
    "MPICH",
    "PMI_SIZE",
    "PMI_RANK",
    "MPI_LOCALRANKID",
    _variable("MPI_LOCALNRANKS"),
  ),
)


def detect(
  env: Environment,
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  on_tpu: bool = False,
) -> Place | None:
  """This process's place; None when it is the only one.

  Args:
    env: environment variables.
    coordinator_address: `host:port` of process 0; what is given counts more
      than what `env` says.
    num_processes: of the job.
    process_id: of this process.
    on_tpu: whether this machine has TPUs, which know each other.

  Raises:
    ValueError: what is said is incomplete or contradicts itself.
  """
  given = {
    "num_processes": num_processes,
    "process_id": process_id,
  }
  source, local_ids = "--num_processes", None
  address = coordinator_address or env.get("JAX_COORDINATOR_ADDRESS")
  if num_processes is None and process_id is None:
    # Within a batch job without srun only some of the variables are there.
    found = [
      row
      for row in LAUNCHERS
      if row.num_processes in env and row.process_id in env
    ]
    if not found:
      if "JAX_NUM_PROCESSES" in env or "JAX_PROCESS_ID" in env:
        raise ValueError(
          "JAX_NUM_PROCESSES and JAX_PROCESS_ID go together, with"
          " JAX_COORDINATOR_ADDRESS; set all three or none."
        )
      if coordinator_address is not None:
        raise ValueError(
          f"coordinator_address={coordinator_address!r} needs num_processes"
          " and process_id with it."
        )
      return Place("the TPU platform") if on_tpu else None
    row = found[0]
    source = row.name
    given = {
      "num_processes": _integer(env, row.num_processes),
      "process_id": _integer(env, row.process_id),
    }
    address = address or row.coordinator(env)
    if row.local_id in env and row.local_count(env) > 1:
      local_ids = (_integer(env, row.local_id),)
  for name, value in given.items():
    if value is None:
      raise ValueError(f"{name} is missing beside {_other(name, given)}.")
  count, rank = given["num_processes"], given["process_id"]
  if count < 1 or not 0 <= rank < count:
    raise ValueError(
      f"process_id={rank} must lie in 0..{count - 1} for num_processes={count}"
      f" (from {source})."
    )
  if count == 1:
    return None
  if address is None:
    raise ValueError(
      f"{count} processes were started (says {source}), but not where process"
      " 0 is: set JAX_COORDINATOR_ADDRESS=HOST:PORT for all of them."
    )
  return Place(source, _address(address), count, rank, local_ids)


def on_tpu_machine(env: Environment, dev: str = "/dev") -> bool:
  """Whether JAX will run on TPUs of this machine."""
  wanted = env.get("JAX_PLATFORMS", "tpu").split(",")
  if "tpu" not in wanted or importlib.util.find_spec("libtpu") is None:
    return False
  folder = pathlib.Path(dev)
  return any(folder.glob("accel[0-9]*")) or any(folder.glob("vfio/[0-9]*"))


def _integer(env: Environment, name: str) -> int:
  try:
    return int(env[name])
  except ValueError as err:
    raise ValueError(f"{name}={env[name]!r} must be an integer.") from err


def _other(name: str, given: Mapping[str, int | None]) -> str:
  return ", ".join(f"{k}={v}" for k, v in given.items() if k != name)


def _address(address: str) -> str:
  """`host:port`, with the usual port if there is none."""
  host, _, port = address.rpartition(":")
  if not host:
    return f"{address}:{PORT}"
  if not port.isdecimal() or not 0 < int(port) < 65536:
    raise ValueError(
      f"coordinator_address={address!r} must be HOST:PORT, as 10.0.0.2:{PORT}."
    )
  return address
