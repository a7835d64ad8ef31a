"""A plan as one page of text, and as figures for another program."""

import collections
import dataclasses
import os
from typing import Any

from bertjax import hardware
from bertjax.planning import links, units
from bertjax.planning.outcome import Plan

_TOP = 10
_GPUS_OF_A_HOST = 8
_SCOPES_LEFT_OUT = ("while", "body", "closed_call", "checkpoint")
LIMITS = """\
Estimated from the compiled program with the clocks and bandwidths of the data
sheet. Not in it: latency of transfers (DMA), stalls. Copies in the background
count as hidden, predicated regions as taken, of conditionals that exchange
nothing all branches, loops of a length known only at run time as one iteration.
See bertjax.hardware."""
_PREALLOCATED = """\
JAX takes 75% of it in advance; XLA_CLIENT_MEM_FRACTION=.95 lets it use more"""
_NO_MODEL = """\
There is no model of a GPU's time. A step takes at least as long as the longest
of these, if no HBM byte is spared by the L2 cache, and conditionals that
exchange nothing take all of their branches:"""


def figures(plan: Plan) -> dict[str, Any]:
  """All that a plan knows, as JSON values; bytes are per device."""
  facts = dataclasses.asdict(plan.facts) | {"tokens": plan.facts.tokens}
  found = {
    "topology": plan.topology.name,
    "chips": plan.topology.num_devices,
    "fits": plan.fits,
    "needed_bytes": plan.needed_bytes,
    "steps": plan.steps,
    "step": facts,
  }
  if plan.available_bytes is not None:
    found["available_bytes"] = plan.available_bytes
  if plan.suggestion is not None:
    found["suggestion"] = dataclasses.asdict(plan.suggestion)
  if plan.memory is not None:
    found["memory"] = dataclasses.asdict(plan.memory)
    found["activation_bytes"] = plan.activation_bytes
    found["arithmetic_s"] = plan.arithmetic_s
    found["traffic_s"] = plan.traffic_s
    found["collectives"] = _collectives(plan)
    found["exchange_s"] = plan.exchange_s
  if plan.cost is not None:
    work = plan.longest.work
    found |= {
      "compute_s": plan.compute_s,
      "step_s": plan.step_s,
      "kinds": [
        {
          "compute_s": kind.compute_s,
          "exchange_s": kind.exchange_s,
          "step_s": kind.step_s,
        }
        for kind in plan.kinds
      ],
      "tokens_per_s_per_chip": plan.tokens_per_s_per_chip,
      "mfu": plan.mfu,
      "hours": plan.hours,
      "chip_hours": plan.chip_hours,
      "cycles": work.cycles,
      "compute_cycles": work.compute_cycles,
      "mxu_cycles": work.mxu_cycles,
      "mxu_flops": work.mxu_cycles * plan.topology.chip.flops_per_cycle,
      "missing": work.missing,
    }
  if plan.fits and (work := plan.longest.work):
    found["hbm_bytes"] = work.hbm_bytes
    found["top"] = [dataclasses.asdict(row) for row in work.top(_TOP)]
  if plan.kernels:
    found["kernels"] = [dataclasses.asdict(k) for k in plan.kernels]
  return found


def _collectives(plan: Plan) -> list[dict[str, Any]]:
  """Summed by kind and mesh axes, the largest first."""
  groups = collections.defaultdict(list)
  for collective in plan.collectives:
    axes = links.axes(collective, plan.topology, plan.facts.mesh)
    groups[collective.kind, axes].append(collective)
  rows = [
    {
      "kind": kind,
      "axes": list(axes),
      "times": sum(c.times for c in group),
      "operand_bytes": sum(c.times * c.operand_bytes for c in group),
      "sent_bytes": sum(c.sent_bytes for c in group),
    }
    for (kind, axes), group in groups.items()
  ]
  return sorted(rows, key=lambda row: -row["sent_bytes"])


def render(plan: Plan, name: str = "") -> str:
  """The page.

  Args:
    plan: what to show.
    name: of the stage; "" for a config without stages.
  """
  lines = [*_head_lines(plan, name), "", *_memory_lines(plan, name)]
  if plan.fits:
    lines += ["", *_collective_lines(plan)]
  if plan.cost is not None:
    top = _top_lines(plan.longest.work)
    lines += ["", *_time_lines(plan), "", *top, "", LIMITS]
  if plan.traffic is not None:
    traffic = _traffic_lines(plan.longest.work)
    lines += ["", *_bound_lines(plan), "", *traffic]
  if plan.kernels:
    lines += ["", *_kernel_lines(plan)]
  return "\n".join(lines) + "\n"


