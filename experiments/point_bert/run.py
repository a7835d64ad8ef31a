"""Point-BERT on generated shapes and on meshes of furniture, stage by stage.

  python -m experiments.point_bert.run [--workdir DIR] [--variant tiny]

(a) A tokenizer learns to decode patches from codes, (b) a Transformer learns to
guess the codes of hidden patches, (c) what it learned helps where labels are
few: classes of shapes and of furniture, and parts of shapes.

Needs the libraries of Sweet Home 3D, Debian's package sweethome3d-furniture,
where it installs them or in the folder that SWEETHOME3D_FURNITURE names.
"""

import dataclasses
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
    seeds: of it, each from the pre-training of the same seed.
    data: what `config.data` says otherwise, but for the fold.
    folds: of few-shot tasks.
  """

  stage: str
  clouds: str
  steps: int
  seeds: Sequence[int]
  data: Mapping[str, Any]
  folds: int = 1


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


_SEEDS = (0, 1, 2)
_SHOTS = dict(ways=5, shots=10)
SCALES = {
  command.FULL: Scale(
    variant="small",
    seeds=_SEEDS,
    further_steps=200,
    tasks=(
      Task(
        findings.CLASSES, findings.SHAPES, 150, _SEEDS, {"label_fraction": 0.05}
      ),
      Task(
        findings.FEW_SHOT, findings.SHAPES, 60, _SEEDS,
        {"few_shot": _SHOTS | {"tests": 20}}, folds=10,
      ),
      Task(findings.CLASSES, findings.FURNITURE, 150, _SEEDS, {}),
      Task(
        findings.PARTS, findings.SHAPES, 150, _SEEDS, {"label_fraction": 0.05}
      ),
      Task(
        findings.FEW_SHOT, findings.FURNITURE, 60, (0,),
        {"few_shot": _SHOTS | {"tests": 10}}, folds=10,
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
        findings.FEW_SHOT, findings.SHAPES, 2, (0,),
        {"few_shot": dict(ways=2, shots=4, tests=1)},
      ),
      Task(findings.PARTS, findings.SHAPES, 2, (0,), {}),
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
  starts = {
    (clouds, seed): pretrained(bench, scale, codes, clouds, sources, seed)
    for clouds in sources
    for seed in scale.seeds
  }
  if scale.untrained:
    untrained(bench, scale, codes)
  for task in scale.tasks:
    for seed in task.seeds:
      start = starts[task.clouds, seed]
      fine_tuned(bench, scale, task, sources[task.clouds], start)
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
  sources: Mapping[str, Mapping[str, Any]],
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
      **sources[clouds],
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
  start: arms.Run,
) -> None:
  """Fine-tunes to every fold of a task, pre-trained and from scratch.

  Args:
    bench: has the runs.
    scale: of the variant.
    task: which one.
    source: what `config.data` says of its clouds.
    start: pre-training, whose seed is that of the fine-tuning.
  """
  make = {findings.PARTS: stages.segmentation}.get(
    task.stage, stages.classification
  )
  for fold in range(task.folds):
    data, factors = {**source, **task.data}, {}
    if task.stage == findings.FEW_SHOT:
      data = merge(data, {"few_shot": {"fold": fold}})
      factors = {"fold": fold}
    for arm, path in (
      (findings.PRETRAINED, start.workdir),
      (findings.SCRATCH, None),
    ):
      bench.run(
        make(scale.variant, path, task.steps, **data),
        seed=start.seed,
        stage=task.stage,
        arm=arm,
        clouds=task.clouds,
        **factors,
      )


if __name__ == "__main__":
  command.main(run)
