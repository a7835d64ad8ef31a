"""Plans a config under many settings and puts the fastest first.

    --sweep="mesh.fsdp=1,4,16 microbatches=1,2,4"

Every combination is compiled, one after the other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bertjax import grid, hardware, overrides
from bertjax.planning import page, units
from bertjax.planning.outcome import Plan


@dataclasses.dataclass(frozen=True)
class Trial:
  """One combination.

  Attributes:
    values: of the fields that are tried, by path.
    plan: what compiling it told; None if the config or the compiler refuses.
    refusal: why, in one line.
  """

  values: Mapping[str, Any]
  plan: Plan | None = None
  refusal: str = ""

  @property
  def speed(self) -> float:
    """By which trials are ordered: tokens per second; 0 if it does not run."""
    if self.plan is None or not self.plan.fits:
      return 0
    return self.plan.tokens_per_s_per_chip or 0

  @property
  def verdict(self) -> str:
    """One or two words, or the refusal."""
    if self.plan is None:
      return self.refusal
    return "fits" if self.plan.fits else "does not fit"

  def __str__(self) -> str:
    values = " ".join(f"{path}={value}" for path, value in self.values.items())
    return f"{values}: {self.verdict}"


def axes(text: str) -> dict[str, list[Any]]:
  """What `--sweep` says: by the path of a field, the values to try.

  Args:
    text: "mesh.fsdp=1,4 microbatches=1,2".

  Raises:
    ValueError: it says something else, or something twice, or see
      `bertjax.overrides.value`.
  """
  found: dict[str, list[Any]] = {}
  for word in text.split():
    path, _, values = word.partition("=")
    tried = [
      overrides.value(f"sweep: {path}", text)
      for text in values.split(",")
      if text
    ]
    if not (all(path.split(".")) and tried):
      raise ValueError(
        f"sweep: {word!r} names no field with values to try; write"
        ' --sweep="mesh.fsdp=1,4 microbatches=1,2".'
      )
    for other in found:
      if f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}."):
        raise ValueError(
          f"sweep: {path} stands beside {other}; name a field once, with all of"
          " its values, as microbatches=1,2."
        )
    kinds = [repr(value) for value in tried]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
      raise ValueError(f"sweep: {word!r} tries {twice[0]} twice.")
    found[path] = tried
  if not found:
    raise ValueError('sweep: it is empty; write --sweep="microbatches=1,2".')
  return found


def trials(
  config: Mapping[str, Any],
  tried: Mapping[str, Sequence[Any]],
  plan: Callable[[Mapping[str, Any]], Plan],
) -> Iterator[Trial]:
  """Plans every combination; one that nobody can compile is a trial as well.

  Args:
    config: the stage.
    tried: from `axes`.
    plan: of a config.

  Raises:
    ValueError: every combination is refused.
  """
  refused = []
  points = grid.points({**config, "grid": _nested(tried)})
  for point in points:
    try:
      yield Trial(point.values, plan(point.config))
    except (ValueError, *hardware.FAILURES) as err:
      refused.append(str(err).partition("\n")[0])
      yield Trial(point.values, refusal=refused[-1])
  if len(refused) == len(points):
    raise ValueError(f"sweep: no combination is possible; {refused[0]}")


def _nested(tried: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, values in tried.items():
    *folders, name = path.split(".")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[name] = list(values)
  return tree


def best_first(found: Sequence[Trial]) -> list[Trial]:
  """By speed; what does not fit after that by need, what is refused last."""

  def rank(trial: Trial):
    needed = math.inf if trial.plan is None else trial.plan.needed_bytes
    return -trial.speed, math.inf if needed is None else needed

  return sorted(found, key=rank)


def render(found: Sequence[Trial], name: str = "") -> str:
  """A table, the fastest first; where nothing tells the speed, the smallest.

  Args:
    found: the trials of one stage.
    name: of the stage; "" for a config without stages.
  """
  planned = [trial.plan for trial in found if trial.plan is not None]
  unit = planned[0].facts.unit if planned else "tokens"
  columns = [column.format(unit=unit) for column in _COLUMNS]
  rows = [[*found[0].values, *columns, ""]]
  for trial in best_first(found):
    values = [str(value) for value in trial.values.values()]
    rows.append([*values, *_cells(trial), trial.verdict])
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [
    "  ".join(cell.rjust(width) for cell, width in zip(row[:-1], widths))
    + f"  {row[-1]}"
    for row in rows
  ]
  head = name or "sweep"
  if planned:
    head += f" on {planned[0].topology.name}"
  timed = any(trial.speed for trial in found)
  order = "the fastest first" if timed else "the smallest first"
  limits = ["", page.LIMITS] if timed else []
  return "\n".join([f"{head}, {order}", *lines, *limits, ""])


_COLUMNS = ("needs", "compute", "exchange", "{unit}/s/chip", "MFU")


def _cells(trial: Trial) -> list[str]:
  plan = trial.plan
  needed = plan.needed_bytes if plan is not None else None
  cells = ["" if needed is None else units.size(needed)]
  if plan is None or plan.step_s is None:
    return cells + [""] * (len(_COLUMNS) - 1)
  return [
    *cells,
    units.duration(plan.compute_s),
    units.duration(plan.exchange_s),
    f"{plan.tokens_per_s_per_chip:,.0f}",
    "" if plan.mfu is None else f"{plan.mfu:.1%}",
  ]


def figures(found: Sequence[Trial], of: Callable[[Plan], Any]) -> list[Any]:
  """The table as JSON values, the fastest first.

  Args:
    found: the trials of one stage.
    of: what to say of a plan, as `page.figures`.
  """
  return [
    {"values": dict(trial.values), "verdict": trial.verdict}
    | ({} if trial.plan is None else {"plan": of(trial.plan)})
    for trial in best_first(found)
  ]
