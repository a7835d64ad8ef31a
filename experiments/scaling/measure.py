"""Training steps of BERT on pods, planned by their compilers."""

from collections.abc import Mapping
from typing import Any

from bertjax import hardware
from bertjax.config import merge, settings, stage_configs
from bertjax.plan import plan
from bertjax.planning.outcome import Plan
from configs import bert, lamb

VOCAB_SIZE = 30_522  # of the published models
SEQ_LEN = 512


def weak(
  *,
  variant: str,
  topology: str,
  mesh: Mapping[str, int],
  rows_per_chip: int,
  optimizer: str = "lamb",
) -> dict[str, Any]:
  """A step of phase 2 with as many rows per chip on any pod.

  Args:
    variant: of configs/bert.py.
    topology: of `bertjax.plan`.
    mesh: sizes of axes; what is left is "data".
    rows_per_chip: of 512 tokens.
    optimizer: "lamb", or "onebit_lamb": plan of both of its kinds of step.
  """
  stage = stage_configs(bert.get_config(variant))["phase2"]
  stage["optim"] = {"name": optimizer, "learning_rate": 4e-3}
  if optimizer != "lamb":
    stage["optim"]["freeze_step"] = 1_000
  chips = hardware.parse(topology).num_devices
  changes = {
    "data": {
      "batch_size": rows_per_chip * chips,
      "seq_len": SEQ_LEN,
      "masking": {"max_masked": 77},
    },
    "mesh": dict(mesh),
    "init_from": None,
  }
  return _told(_planned(merge(stage, changes), topology))


def recipe(
  *, variant: str, stage: str, topology: str, microbatches: int
) -> dict[str, Any]:
  """A stage of configs/lamb.py, as long as it is.

  Args:
    variant: of the config.
    stage: of the config; "" if it has none.
    topology: of `bertjax.plan`.
    microbatches: of the global batch.
  """
  chosen = stage_configs(lamb.get_config(variant))[stage]
  changes = {"microbatches": microbatches, "init_from": None}
  made = _planned(merge(chosen, changes), topology)
  return _told(made) | {
    "batch size": made.facts.batch_size,
    "steps": chosen["stop"]["steps"],
  }


def _planned(stage: Mapping[str, Any], topology: str) -> Plan:
  return plan(settings(stage), topology, vocab_size=VOCAB_SIZE, suggest=False)


def _told(made: Plan) -> dict[str, Any]:
  found = {
    "chips": made.topology.num_devices,
    "needed bytes": made.needed_bytes,
  }
  if not made.fits:
    return found
  sent = [sum(c.sent_bytes for c in k.collectives) for k in made.kinds]
  # A step that does not send a bit of each parameter skips its update.
  updates = [8 * s >= made.facts.parameters for s in sent]
  shown = [i for i, yes in enumerate(updates) if yes or not any(updates)]
  return found | {
    "compute s": [made.kinds[i].compute_s for i in shown],
    "exchange s": [made.kinds[i].exchange_s for i in shown],
    "sent bytes": [sent[i] for i in shown],
    "tokens": made.facts.tokens,
    "model flops": made.facts.model_flops,
    "peak flops": made.topology.chip.peak_flops,
  }
