"""NVIDIA GPUs: devices to compile for, and what compiled kernels occupy.

XLA's CUDA compiler runs without a driver when it is told what the GPU is;
NVIDIA's assembler then reports registers, spills and shared memory per kernel.
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from bertjax.hardware.chips import CHIPS

ARCHITECTURE = "sm_90a"

# What a driver would say of an H100 SXM, as XLA's GpuTargetConfigProto.
_H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {CHIPS["h100"].hbm_bytes}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  name: "NVIDIA H100 80GB HBM3"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(
  r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_LAUNCH = re.compile(
  r"(\S+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+"
  r"shared_memory: (\d+) bytes"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel, as the assembler placed it.

  Attributes:
    name: of the entry function.
    registers: per thread.
    spill_stores: bytes per thread that did not fit into registers.
    spill_loads: bytes per thread read back.
    stack: bytes per thread.
    shared_memory: bytes per block, declared in the code or asked for at launch.
    grid: blocks in all; 0 if the program does not launch it by that name.
    threads: per block.
    tensor_cores: whether its file has matrix instructions.
  """

  name: str
  registers: int
  spill_stores: int
  spill_loads: int
  stack: int
  shared_memory: int
  grid: int
  threads: int
  tensor_cores: bool


@dataclasses.dataclass(frozen=True)
class Launch:
  """How a kernel is launched.

  Attributes:
    grid: blocks.
    threads: per block.
    shared_memory: bytes per block asked for.
  """

  grid: int = 0
  threads: int = 0
  shared_memory: int = 0


def devices(count: int) -> Sequence[Any]:
  """H100 devices of one host, to compile for."""
  from jax._src import xla_bridge
  from jax.experimental import topologies

  resolve = xla_bridge.canonicalize_platform

  def canonicalize(platform):
    try:
      return resolve(platform)
    except RuntimeError:
      if platform == "gpu":  # no backend says that it means CUDA
        return "cuda"
      raise

  # There is no public way: https://github.com/jax-ml/jax/issues/23971.
  xla_bridge.canonicalize_platform = canonicalize
  return topologies.get_topology_desc(
    platform="cuda", target_config=_H100, topology=f"1x{count}x1"
  ).devices


def environment(dump: pathlib.Path) -> dict[str, str]:
  """Variables with which a process compiles for a GPU that it has not."""
  flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_gpu_autotune_level=0",  # nothing can be timed
    f"--xla_dump_to={dump}",
  ]
  toolkit = _toolkit()
  if toolkit is not None:
    flags.append(f"--xla_gpu_cuda_data_dir={toolkit}")
  return {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": " ".join(flags).strip(),
  }


def _toolkit() -> pathlib.Path | None:
  """A CUDA toolkit: the wheel's, or the machine's."""
  spec = importlib.util.find_spec("nvidia")
  places = [
    pathlib.Path(p) / "cu13"
    for p in (spec and spec.submodule_search_locations) or ()
  ]
  places += [pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
  return next((p for p in places if (p / "bin" / "ptxas").exists()), None)


def read_kernels(dump: pathlib.Path) -> list[Kernel]:
  """Assembles every PTX file of a dump.

  Raises:
    ValueError: there is no `ptxas`, or it fails.
  """
  toolkit = _toolkit()
  ptxas = toolkit / "bin" / "ptxas" if toolkit else shutil.which("ptxas")
  if not ptxas:
    raise ValueError(
      "Reading a GPU program needs NVIDIA's ptxas; pip install"
      " 'bertjax[gpu-compiler]', or set CUDA_HOME to a CUDA toolkit."
    )
  launches = {}
  for path in dump.glob("*thunk_sequence.txt"):
    launches |= parse_launches(path.read_text())
  return [
    dataclasses.replace(
      kernel,
      shared_memory=max(kernel.shared_memory, launch.shared_memory),
      grid=launch.grid,
      threads=launch.threads,
    )
    for path in sorted(dump.glob("*.ptx"))
    for kernel in _assemble(ptxas, path)
    for launch in (launches.get(kernel.name, Launch()),)
  ]


def parse_launches(text: str) -> dict[str, Launch]:
  """By kernel, how XLA's dump of its schedule launches it."""

  def product(dims):
    return math.prod(map(int, dims.split(",")))

  return {
    name: Launch(product(grid), product(threads), int(shared))
    for name, grid, threads, shared in _LAUNCH.findall(text)
  }


def _assemble(ptxas: str | pathlib.Path, path: pathlib.Path) -> list[Kernel]:
  text = path.read_text()
  if ".entry" not in text:
    return []
  done = subprocess.run(
    [ptxas, "-v", f"-arch={ARCHITECTURE}", str(path), "-o", os.devnull],
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise ValueError(f"ptxas refuses {path.name}: {done.stderr.strip()}")
  return parse_report(done.stderr, tensor_cores="mma" in text)


def parse_report(report: str, *, tensor_cores: bool) -> list[Kernel]:
  """The kernels of `ptxas -v`'s report on one file."""
  kernels = []
  for part in re.split(r"(?=ptxas info\s*: Compiling entry)", report):
    entry, used = _ENTRY.search(part), _USED.search(part)
    if entry is None or used is None:
      continue
    spills, shared = _SPILLS.search(part), _SHARED.search(part)
    stack, stores, loads = map(int, spills.groups()) if spills else (0, 0, 0)
    kernels.append(
      Kernel(
        name=entry[1],
        registers=int(used[1]),
        spill_stores=stores,
        spill_loads=loads,
        stack=stack,
        shared_memory=int(shared[1]) if shared else 0,
        grid=0,
        threads=0,
        tensor_cores=tensor_cores,
      )
    )
  return kernels
