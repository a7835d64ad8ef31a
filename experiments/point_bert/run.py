"""Point-BERT on generated shapes and on meshes of furniture, stage by stage.

  python -m experiments.point_bert.run [--workdir DIR] [--variant tiny]

(a) A tokenizer learns to decode patches from codes, (b) a Transformer learns to
guess the codes of hidden patches, (c) what it learned helps where labels are
few: classes of shapes and of furniture, and parts of shapes.

Needs the libraries of Sweet Home 3D, Debian's package sweethome3d-furniture,
where it installs them or in the folder that SWEETHOME3D_FURNITURE names.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bertjax.config import merge
from bertjax.registry import lookup
from experiments import arms, command
from experiments.outcome import Outcome
from experiments.point_bert import findings, stages

_INSTALLED = "/usr/share/sweethome3d/furniture"
# Half of the meshes are for training. Staircases, of which there are two, and
# "Miscellaneous", which no shape tells, are left out.
_CATEGORIES = (
  "Bathroom", "Bedroom", "Characters", "Doors and windows", "Exterior",
  "Kitchen", "Lights", "Living room", "Office", "Vehicles",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
  """What pre-training is followed by.

  Attributes:
    stage: `FEW_SHOT`, `CLASSES` or `PARTS` of findings.
    clouds: of which: `SHAPES` or `FURNITURE`.
    steps: of fine-tuning.
    data: what `config.data` says otherwise, but for the fold.
    folds: of a few-shot task; 0 for others.
  """

  stage: str
  clouds: str
  steps: int
  data: Mapping[str, Any]
  folds: int = 0


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much of everything.

  Attributes:
    variant: of the configs.
    seeds: of pre-training.
    further_steps: of pre-training that goes on with furniture; 0: none.
    tasks: that follow.
    untrained: whether initial values of the Transformer are probed as well.
    compared: further arms of the tokenizer.
    clouds: that are drawn with what they decode to.
  """

  variant: str
  seeds: Sequence[int]
  further_steps: int
  tasks: Sequence[Task]
  untrained: bool
  compared: Sequence[str]
  clouds: int


_FEW = {"label_fraction": 0.05}
_SHOTS = dict(ways=5, shots=10)
# Averages of BatchNorm begin at a variance of 1, which takes longer to forget
# than a few shots take to learn: fewer steps would measure that from scratch.
SCALES = {
  command.FULL: Scale(
    variant="small",
    seeds=(0, 1, 2),
    further_steps=200,
    tasks=(
      Task(findings.CLASSES, findings.SHAPES, 150, _FEW),
      Task(
        findings.FEW_SHOT, findings.SHAPES, 120,
        {"few_shot": _SHOTS | {"tests": 20}, "batch_size": 16}, folds=10,
      ),
      Task(findings.PARTS, findings.SHAPES, 150, _FEW),
      Task(findings.CLASSES, findings.FURNITURE, 150, {}),
      Task(
        findings.FEW_SHOT, findings.FURNITURE, 120,
        {"few_shot": _SHOTS | {"tests": 10}, "batch_size": 16}, folds=10,
      ),
    ),
    untrained=True,
    compared=(findings.FEW_CODES, findings.NO_KL),
    clouds=4,
  ),
  "tiny": Scale(
    variant="tiny",
    seeds=(0,),
    further_steps=0,
    tasks=(
      Task(
        findings.FEW_SHOT, findings.SHAPES, 2,
        {"few_shot": dict(ways=2, shots=4, tests=1)}, folds=1,
      ),
    ),
    untrained=False,
    compared=(),
    clouds=1,
  ),
}  # fmt: skip


def run(workdir: pathlib.Path, variant: str = command.FULL) -> Outcome:
  """Trains what is not trained yet and states what was found.

  Args:
    workdir: of all runs; a second call continues there.
    variant: key of `SCALES`.
  """
  scale = lookup(SCALES, variant, "variant")
  sources = {findings.SHAPES: {}}
  if scale.further_steps:
    sources[findings.FURNITURE] = {"source": furniture()}
  bench = arms.Bench(workdir)
  codes = tokenizer(bench, scale, findings.BASE)
  for clouds, source in sources.items():
    starts = [
      pretrained(bench, scale, codes, clouds, source, seed)
      for seed in scale.seeds
    ]
    for task in scale.tasks:
      if task.clouds == clouds:
        fine_tuned(bench, scale, task, source, starts)
  if scale.untrained:
    untrained(bench, scale, codes)
  for arm in scale.compared:
    tokenizer(bench, scale, arm)
  return findings.outcome(bench.runs, scale.clouds)