def _head_lines(plan: Plan, name: str) -> list[str]:
  facts, topology = plan.facts, plan.topology
  mesh = " x ".join(f"{k} {v}" for k, v in facts.mesh.items() if v > 1)
  noun = "chip" if topology.chip.platform == "tpu" else "GPU"
  parts = ""
  if facts.microbatches > 1:
    parts = f" in {facts.microbatches:,} microbatches"
  return [
    f"{name or 'plan'} on {topology.name}:"
    f" {units.plural(topology.num_devices, noun)}"
    + (f", mesh {mesh}" if mesh else ""),
    f"batch {facts.batch_size:,} x {facts.seq_len:,} {facts.unit}{parts},"
    f" {facts.parameters:,} parameters, {facts.dtype}",
  ]


def _memory_lines(plan: Plan, name: str) -> list[str]:
  facts, memory = plan.facts, plan.memory
  # Compilers keep some of a chip's memory for themselves.
  capacity = plan.available_bytes or plan.topology.chip.hbm_bytes
  needed = plan.needed_bytes
  verdict = "FITS" if plan.fits else "DOES NOT FIT"
  total = "more than it has" if needed is None else units.size(needed)
  lines = [f"{verdict}: {total} of {units.size(capacity)} per device"]
  if plan.topology.chip.platform == "cuda":
    lines.append(_PREALLOCATED)
  held = {
    "parameters": facts.parameter_bytes,
    "optimizer": facts.optimizer_bytes,
    "other state": facts.extra_bytes,
    "batch": facts.batch_bytes,
  }
  lines += [f"  {k:13s}{units.size(v)}" for k, v in held.items() if v]
  if memory is not None:
    # What is counted and what the compiler found differ by padding.
    rest = max(0, memory.temporaries - plan.activation_bytes)
    lines += [
      f"  activations  {units.size(memory.temporaries - rest)}"
      "  (kept for the backward pass)",
      f"  temporaries  {units.size(rest)}  (gradients and all else)",
    ]
    # Compilers of GPUs do not say how large it is.
    return lines + [f"  program      {units.size(memory.code)}"] * bool(
      memory.code
    )
  rest = 0 if needed is None else needed - sum(held.values())
  if rest > 0:
    lines.append(
      f"  temporaries  {units.size(rest)}  (activations, gradients, program)"
    )
  return [*lines, _advice(plan, name)]


def _advice(plan: Plan, name: str) -> str:
  if plan.suggestion is None:
    return (
      "try a smaller data.batch_size, more chips with mesh.fsdp or mesh.model,"
      " or model.remat"
    )
  where = f"--config.stages.{name}" if name else "--config"
  flags = " ".join(f"{where}.{x}" for x in plan.suggestion.fields.split(", "))
  return f"would fit with {flags} ({units.size(plan.suggestion.needed_bytes)})"


def _collective_lines(plan: Plan) -> list[str]:
  rows = _collectives(plan)
  if not rows:
    return ["collectives: none"]
  head = f"{'collectives per step':22s}{'axes':16s}{'times':>7s}"
  return [
    f"{head}{'put in':>12s}{'sent':>12s}",
    *(
      f"  {row['kind']:20s}{'+'.join(row['axes']) or '?':16s}"
      f"{row['times']:7,}{units.size(row['operand_bytes']):>12s}"
      f"{units.size(row['sent_bytes']):>12s}"
      for row in rows
    ),
  ]


def _time_lines(plan: Plan) -> list[str]:
  cost, chip = plan.longest.work, plan.topology.chip
  busy = cost.mxu_cycles / cost.cycles
  done = cost.mxu_cycles * chip.flops_per_cycle
  lines = [
    f"compute      {units.duration(plan.compute_s)} a chip",
    f"  arithmetic {done:.3g} FLOP, matrix units busy {busy:.0%}",
    f"  HBM        {units.size(cost.hbm_bytes)}, at full bandwidth"
    f" {units.duration(plan.traffic_s)}",
    *_speed_lines(plan),
  ]
  if cost.missing:
    unknown = units.plural(len(cost.missing), "operation")
    lines.append(f"no schedule of {unknown}: only the bytes count")
  return lines


