"""What the experiment measures: functions of plain values, see `run.py`."""

import time
from typing import Any

from bertjax import experiment, hardware
from bertjax.config import cache_path, merge, stage_configs
from configs import bert
from experiments.training_step import step

CHIP = "v5e:1x1"


def cost(**arguments: Any) -> dict[str, Any]:
  """A step on a v5e as its compiler plans it; arguments as `step.lower`.

  `cycles` are those of `bertjax.plan`. `plain_cycles` leave out what it knows
  of the matrix units: an operation takes its bundles or its bytes.
  """
  start = time.monotonic()
  try:
    program = hardware.compile_for(CHIP, step.lower, **arguments)
  except hardware.OutOfMemory as err:
    return {"needed_bytes": err.needed, "fits": False}
  compiled = time.monotonic() - start
  found, chip = hardware.price(program), program.topology.chip
  plain = sum(
    row.times * max(row.cycles or 0, row.hbm_bytes / chip.hbm_bytes_per_cycle)
    for row in found.rows
  )
  return {
    "fits": True,
    "tokens": program.info.tokens,
    "cycles": found.cycles,
    "plain_cycles": plain,
    "tokens_per_s": program.info.tokens / found.seconds,
    "model_flops": program.info.model_flops,
    "hbm_bytes": found.hbm_bytes,
    "needed_bytes": program.memory.total,
    "compile_s": compiled,
  }


def filled(*, instances: str, seq_len: int, rows: int) -> dict[str, Any]:
  """Share of the slots of real rows that hold a token.

  Of Python's own documentation and docstrings, as the tiny variant of
  configs/bert.py reads them.

  Args:
    instances: how rows are made.
    seq_len: their length.
    rows: how many of them to look at.
  """
  spec = stage_configs(bert.get_config("tiny"))["phase2"]["data"]
  spec = merge(
    spec,
    {
      "instances": {"name": instances},
      "seq_len": seq_len,
      "masking": {"max_masked": step.MASKED[seq_len]},
    },
  )
  data = experiment.build_data(spec, seed=0, cache_dir=cache_path(None))
  ids = data.dataset().rows(0, rows)["segment_ids"]
  return {"filled": float((ids > 0).mean())}