def furniture() -> dict[str, Any]:
  """`config.data.source` of the meshes.

  Raises:
    ValueError: they are not installed.
  """
  folder = os.environ.get("SWEETHOME3D_FURNITURE", _INSTALLED)
  if not any(pathlib.Path(folder).glob("*.sh3f")):
    raise ValueError(
      f"SWEETHOME3D_FURNITURE={folder!r} holds no library (*.sh3f): install"
      " Debian's package sweethome3d-furniture, or name the folder that one is"
      " unpacked to."
    )
  return dict(
    name="furniture",
    path=folder,
    points=1024,
    fractions=dict(train=0.5, test=0.5),
    categories=_CATEGORIES,
  )


def tokenizer(bench: arms.Bench, scale: Scale, arm: str) -> arms.Run:
  """Trains an arm of the tokenizer."""
  config = merge(stages.tokenizer(scale.variant), tokenizer_arms()[arm])
  return bench.run(config, seed=0, stage=findings.TOKENIZER, arm=arm)


def tokenizer_arms() -> dict[str, dict[str, Any]]:
  """What each arm of the tokenizer changes in the config."""
  return {
    findings.BASE: {},
    findings.FEW_CODES: {"model": {"vocab_size": 4}},
    findings.NO_KL: {"objective": {"kl_weight": 0.0}},
  }


def pretrained(
  bench: arms.Bench,
  scale: Scale,
  codes: arms.Run,
  clouds: str,
  source: Mapping[str, Any],
  seed: int,
) -> arms.Run:
  """Pre-training on shapes, or on furniture from where that ended."""
  config = stages.pretraining(scale.variant, codes.workdir)
  if clouds == findings.FURNITURE:
    (shapes,) = arms.select(
      bench.runs, stage=findings.PRETRAINING, clouds=findings.SHAPES, seed=seed
    )
    config = stages.continued(
      config,
      shapes.workdir,
      codes.workdir,
      scale.further_steps,
      **source,
    )
  return bench.run(
    config,
    seed=seed,
    stage=findings.PRETRAINING,
    arm=findings.PRETRAINED,
    clouds=clouds,
  )


def untrained(bench: arms.Bench, scale: Scale, codes: arms.Run) -> arms.Run:
  """A pre-training that ends after a step at almost no rate."""
  config = stages.pretraining(scale.variant, codes.workdir)
  once = {"stop": {"steps": 1}, "optim": {"learning_rate": 1e-9}}
  return bench.run(
    merge(config, once),
    seed=scale.seeds[0],
    stage=findings.PRETRAINING,
    arm=findings.SCRATCH,
    clouds=findings.SHAPES,
  )


def fine_tuned(
  bench: arms.Bench,
  scale: Scale,
  task: Task,
  source: Mapping[str, Any],
  starts: Sequence[arms.Run],
) -> None:
  """Fine-tunes to each fold of a task, from each pre-training and from scratch.

  Args:
    bench: has the runs.
    scale: of the variant.
    task: which one.
    source: what `config.data` says of its clouds.
    starts: pre-trainings, whose seeds are those of fine-tuning.
  """
  make = {findings.PARTS: stages.segmentation}.get(
    task.stage, stages.classification
  )
  folds = [{"fold": number} for number in range(task.folds)] or [{}]
  for start, fold in itertools.product(starts, folds):
    data = merge(task.data, {"few_shot": fold} if fold else {})
    for arm, path in (
      (findings.PRETRAINED, start.workdir),
      (findings.SCRATCH, None),
    ):
      bench.run(
        make(scale.variant, path, task.steps, **source, **data),
        seed=start.seed,
        stage=task.stage,
        arm=arm,
        clouds=task.clouds,
        **fold,
      )


if __name__ == "__main__":
  command.main(run)
