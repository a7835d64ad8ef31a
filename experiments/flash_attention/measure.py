"""What the experiment measures: functions of plain values, see `run.py`."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bertjax import hardware
from experiments.flash_attention import step
from kernels.flash_attention import block_mask, flash_attention, programs

CHIP = "v5e:1x1"
PATTERNS = {
  "full": block_mask.full,
  "butterfly": block_mask.butterfly,
  "BigBird": block_mask.big_bird,
  "Longformer": functools.partial(
    block_mask.longformer, window=3, num_global=1
  ),
  "block-diagonal": block_mask.block_diagonal,
}


def cpu_memory(*, name: str, sizes: Sequence[int]) -> dict[str, Any]:
  """Temporary bytes of a gradient compiled for this machine's CPU."""
  lowered = programs.lower(
    jax.devices("cpu"), name=name, sizes=tuple(sizes), dtype="float32"
  )
  analysis = lowered.compile().memory_analysis()
  return {"temporary_bytes": analysis.temp_size_in_bytes}


def tpu_cost(
  *, name: str, sizes: Sequence[int], tiles: Any = None
) -> dict[str, Any]:
  """Temporary bytes, HBM traffic and cycles of a gradient on a TPU v5e."""
  return _priced(programs.lower, name=name, sizes=tuple(sizes), tiles=tiles)


def sparse_cost(*, pattern: str, blocks: int, sizes: Sequence[int]):
  """Visited share, cycles and traffic of a block-sparse gradient."""
  kept = int(PATTERNS[pattern](blocks).sum())
  cost = _priced(
    lower_sparse, pattern=pattern, blocks=blocks, sizes=tuple(sizes)
  )
  return {"kept_blocks": kept, "share": kept / blocks**2, **cost}


def lower_sparse(devices, *, pattern: str, blocks: int, sizes) -> Any:
  """`programs.lower` of our kernels with a block mask."""
  options = {"block_mask": PATTERNS[pattern](blocks)}
  return programs.lower(devices, sizes=sizes, options=options)


def step_cost(**arguments: Any) -> dict[str, Any]:
  """Cycles of a training step; arguments as `step.lower`."""
  return _priced(step.lower, **arguments)


def _priced(target: Any, **arguments: Any) -> dict[str, Any]:
  try:
    program = hardware.compile_for(CHIP, target, **arguments)
  except hardware.OutOfMemory as err:
    return {"needed_bytes": err.needed}
  cost = hardware.price(program)
  return {
    "cycles": cost.cycles,
    "hbm_bytes": cost.hbm_bytes,
    "temporary_bytes": program.memory.temporaries,
    "total_bytes": program.memory.total,
  }


def _plain(q, k, v):
  """Dense attention as one would write it, in the dtype of its inputs."""
  logits = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
  return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)


def exactness(*, backend: str, sizes: Sequence[int]) -> dict[str, Any]:
  """Largest errors of bfloat16 attention, ours and the plain form's.

  Against the plain form in float32; output, then the largest gradient error.
  """
  b, h, t, d = sizes
  rng = np.random.default_rng(0)
  exact = [jnp.asarray(rng.normal(size=(b, t, h, d)), "float32") for _ in "qkv"]
  low = [x.astype(jnp.bfloat16) for x in exact]
  # What bfloat16 does to the inputs is nobody's error.
  exact = [x.astype(jnp.float32) for x in low]
  weights = jnp.asarray(rng.normal(size=(b, t, h, d)), "float32")

  def solve(attend, x):
    def loss(*x):
      out = attend(*x)
      return (out.astype(jnp.float32) * weights).sum(), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*x)
    return [np.asarray(y.astype(jnp.float32)) for y in (out, *grads)]

  ours = functools.partial(
    flash_attention, backend=backend, interpret=backend in ("gpu", "tpu")
  )
  want = solve(_plain, exact)
  errors = {}
  for name, attend in (("ours", ours), ("plain", _plain)):
    found = [np.abs(x - y).max() for x, y in zip(solve(attend, low), want)]
    errors[f"{name}_output_error"] = float(found[0])
    errors[f"{name}_gradient_error"] = float(max(found[1:]))
  return errors


def cpu_seconds(
  *, name: str, sizes: Sequence[int], dtype: str, repeats: int
) -> dict[str, Any]:
  """The least time of a gradient on this machine, after one to warm up."""
  chosen = programs.IMPLEMENTATIONS[name]
  b, h, t, d = sizes
  keys = jax.random.split(jax.random.key(0), 3)
  x = [jax.random.normal(key, (b, t, h, d), dtype) for key in keys]

  def loss(q, k, v):
    return chosen.run(q, k, v, None, None).astype(jnp.float32).sum()

  grad = jax.jit(jax.grad(loss, (0, 1, 2)))
  times = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(grad(*x))
    times.append(time.perf_counter() - start)
  return {"run_seconds": min(times[1:])}