def _speed_lines(plan: Plan) -> list[str]:
  if plan.step_s is None:
    chip = plan.topology.chip.name
    return [f"exchange     unknown, as is the network between {chip} slices"]
  lines = []
  if plan.collectives:
    together = units.duration(plan.compute_s + plan.exchange_s)
    lines += [
      f"exchange     {units.duration(plan.exchange_s)} {_links(plan)}",
      f"step         {units.duration(plan.step_s)} if the shorter of the two"
      f" hides; {together} if it does not",
      *(
        f"other steps  {units.duration(kind.step_s)}: compute"
        f" {units.duration(kind.compute_s)}, exchange"
        f" {units.duration(kind.exchange_s)}"
        for kind in plan.kinds[1:]
      ),
    ]
  rate, unit = plan.tokens_per_s_per_chip, plan.facts.unit
  speed = f"{rate:,.0f} {unit}/s per chip"
  if plan.topology.num_devices > 1:
    speed += f", {rate * plan.topology.num_devices:,.0f} in all"
  lines.append(f"speed        {speed}")
  if plan.mfu is None:
    lines.append("MFU          unknown: nobody has counted this model's FLOP")
  else:
    lines.append(
      f"MFU          {plan.mfu:.1%} of the bfloat16 peak"
      f" ({plan.facts.model_flops:.3g} model FLOP a step, all chips)"
    )
  if plan.steps:
    branched = len(plan.kinds) > 1 or any(row.branch for row in plan.cost.rows)
    most = "at most " if branched else ""
    lines.append(
      f"whole run    {units.plural(plan.steps, 'step')} in {most}"
      f"{units.span(plan.hours * 3600)}, {units.digits(plan.chip_hours)}"
      " chip-hours"
    )
  else:
    lines.append("whole run    of unknown length: give --rows_per_epoch")
  return lines


def _links(plan: Plan) -> str:
  if any(collective.slices > 1 for collective in plan.collectives):
    return "on rings inside slices and the network between them"
  return "on rings"


def _bound_lines(plan: Plan) -> list[str]:
  """What a step of a GPU takes at least."""
  facts = plan.facts
  lines = [
    _NO_MODEL,
    f"  HBM        {units.duration(plan.traffic_s)}"
    f" ({units.size(plan.longest.work.hbm_bytes)})",
  ]
  if plan.arithmetic_s is not None:
    lines.append(
      f"  arithmetic {units.duration(plan.arithmetic_s)}"
      f" ({facts.model_flops:.3g} model FLOP a step, all GPUs)"
    )
  if plan.collectives:
    one_host = plan.topology.num_devices <= _GPUS_OF_A_HOST
    far = "" if one_host else ", if it joins all hosts"
    lines.append(
      f"  exchange   {units.duration(plan.exchange_s)} on NVLink{far}"
    )
  return lines


def _traffic_lines(cost: hardware.Cost) -> list[str]:
  """The operations that move the most bytes."""
  lines = [f"{'HBM share':>9s}{'times':>6s}{'HBM each':>11s}  operation"]
  for row in cost.top(_TOP):
    share = row.times * row.hbm_bytes / cost.hbm_bytes
    lines.append(
      f"{share:9.1%}{row.times:6,}{units.size(row.hbm_bytes):>11s}"
      f"  {_operation(row)}"
    )
  return lines


def _top_lines(cost: hardware.Cost) -> list[str]:
  head = f"{'share':>6s}{'times':>6s}{'cycles each':>12s}{'HBM each':>11s}"
  lines = [f"{head}  operation"]
  for row in cost.top(_TOP):
    share = row.estimate / cost.cycles
    lines.append(
      f"{share:6.1%}{row.times:6,}{max(row.cycles or 0, row.mxu_cycles):12,.0f}"
      f"{units.size(row.hbm_bytes):>11s}  {_operation(row)}"
    )
  return lines


def _operation(row: hardware.Row) -> str:
  """The last scopes of an operation, and where it is written."""
  scopes = [s for s in row.op_name.split("/") if s not in _SCOPES_LEFT_OUT]
  shown = "/".join(scopes[-4:]) or row.name
  source = row.source
  if source.startswith(os.getcwd()):
    source = os.path.relpath(source)
  return f"{shown}  {source}".rstrip()


def _kernel_lines(plan: Plan) -> list[str]:
  """The kernels that take the most registers."""
  lines = [f"{'registers':>9s}{'spilled':>9s}{'shared':>9s}  kernel"]
  by_registers = sorted(
    plan.kernels, key=lambda k: (-k.spill_stores, -k.registers)
  )
  for kernel in by_registers[:_TOP]:
    lines.append(
      f"{kernel.registers:9,}{kernel.spill_stores:8,}B"
      f"{kernel.shared_memory:8,}B  {kernel.name}"
    )
  return lines
