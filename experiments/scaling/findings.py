"""What compiled steps say about BERT on pods."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.outcome import Claim, Outcome

PAPER = "LAMB (You et al. 2020, arXiv:1904.00962), MLPerf logs, 1-bit LAMB"
WEAK, RECIPE = "weak scaling", "recipe"
LAMB, ONEBIT = "lamb", "onebit_lamb"

Row = Mapping[str, Any]

# Bytes per second of a worker: of clusters in the 1-bit papers, and of a v5e
# chip between slices.
NETWORKS = {
  "4.1 Gbit/s Ethernet": 4.1e9 / 8,
  "32 Gbit/s InfiniBand": 32e9 / 8,
  "25 Gbit/s between v5e slices": 25e9 / 8,
}


def outcome(rows: Sequence[Row]) -> Outcome:
  """Claims, tables and figure of all compiled steps."""
  weak = [row for row in rows if row["part"] == WEAK and "compute s" in row]
  recipes = [row for row in rows if row["part"] == RECIPE]
  claims = [_efficiency(weak)]
  if recipes:
    claims += [_lamb(recipes), _mlperf(recipes)]
  if any(row["optimizer"] == ONEBIT for row in weak):
    claims.append(_onebit(weak))
  return Outcome(
    paper=PAPER,
    claims=claims,
    counts={"compiled steps": len(rows)},
    rows=[_flat(row) for row in rows],
    summary=[_line(row, weak) for row in rows],
    figure=_figure(weak, recipes),
  )


def hidden_s(row: Row) -> float:
  """Seconds of a step whose exchange and computation hide each other."""
  return max(_usual(row, "compute s"), _usual(row, "exchange s"))


def serial_s(row: Row) -> float:
  """Seconds of a step in which nothing hides."""
  return _usual(row, "compute s") + _usual(row, "exchange s")


def _usual(row: Row, name: str) -> float:
  """Of the kind of step that sends least: what follows a warm-up, if any."""
  kinds = zip(row["sent bytes"], row[name])
  return min(kinds, key=lambda kind: kind[0])[1]


def efficiency(row: Row, weak: Sequence[Row]) -> tuple[float, float]:
  """Speed per chip over that of a single chip: (nothing hides, all hides)."""
  chip = row["topology"].partition(":")[0].rpartition("x")[2]
  alone = next(
    _usual(other, "compute s")
    for other in weak
    if other["chips"] == 1
    and other["variant"] == row["variant"]
    and other["topology"].startswith(chip)
  )
  return alone / serial_s(row), alone / hidden_s(row)


def minutes(row: Row) -> tuple[float, float]:
  """Of all steps of a recipe: (all hides, nothing hides)."""
  return tuple(row["steps"] * f(row) / 60 for f in (hidden_s, serial_s))


def onebit_speedup(
  weak: Sequence[Row], bandwidth: float | None = None, bits: int = 32
) -> float:
  """How much faster a step is that sends signs, if nothing hides.

  Of the largest pod for which both are known; the same bytes, another network.

  Args:
    weak: compiled steps.
    bandwidth: bytes per second of a chip; by default on the links of its slice.
    bits: of a number that the other step sends; it was compiled with 32.
  """
  onebit = [row for row in weak if row["optimizer"] == ONEBIT][-1]
  plain = next(
    row
    for row in weak
    if row["optimizer"] == LAMB
    and not row["mesh"]
    and (row["variant"], row["topology"])
    == (onebit["variant"], onebit["topology"])
  )

  def step_s(row, share):
    exchange = _usual(row, "exchange s")
    if bandwidth is not None:
      exchange = min(row["sent bytes"]) / bandwidth
    return _usual(row, "compute s") + share * exchange

  return step_s(plain, bits / 32) / step_s(onebit, 1)


def _efficiency(weak: Sequence[Row]) -> Claim:
  pods = [r for r in weak if r["chips"] > 1 and not r["mesh"]]
  pods = [r for r in pods if r["optimizer"] == LAMB]
  shown, holds = [], []
  for row in pods:
    least, most = efficiency(row, weak)
    shown.append(
      f"{row['variant']} on {row['topology']} {least:.0%}-{most:.0%}"
    )
    holds.append(least >= 0.9)
  return Claim(
    "Data-parallel training keeps nine tenths of a chip's speed on a pod even"
    " if no exchange hides behind the computation",
    "LAMB: 82.8 hours on 16 TPU v3, 101.2 minutes on 1,024, that is 77 %",
    "; ".join(shown) + " (nothing hides - all hides)",
    holds,
  )


def _lamb(recipes: Sequence[Row]) -> Claim:
  pods: dict[str, list[Row]] = {}
  for row in recipes:
    if row["variant"] == "large":
      pods.setdefault(row["topology"], []).append(row)
  shown, holds = [], []
  for topology, rows in pods.items():
    least, most = np.sum([minutes(row) for row in rows], axis=0)
    chips = rows[0]["chips"]
    needed = chips * most / 76.19
    shown.append(
      f"{topology}: {least:.0f}-{most:.0f} minutes, so about {needed:.0f} such"
      " chips for 76"
    )
    holds.append(most <= 76.19)
  return Claim(
    "The mixed-batch recipe of 8,601 steps takes 76 minutes",
    "8,599 steps in 76.19 minutes on 1,024 TPU v3 chips",
    "; ".join(shown),
    holds,
  )


def _mlperf(recipes: Sequence[Row]) -> Claim:
  (row,) = [row for row in recipes if row["variant"].startswith("mlperf")]
  steps = 3.15e6 / row["batch size"]
  least, most = (steps * f(row) / 60 for f in (hidden_s, serial_s))
  return Claim(
    "MLPerf's 3.15 million sequences at batch 3,072 on 64 chips",
    "2.94 minutes on 64 A100 (v2.0)",
    f"{row['topology']}: {least:.2f}-{most:.2f} minutes, every row padded to"
    " 512, evaluation not counted",
    [most <= 2.94],
  )


def _onebit(weak: Sequence[Row]) -> Claim:
  gains = {
    name: [onebit_speedup(weak, bandwidth, bits) for bits in (16, 32)]
    for name, bandwidth in (NETWORKS | {"inside a v5e slice": None}).items()
  }
  shown = "; ".join(
    f"{name}: {half:.2f}x ({full:.2f}x)" for name, (half, full) in gains.items()
  )
  (slow, _), *_, (fast, _) = gains.values()
  return Claim(
    "A bit per number speeds up steps over slow networks, and costs none inside"
    " a slice",
    "up to 3.3x (1-bit Adam), 2.8x (1-bit LAMB) on Ethernet",
    "BERT-large, 8 rows of 512 per chip, against 16-bit (32-bit) gradients:"
    f" {shown}",
    [slow >= 2.8, fast >= 1],
  )


def _flat(row: Row) -> dict[str, Any]:
  def cell(value):
    if isinstance(value, Mapping):
      return " ".join(f"{k}={v}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
      return " ".join(f"{v:.6g}" for v in value)
    return value

  return {name: cell(value) for name, value in row.items()}


def _line(row: Row, weak: Sequence[Row]) -> dict[str, Any]:
  """A row of the README's table."""
  mesh = row.get("mesh") or {}
  line = {
    "step": f"{row['variant']} {row.get('stage', '')}".strip(),
    "pod": row["topology"],
    "mesh": " ".join(f"{k}={v}" for k, v in mesh.items()) or "data",
    "optimizer": row.get("optimizer", LAMB),
    "GiB": f"{row['needed bytes'] / 2**30:.1f}",
  }
  if "compute s" not in row:
    return line | {"compute ms": "does not fit"}
  speed = row["tokens"] / row["chips"]
  share = row["model flops"] / row["chips"] / row["peak flops"]
  line |= {
    "compute ms": " / ".join(f"{s * 1e3:.1f}" for s in row["compute s"]),
    "exchange ms": " / ".join(f"{s * 1e3:.1f}" for s in row["exchange s"]),
    "sent MB": " / ".join(f"{b / 1e6:.1f}" for b in row["sent bytes"]),
    "tokens/s/chip": f"{speed / serial_s(row):,.0f}"
    f"-{speed / hidden_s(row):,.0f}",
    "MFU": f"{share / serial_s(row):.0%}-{share / hidden_s(row):.0%}",
  }
  if row["part"] == WEAK:
    least, most = efficiency(row, weak)
    line["efficiency"] = f"{least:.0%}-{most:.0%}"
  return line


