"""Which change of a config would make its step fit into memory."""

import dataclasses
import itertools
from collections.abc import Iterator

from bertjax import hardware
from bertjax.config import Settings, merge
from bertjax.planning.step import StepFacts, lower_step

_TRIALS = 2  # of each kind; each one compiles the step


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

  More microbatches and `model.remat` shrink activations, `mesh.fsdp` shrinks
  the state.

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
  tried = [*itertools.islice(changes, _TRIALS)]
  if stage.model.get("remat", "auto") in ("auto", "none"):
    rest = recomputing(error.info, stage.microbatches, available)
    tried += itertools.islice(rest, _TRIALS)
  for change in tried:
    try:
      program = hardware.compile_for(
        topology,
        lower_step,
        settings=_changed(stage, change),
        vocab_size=vocab_size,
      )
    # Too large still, a model without remat, or too large for the compiler.
    except (ValueError, *hardware.FAILURES):
      continue
    return Suggestion(_fields(change), program.memory.total)
  return None


def candidates(
  facts: StepFacts, microbatches: int, needed: float, available: float
) -> Iterator[dict]:
  """Changes of a config that may be enough, the smallest first.

  Parameters, their gradients and all other state shrink with `mesh.fsdp`, which
  is raised only if they alone take most of the memory; the rest shrinks with
  the number of microbatches. Where those do not suffice, a part of a row per
  device is left, whose activations `model.remat` makes few.

  Args:
    facts: of the step that does not fit.
    microbatches: that it has.
    needed: bytes per device.
    available: bytes per device.
  """
  mesh, held = _sharded(facts, available)
  state = _state_bytes(facts)
  for parts in _parts(facts, microbatches):
    if held + max(needed - state, 0) / parts > available:
      continue
    if change := _change(mesh, parts, microbatches):
      yield change


def recomputing(
  facts: StepFacts, microbatches: int, available: float
) -> Iterator[dict]:
  """Changes with `model.remat`: microbatches as they are, then one row each.

  How much is computed again instead of kept is for the compiler to say.

  Args:
    facts: of the step that does not fit.
    microbatches: that it has.
    available: bytes per device.
  """
  mesh, held = _sharded(facts, available)
  if held > available:
    return
  most = max(_parts(facts, microbatches))
  for parts in dict.fromkeys((1, most)):
    change = _change(mesh, parts, microbatches)
    yield change | {"model": {"remat": "full"}}


def _state_bytes(facts: StepFacts) -> float:
  return 2 * facts.parameter_bytes + facts.optimizer_bytes + facts.extra_bytes


def _sharded(
  facts: StepFacts, available: float
) -> tuple[dict[str, int] | None, float]:
  """Axes of the mesh, if they should change, and bytes of the state on them."""
  mesh, held = dict(facts.mesh), _state_bytes(facts)
  while held > 0.7 * available and mesh["data"] % 2 == 0:
    mesh["data"] //= 2
    mesh["fsdp"] *= 2
    held /= 2
  changed = mesh["fsdp"] != facts.mesh["fsdp"]
  return {k: mesh[k] for k in ("data", "fsdp")} if changed else None, held


def _parts(facts: StepFacts, microbatches: int) -> list[int]:
  """By what the microbatches may be multiplied."""
  rows = facts.batch_size // (facts.mesh["data"] * facts.mesh["fsdp"])
  return [
    parts
    for parts in range(1, rows // microbatches + 1)
    if rows % (parts * microbatches) == 0
  ]


def _change(mesh: dict[str, int] | None, parts: int, microbatches: int) -> dict:
  change: dict = {"mesh": mesh} if mesh else {}
  if parts > 1:
    change["microbatches"] = parts * microbatches
  return change


def _fields(change: dict) -> str:
  fields = []
  for name, value in change.items():
    if isinstance(value, dict):
      fields += [f"{name}.{key}={inner}" for key, inner in value.items()]
    else:
      fields.append(f"{name}={value}")
  return ", ".join(fields)


def _changed(stage: Settings, change: dict) -> Settings:
  fields = {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage)}
  return Settings(**merge(fields, change))
