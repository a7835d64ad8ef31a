"""Steps on problems of known curvature, and time to LAMB's loss.

  python -m experiments.curvature.run [--workdir DIR] [--variant tiny]

(a) An ill-conditioned regression and an autoencoder of low-rank images: steps
to LAMB's last loss, every method at the best of some rates. (b) Time per step
of the masked language models of `experiments.mkor`, and with their committed
steps the time to LAMB's loss.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from bertjax.registry import lookup
from experiments import command
from experiments.curvature import findings, problems, timing
from experiments.measurements import Measurements, fingerprint
from experiments.outcome import Outcome

_LIBRARY = pathlib.Path(problems.__file__).parents[2] / "bertjax"


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large a variant is.

  Attributes:
    arms: of `optimizers`; all if empty.
    rates: tried for each arm: multiples of its own in `RATES`.
    seeds: runs of every arm and rate.
    steps: of every run, at most.
    batch_size: rows.
    timed: key of `experiments.mkor.run.SCALES`.
    interval: steps of a turn that is timed.
    rounds: turns of each arm.
  """

  arms: tuple[str, ...]
  rates: tuple[float, ...]
  seeds: int
  steps: int
  batch_size: int
  timed: str
  interval: int
  rounds: int


SCALES = {
  command.FULL: Scale(
    arms=(),
    rates=tuple(4.0**k for k in range(-3, 3)),
    seeds=3,
    steps=400,
    batch_size=64,
    timed="full",
    interval=10,
    rounds=3,
  ),
  "tiny": Scale(("SGD", "LAMB", "MKOR, exact"), (1.0,), 1, 5, 8, "tiny", 2, 1),
}
# Peak rates that the multiples are of.
RATES = {"LAMB": 0.03}
_RATE = 0.1


def run(workdir: pathlib.Path, variant: str = command.FULL) -> Outcome:
  """Measures what is not there yet and states what was found.

  Args:
    workdir: of all measurements; a second call continues there.
    variant: key of `SCALES`.
  """
  scale = lookup(SCALES, variant, "variant")
  sources = [_LIBRARY / "optim", problems.__file__]
  measured = Measurements(workdir / "problems", fingerprint(sources))
  rows = []
  for problem in problems.PROBLEMS:
    for arm in scale.arms or tuple(optimizers(_RATE)):
      for multiple in scale.rates:
        rate = multiple * RATES.get(arm, _RATE)
        found = measured.get(
          problems.solve,
          problem=problem,
          optimizer=optimizers(rate)[arm],
          seeds=scale.seeds,
          steps=scale.steps,
          batch_size=scale.batch_size,
        )
        rows.append({"problem": problem, "arm": arm, "rate": rate} | found)
  sources = [_LIBRARY / "optim" / "preconditioning", timing.__file__]
  times = Measurements(workdir / "times", fingerprint(sources)).get(
    timing.milliseconds,
    variant=scale.timed,
    interval=scale.interval,
    rounds=scale.rounds,
  )
  return findings.outcome(rows, times, timing.steps_per_arm())


def optimizers(rate: float) -> dict[str, dict[str, Any]]:
  """`config.optim` of each arm, of a constant rate."""
  sgd = dict(name="sgd", learning_rate=rate, momentum=0.9)
  mkor = dict(name="mkor", interval=1, dtype="float32", rescale="joint")
  found = {
    "SGD": None,
    "MKOR, reference": mkor | dict(rule="reference"),
    "MKOR, exact": mkor | dict(rule="exact", norm="spectral", threshold=10.0),
    "MKOR, paper": mkor | dict(rule="paper"),
    "K-FAC": dict(name="kfac", inverse_interval=1, rescale="joint"),
    "Eva": dict(name="eva", rescale="joint"),
  }
  return {"LAMB": dict(name="lamb", learning_rate=rate)} | {
    arm: sgd if spec is None else sgd | dict(precondition=spec)
    for arm, spec in found.items()
  }


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  command.main(run)