def _figure(weak: Sequence[Row], recipes: Sequence[Row]) -> Figure:
  figure, (steps, times, gains) = plots.panels(3, height=4.2)
  shown = [row for row in weak if row["chips"] > 1]
  places = np.arange(len(shown))
  compute = [_usual(row, "compute s") * 1e3 for row in shown]
  exchange = [_usual(row, "exchange s") * 1e3 for row in shown]
  steps.barh(places, compute, label="compute")
  steps.barh(places, exchange, left=compute, label="exchange")
  steps.set_yticks(places, [_name(row) for row in shown], fontsize=6)
  steps.set_xlabel("ms of a step")
  steps.legend(fontsize=6)
  chips = 2 ** np.arange(5, 14)
  pods = dict.fromkeys(
    r["topology"] for r in recipes if r["variant"] == "large"
  )
  for topology in pods:
    rows = [
      r for r in recipes if (r["topology"], r["variant"]) == (topology, "large")
    ]
    whole = rows[0]["chips"] * sum(minutes(row)[1] for row in rows)
    times.loglog(chips, whole / chips, label=f"{topology.partition(':')[0]}")
  times.plot([1024], [76.19], "k*", label="paper, TPU v3")
  times.set_xlabel("chips")
  times.set_title("minutes of LAMB's recipe", fontsize=9)
  times.legend(fontsize=6)
  if any(row["optimizer"] == ONEBIT for row in weak):
    bandwidths = np.logspace(8, 11, 40)
    for bits in (32, 16):
      gain = [onebit_speedup(weak, bandwidth, bits) for bandwidth in bandwidths]
      gains.semilogx(bandwidths * 8 / 1e9, gain, label=f"{bits}-bit gradients")
    gains.legend(fontsize=6)
  gains.axhline(1, color="gray", linewidth=0.5)
  gains.set_xlabel("Gbit/s of a chip")
  gains.set_title("1-bit LAMB over LAMB, nothing hidden", fontsize=9)
  return figure


def _name(row: Row) -> str:
  mesh = " ".join(f"{k}={v}" for k, v in row["mesh"].items())
  bits = "1 bit" if row["optimizer"] == ONEBIT else ""
  return " ".join(filter(None, (row["variant"], row["topology"], mesh, bits)))
