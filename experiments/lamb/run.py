"""LAMB's claim about large batches, in minutes on two cores.

  python -m experiments.lamb.run [--workdir DIR] [--variant tiny]

A small BERT sees the same number of examples in ever larger batches, so in ever
fewer steps. Each optimizer's rate is tuned at the smallest batch alone; from
there it follows the square-root rule, and warm-up grows with the batch: does
LAMB lose less than AdamW and LARS?
"""

import dataclasses
import pathlib
from typing import Any

from bertjax.config import merge, plain
from bertjax.optim import square_root_scaling
from bertjax.registry import lookup
from configs import grammar
from experiments import arms, command
from experiments.lamb import findings
from experiments.outcome import Outcome

# Peak rates at the smallest batch, of which each optimizer gets its best.
RATES = {
  findings.LAMB: (1e-2, 2e-2, 4e-2),
  findings.ADAMW: (2e-3, 4e-3, 8e-3),
  findings.LARS: (1e-2, 3e-2, 1e-1),
}
# The next best rate of an optimizer whose best is at the edge of stability: one
# seed of it at the larger batches, beside the tuned one.
CALMER = {findings.ADAMW: 2e-3}
WARMUP = 0.2  # of the run with the largest batch, as in the paper
TRIALS = 2  # seeds of each rate


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large a variant is.

  Attributes:
    variant: of configs/grammar.py.
    seeds: of every run.
    examples: rows that a run sees.
    batch_sizes: increasing.
    rates: of each optimizer that are tried.
    calmer: whether `CALMER` is run, too.
  """

  variant: str
  seeds: tuple[int, ...]
  examples: int
  batch_sizes: tuple[int, ...]
  rates: int
  calmer: bool


SCALES = {
  command.FULL: Scale(
    variant="",
    seeds=(0, 1, 2),
    examples=65_536,
    batch_sizes=(64, 256, 512, 1024, 4096),
    rates=3,
    calmer=True,
  ),
  "tiny": Scale(
    variant="tiny",
    seeds=(0,),
    examples=64,
    batch_sizes=(8, 32),
    rates=1,
    calmer=False,
  ),
}


def run(workdir: pathlib.Path, variant: str = command.FULL) -> Outcome:
  """Trains what is not trained yet and states what was found.

  Args:
    workdir: of all runs; a second call continues there.
    variant: key of `SCALES`.
  """
  scale = lookup(SCALES, variant, "variant")
  bench, trials = arms.Bench(workdir), arms.Bench(workdir)
  calmer = arms.Bench(workdir)
  for name, rates in RATES.items():
    rate = tuned(trials, scale, name, rates[: scale.rates])
    for batch_size in scale.batch_sizes:
      for seed in scale.seeds:
        _run(bench, scale, name, rate, batch_size, seed)
  for name, rate in CALMER.items() if scale.calmer else ():
    for batch_size in scale.batch_sizes[1:]:
      _run(calmer, scale, name, rate, batch_size, scale.seeds[0])
  return findings.outcome(bench.runs, trials.runs, calmer.runs)


def tuned(
  trials: arms.Bench, scale: Scale, name: str, rates: tuple[float, ...]
) -> float:
  """The rate with the least held-out loss at the smallest batch.

  On average over seeds that are not reported.
  """
  if len(rates) == 1:
    return rates[0]
  first, batch_size = max(scale.seeds) + 1, scale.batch_sizes[0]
  losses = {}
  for rate in rates:
    found = [
      _run(trials, scale, name, rate, batch_size, seed)
      for seed in range(first, first + TRIALS)
    ]
    losses[rate] = sum(run.metrics[findings.LOSS] for run in found)
  return min(losses, key=losses.get)


def _run(bench, scale, name, rate, batch_size, seed) -> arms.Run:
  return bench.run(
    config(scale, name, rate, batch_size),
    seed=seed,
    diverged=findings.DIVERGED,
    optimizer=name,
    batch_size=batch_size,
    base_rate=rate,
  )


def config(
  scale: Scale, name: str, rate: float, batch_size: int
) -> dict[str, Any]:
  """configs/grammar.py without the pair task, narrower, at this batch.

  Args:
    scale: of the variant.
    name: of the optimizer.
    rate: peak rate at the smallest batch.
    batch_size: rows of a step.
  """
  steps = scale.examples // batch_size
  smallest, largest = scale.batch_sizes[0], scale.batch_sizes[-1]
  peak, warmup = square_root_scaling(
    batch_size,
    batch_size_ref=largest,
    learning_rate_ref=rate * (largest / smallest) ** 0.5,
    warmup_ref=WARMUP,
  )
  changed = merge(
    plain(grammar.get_config(scale.variant)),
    {
      "model": {"num_heads": 2, "mlp_dim": 256},
      "objective": {"pair_task": None},
      "data": {"batch_size": batch_size},
      "stop": {"steps": steps},
      "every": {"log": max(1, steps // 16), "checkpoint": max(1, steps // 2)},
    },
  )
  if not scale.variant:
    changed["model"]["emb_dim"] = 64
  changed["optim"] = dict(
    name=findings.NAMES[name],
    learning_rate=peak,
    weight_decay=0.01,
    schedule=dict(name="linear", warmup=warmup),
  )
  changed["evals"] = {"heldout": {"name": "objective", "num_batches": 20}}
  return changed


if __name__ == "__main__":
  command.main(run)
