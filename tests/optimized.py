"""The compiler of real runs, for tests that measure what it makes.

The suite's own is quick instead: see `conftest.py`.
"""

import os
from collections.abc import Mapping

import jax

_OPTIONS = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
  "xla_cpu_use_fusion_emitters": True,
  "xla_cpu_parallel_codegen_split_count": 32,
}
_FLAGS = ("--xla_cpu_use_fusion_emitters", "--xla_cpu_parallel_codegen")
_VARIABLES = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """The program as a real run on this CPU compiles it."""
  return lowered.compile(compiler_options=_OPTIONS)


def environment() -> Mapping[str, str]:
  """Variables of a process that compiles as a real run does."""
  kept = {k: v for k, v in os.environ.items() if k not in _VARIABLES}
  flags = kept.get("XLA_FLAGS", "").split()
  return kept | {
    "XLA_FLAGS": " ".join(f for f in flags if not f.startswith(_FLAGS))
  }
