"""Which change of a config would make its step fit into memory."""

import dataclasses
import itertools
from collections.abc import Iterator

from bertjax import hardware
from bertjax.config import Settings, merge
from bertjax.planning.step import StepFacts, lower_step

_TRIALS = 3  # each one compiles the step


@dataclasses.dataclass(frozen=True)
class Suggestion:
  """A change that the compiler found room for.

  Attributes:
    fields: of the config, with their new values.
    needed_bytes: per device, with the change.
  """

  fields: str
  needed_bytes: float


def suggest(
  stage: Settings,
  topology: hardware.Topology,
  error: hardware.OutOfMemory,
  vocab_size: int | None = None,
) -> Suggestion | None:
  """The smallest change that fits, found by compiling; None if none does.

  More microbatches shrink activations, `mesh.fsdp` shrinks the state.

  Args:
    stage: the config that does not fit.
    topology: what it does not fit.
    error: what the compiler said.
    vocab_size: as for `lower_step`.
  """
  available = error.available or topology.chip.hbm_bytes
  changes = candidates(
    error.info, stage.microbatches, error.needed or available, available
  )
  for change in itertools.islice(changes, _TRIALS):
    try:
      program = hardware.compile_for(
        topology,
        lower_step,
        settings=_changed(stage, change),
        vocab_size=vocab_size,
      )
    except hardware.OutOfMemory:
      continue
    return Suggestion(_fields(change), program.memory.total)
  return None


def candidates(
  facts: StepFacts, microbatches: int, needed: float, available: float
) -> Iterator[dict]:
  """Changes of a config that may be enough, the smallest first.

  Parameters, their gradients and the optimizer's state shrink with `mesh.fsdp`,
  which is raised only if they alone take most of the memory; the rest shrinks
  with the number of microbatches.

  Args:
    facts: of the step that does not fit.
    microbatches: that it has.
    needed: bytes per device.
    available: bytes per device.
  """
  state = 2 * facts.parameter_bytes + facts.optimizer_bytes
  mesh = dict(facts.mesh)
  shards = 1
  while state / shards > 0.7 * available and mesh["data"] % 2 == 0:
    mesh["data"] //= 2
    mesh["fsdp"] *= 2
    shards *= 2
  rows = facts.batch_size // (facts.mesh["data"] * facts.mesh["fsdp"])
  for parts in range(1, rows // microbatches + 1):
    if rows % (parts * microbatches):
      continue
    rest = max(needed - state, 0) / parts
    if state / shards + rest > available:
      continue
    change: dict = {}
    if shards > 1:
      change["mesh"] = {axis: mesh[axis] for axis in ("data", "fsdp")}
    if parts > 1:
      change["microbatches"] = parts * microbatches
    if change:
      yield change


def _fields(change: dict) -> str:
  flat = {f"mesh.{k}": v for k, v in change.get("mesh", {}).items()}
  flat |= {k: v for k, v in change.items() if k != "mesh"}
  return ", ".join(f"{name}={value}" for name, value in flat.items())


def _changed(stage: Settings, change: dict) -> Settings:
  fields = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
  return Settings(**merge(fields, change))
