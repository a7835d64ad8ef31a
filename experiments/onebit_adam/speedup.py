"""Predicted speed-up of BERT-large's compressed steps: the README's table.

python -m experiments.onebit_adam.speedup
"""

from typing import Any

from bertjax.parallel.step_time import Network, Step
from experiments import tables

WORKERS = (16, 64, 256)
GIGABITS = (1, 4, 10, 25, 100, 400, 1600)
# Steps in full precision: 23,000 of 152,000.
FULL_SHARE = 0.15
_NUMBERS = 336_000_000
_COMPUTE_S = 6 * _NUMBERS * 16 * 128 / 50e12
_CODING_S = 24 * _NUMBERS / 900e9
_LATENCY_S = 20e-6

# 16 sequences of 128 at 50 TFLOP/s; a pass over 24 bytes a number at 900 GB/s.
EXPOSED = Step([(_NUMBERS,)], _COMPUTE_S, coding_s=_CODING_S)
# The same if gradients leave during the backward pass, two thirds of it all.
HIDDEN = Step([(_NUMBERS,)], _COMPUTE_S, 2 / 3 * _COMPUTE_S, _CODING_S)


def network(gigabits: float) -> Network:
  """Of workers that send so many Gbit/s."""
  return Network(gigabits * 1e9 / 8, _LATENCY_S)


def table() -> list[dict[str, Any]]:
  """A row by bandwidth; columns by workers and what the exchange hides."""
  return [
    {
      "Gbit/s of a worker": gigabits,
      **{
        f"{workers} workers": f"{EXPOSED.speedup(workers, at):.2f}"
        for workers in WORKERS
      },
      "64, hidden": f"{HIDDEN.speedup(64, at):.2f}",
      "64, whole run": f"{EXPOSED.speedup(64, at, full_share=FULL_SHARE):.2f}",
    }
    for gigabits, at in ((g, network(g)) for g in GIGABITS)
  ]


if __name__ == "__main__":
  print(tables.markdown(table()))
