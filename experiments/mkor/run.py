"""MKOR's claims about steps, work and memory, in minutes on two cores.

  python -m experiments.mkor.run [--workdir DIR] [--variant tiny]

(a) With MKOR before it LAMB needs fewer steps to a loss; (b) MKOR-H is no worse
than the better of its two modes; (c) a refresh costs the same at every batch
and far less than K-FAC's; (d) it sends two vectors per layer, and what each
method keeps.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from bertjax.config import merge, plain
from bertjax.registry import lookup
from configs import grammar
from experiments import arms, command
from experiments.measurements import Measurements, fingerprint
from experiments.mkor import costs, findings
from experiments.outcome import Outcome

_LIBRARY = pathlib.Path(costs.__file__).parents[2] / "bertjax"


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large a variant is.

  Attributes:
    variant: of configs/grammar.py.
    arms: which of `preconditioners` are trained; all if empty.
    seeds: of every arm.
    steps: of every run.
    batch_size: rows.
    rates: LAMB's peak rates; every arm is trained at each.
    evaluate: steps between two looks at held-out text.
    widths: of the square layer whose refresh is measured.
    tokens: of the batch in that measurement.
    repeats: of each time.
  """

  variant: str
  arms: tuple[str, ...]
  seeds: tuple[int, ...]
  steps: int
  batch_size: int
  rates: tuple[float, ...]
  evaluate: int
  widths: tuple[int, ...]
  tokens: tuple[int, ...]
  repeats: int


SCALES = {
  command.FULL: Scale(
    variant="",
    arms=(),
    seeds=(0, 1, 2),
    steps=400,
    batch_size=32,
    rates=(1e-2,),
    evaluate=20,
    widths=(256, 512, 1024),
    tokens=(128, 512, 2048),
    repeats=5,
  ),
  "tiny": Scale(
    variant="tiny",
    arms=(findings.LAMB, findings.MKOR, findings.HYBRID),
    seeds=(0,),
    steps=6,
    batch_size=8,
    rates=(1e-2,),
    evaluate=2,
    widths=(8, 16),
    tokens=(8, 32),
    repeats=1,
  ),
}


def run(workdir: pathlib.Path, variant: str = command.FULL) -> Outcome:
  """Trains and measures what is not there yet and states what was found.

  Args:
    workdir: of all runs; a second call continues there.
    variant: key of `SCALES`.
  """
  scale = lookup(SCALES, variant, "variant")
  bench = arms.Bench(workdir)
  for seed in scale.seeds:
    for rate in scale.rates:
      for arm, spec in preconditioners(scale).items():
        if not scale.arms or arm in scale.arms:
          bench.run(config(scale, rate, spec), seed=seed, arm=arm, rate=rate)
  sources = [_LIBRARY / "optim" / "preconditioning", costs.__file__]
  measured = Measurements(workdir / "costs", fingerprint(sources))
  layers = [
    {"arm": name, "width": width, "tokens": tokens}
    | measured.get(
      costs.layer,
      name=name,
      width=width,
      tokens=tokens,
      repeats=scale.repeats,
    )
    for name in costs.METHODS
    for width in scale.widths
    for tokens in scale.tokens
  ]
  return findings.outcome(bench.runs, layers)


def preconditioners(scale: Scale) -> dict[str, dict[str, Any] | None]:
  """`config.optim.precondition` of each arm."""
  mkor = dict(name="mkor", interval=10, warmup_steps=10)
  slow = max(1, scale.steps // 20)
  switch = dict(window=slow, patience=2, earliest=2 * slow, threshold=0.02)
  return {
    findings.LAMB: None,
    findings.MKOR: mkor | dict(rule="reference"),
    findings.EXACT: mkor | dict(rule="exact", norm="spectral"),
    findings.HYBRID: mkor | dict(rule="reference", switch=switch),
    findings.KFAC: dict(name="kfac", form="eigen", inverse_interval=10),
    findings.EVA: dict(name="eva"),
    findings.SNGD: dict(name="sngd", rank=scale.batch_size, interval=10),
  }


def config(
  scale: Scale, rate: float, precondition: dict[str, Any] | None
) -> dict[str, Any]:
  """configs/grammar.py without the pair task, LAMB behind a preconditioner."""
  changed = merge(
    plain(grammar.get_config(scale.variant)),
    {
      "objective": {"pair_task": None},
      "data": {"batch_size": scale.batch_size},
      "stop": {"steps": scale.steps},
      "every": {"log": max(1, scale.steps // 40), "checkpoint": 200},
    },
  )
  # Merging would keep options that the optimizer does not have.
  changed["optim"] = dict(
    name="lamb",
    learning_rate=rate,
    b2=0.98,
    weight_decay=0.01,
    schedule=dict(name="linear", warmup=0.1),
  )
  if precondition is not None:
    changed["optim"]["precondition"] = precondition
  changed["evals"] = {
    "heldout": {"name": "objective", "num_batches": 5, "every": scale.evaluate}
  }
  return changed


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  command.main(run)
