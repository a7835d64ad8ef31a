"""A plan as one page of text, and as figures for another program."""

import collections
import dataclasses
import os
from typing import Any

from bertjax import hardware
from bertjax.planning import links, units
from bertjax.planning.outcome import Plan

_TOP = 10
_SCOPES_LEFT_OUT = ("while", "body", "closed_call", "checkpoint")
_LIMITS = (
  "Estimates: data sheet clocks and bandwidths; no latency of transfers, no"
  " stalls,\npredicated regions always taken. See bertjax.hardware."
)


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
  if plan.suggestion is not None:
    found["suggestion"] = dataclasses.asdict(plan.suggestion)
  if plan.memory is not None:
    found["memory"] = dataclasses.asdict(plan.memory)
    found["collectives"] = _collectives(plan)
    found["exchange_s"] = plan.exchange_s
    found["exchanges_s"] = plan.exchanges_s
  if plan.cost is not None:
    found |= {
      "compute_s": plan.compute_s,
      "step_s": plan.step_s,
      "tokens_per_s_per_chip": plan.tokens_per_s_per_chip,
      "mfu": plan.mfu,
      "hours": plan.hours,
      "chip_hours": plan.chip_hours,
      "cycles": plan.cost.cycles,
      "compute_cycles": plan.cost.compute_cycles,
      "mxu_cycles": plan.cost.mxu_cycles,
      "hbm_bytes": plan.cost.hbm_bytes,
      "missing": plan.cost.missing,
      "top": [dataclasses.asdict(row) for row in plan.cost.top(_TOP)],
    }
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
  facts = plan.facts
  mesh = " x ".join(f"{k} {v}" for k, v in facts.mesh.items() if v > 1)
  lines = [
    f"{name or 'plan'} on {plan.topology.name}:"
    f" {plan.topology.num_devices} chips, mesh {mesh or 'of one chip'}",
    f"batch {facts.batch_size:,} x {facts.seq_len} {facts.unit},"
    f" {facts.parameters:,} parameters",
    "",
    *_memory_lines(plan),
  ]
  if plan.fits:
    lines += ["", *_collective_lines(plan)]
  if plan.cost is not None:
    lines += ["", *_time_lines(plan), "", *_top_lines(plan.cost), "", _LIMITS]
  if plan.kernels:
    lines += ["", *_kernel_lines(plan)]
  return "\n".join(lines) + "\n"


def _memory_lines(plan: Plan) -> list[str]:
  facts, memory = plan.facts, plan.memory
  capacity = plan.topology.chip.hbm_bytes
  needed = plan.needed_bytes
  verdict = "FITS" if plan.fits else "DOES NOT FIT"
  total = "more than it has" if needed is None else units.size(needed)
  lines = [f"{verdict}: {total} of {units.size(capacity)} per device"]
  lines += [
    f"  parameters   {units.size(facts.parameter_bytes)}",
    f"  optimizer    {units.size(facts.optimizer_bytes)}",
    f"  batch        {units.size(facts.batch_bytes)}",
  ]
  if memory is not None:
    lines += [
      f"  temporaries  {units.size(memory.temporaries)}"
      "  (activations, gradients)",
      f"  program      {units.size(memory.code)}",
    ]
  elif plan.suggestion is not None:
    lines.append(
      f"would fit with {plan.suggestion.fields}"
      f" ({units.size(plan.suggestion.needed_bytes)})"
    )
  else:
    lines.append(
      "try a smaller data.batch_size, more chips with mesh.fsdp or mesh.model,"
      " or model.remat"
    )
  return lines


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
  cost, chip = plan.cost, plan.topology.chip
  busy = cost.mxu_cycles / cost.cycles
  memory_s = cost.hbm_bytes / chip.hbm_bandwidth
  lines = [
    f"compute      {units.duration(plan.compute_s)}, matrix units busy"
    f" {busy:.0%}; HBM {units.size(cost.hbm_bytes)} ="
    f" {units.duration(memory_s)}",
    *_speed_lines(plan),
  ]
  if cost.missing:
    lines.append(f"cycles of {len(cost.missing)} small operations are unknown")
  return lines


def _speed_lines(plan: Plan) -> list[str]:
  if plan.step_s is None:
    chip = plan.topology.chip.name
    return [f"exchange     unknown, as is the network between {chip} slices"]
  lines = []
  if plan.collectives:
    together = units.duration(plan.compute_s + plan.exchange_s)
    others = [s for s in plan.exchanges_s if s < plan.exchange_s]
    shorter = [f"; in other steps {units.duration(s)}" for s in others]
    lines += [
      f"exchange     {units.duration(plan.exchange_s)} on rings"
      + "".join(shorter),
      f"step         {units.duration(plan.step_s)} if the shorter of the two"
      f" hides; {together} if it does not",
    ]
  speed = f"{plan.tokens_per_s_per_chip:,.0f} {plan.facts.unit}/s per chip"
  if plan.mfu is not None:
    flops = f"{plan.facts.model_flops:.3g} model FLOP per step"
    speed += f", MFU {plan.mfu:.1%} ({flops})"
  lines.append(f"speed        {speed}")
  if plan.steps:
    lines.append(
      f"{plan.steps:,} steps  {plan.hours:,.1f} hours,"
      f" {plan.chip_hours:,.0f} chip-hours"
    )
  else:
    lines.append("epochs of unknown length (--rows_per_epoch)")
  return lines


def _top_lines(cost: hardware.Cost) -> list[str]:
  lines = [f"{'share':>6s}{'times':>6s}{'cycles':>10s}{'HBM':>11s}  operation"]
  for row in cost.top(_TOP):
    share = row.estimate / cost.cycles
    lines.append(
      f"{share:6.1%}{row.times:6,}{max(row.cycles or 0, row.mxu_cycles):10,.0f}"
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
  lines.append("There is no model of a GPU's time.")
  return lines
