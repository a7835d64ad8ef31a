"""Point-BERT on generated shapes, stage by stage.

  python -m experiments.point_bert.run [--workdir DIR] [--variant tiny]

So far the tokenizer: how well it decodes what it codes, and how many of its
codes it uses.
"""

import dataclasses
import pathlib
from typing import Any

from bertjax.config import merge, plain
from bertjax.registry import lookup
from configs import point_bert
from experiments import arms, command
from experiments.outcome import Outcome
from experiments.point_bert import findings


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much of everything.

  Attributes:
    variant: of configs/point_bert.py, for the tokenizer.
    seeds: of the tokenizer.
    clouds: that are drawn with what they decode to.
  """

  variant: str
  seeds: tuple[int, ...]
  clouds: int


SCALES = {
  command.FULL: Scale(variant="small", seeds=(0,), clouds=4),
  "tiny": Scale(variant="tiny", seeds=(0,), clouds=1),
}


def run(workdir: pathlib.Path, variant: str = command.FULL) -> Outcome:
  """Trains what is not trained yet and states what was found.

  Args:
    workdir: of all runs; a second call continues there.
    variant: key of `SCALES`.
  """
  scale = lookup(SCALES, variant, "variant")
  bench = arms.Bench(workdir)
  config = plain(point_bert.get_config(scale.variant)) | {"writers": ("csv",)}
  for seed in scale.seeds:
    for arm, changes in tokenizer_arms().items():
      bench.run(
        merge(config, changes), seed=seed, stage=findings.TOKENIZER, arm=arm
      )
  return findings.outcome(bench.runs, scale.clouds)


def tokenizer_arms() -> dict[str, dict[str, Any]]:
  """What each arm of the tokenizer changes in the config."""
  return {
    findings.BASE: {},
    findings.FEW_CODES: {"model": {"vocab_size": 4}},
    findings.NO_KL: {"objective": {"kl_weight": 0.0}},
  }


if __name__ == "__main__":
  command.main(run)
