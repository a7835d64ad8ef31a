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
from collections.abc import Mapping
from typing import Any

from bertjax.config import merge
from bertjax.registry import lookup
from experiments import arms, command
from experiments.outcome import Outcome
from experiments.point_bert import findings, stages

_INSTALLED = "/usr/share/sweethome3d/furniture"
# Half of the meshes are for training. Staircases, of which there are two, and
# "Miscellaneous", which is no class of shapes, are left out.
_FURNITURE = dict(
  name="furniture",
  points=1024,
  fractions=dict(train=0.5, test=0.5),
  categories=(
    "Bathroom", "Bedroom", "Characters", "Doors and windows", "Exterior",
    "Kitchen", "Lights", "Living room", "Office", "Vehicles",
  ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much of everything.

  Attributes:
    variant: of the configs.
    seeds: of pre-training, each with a fine-tuning of its own.
    few_shot_seeds: the same, of those whose fine-tunings are many.
    folds: of few-shot tasks.
    tests: clouds of each class that a fold is measured on.
    steps: of fine-tuning, by task.
    fractions: of the labels, by task.
    further_steps: of pre-training that goes on with the meshes.
    meshes: `config.data.source` of these.
    clouds: that are drawn with what they decode to.
  """

  variant: str
  seeds: tuple[int, ...]
  few_shot_seeds: tuple[int, ...]
  folds: int
  tests: Mapping[str, int]
  steps: Mapping[str, int]
  fractions: Mapping[str, float]
  further_steps: int
  meshes: Mapping[str, Any]
  clouds: int


SCALES = {
  command.FULL: Scale(
    variant="small",
    seeds=(0, 1, 2),
    few_shot_seeds=(0, 1, 2),
    folds=10,
    tests={findings.SHAPES: 20, findings.FURNITURE: 10},
    steps={
      findings.FEW_SHOT: 100,
      findings.CLASSES: 200,
      findings.PARTS: 200,
    },
    fractions={findings.SHAPES: 0.05, findings.FURNITURE: 1.0},
    further_steps=400,
    meshes=_FURNITURE,
    clouds=4,
  ),
  "tiny": Scale(
    variant="tiny",
    seeds=(0,),
    few_shot_seeds=(0,),
    folds=1,
    tests={findings.SHAPES: 1, findings.FURNITURE: 1},
    steps={findings.FEW_SHOT: 2, findings.CLASSES: 2, findings.PARTS: 2},
    fractions={findings.SHAPES: 0.5, findings.FURNITURE: 1.0},
    further_steps=2,
    meshes=dict(
      name="procedural",
      points=128,
      seed=1,
      sizes=dict(train=144, validation=12, test=12),
    ),
    clouds=1,
  ),
}


def run(workdir: pathlib.Path, variant: str = command.FULL) -> Outcome:
  """Trains what is not trained yet and states what was found.

  Args:
    workdir: of all runs; a second call continues there.
    variant: key of `SCALES`.
  """
  scale = lookup(SCALES, variant, "variant")
  bench = arms.Bench(workdir)
  codes = tokenizers(bench, scale)
  sources = {findings.SHAPES: None, findings.FURNITURE: _found(scale.meshes)}
  starts = {
    (clouds, seed): run
    for seed in scale.seeds
    for clouds, run in pretrained(bench, scale, codes, sources, seed).items()
  }
  untrained(bench, scale, codes)
  for (clouds, seed), start in starts.items():
    few_shot(bench, scale, clouds, sources[clouds], start, seed)
    fine_tuned(bench, scale, clouds, sources[clouds], start, seed)
  return findings.outcome(bench.runs, scale.clouds)


def tokenizers(bench: arms.Bench, scale: Scale) -> arms.Run:
  """Trains all arms of the tokenizer; gives the one whose codes are guessed."""
  config = stages.tokenizer(scale.variant)
  runs = [
    bench.run(merge(config, changes), seed=0, stage=findings.TOKENIZER, arm=arm)
    for arm, changes in tokenizer_arms().items()
  ]
  return runs[0]


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
  sources: Mapping[str, Mapping[str, Any] | None],
  seed: int,
) -> dict[str, arms.Run]:
  """Pre-training on shapes, and what goes on from there with furniture."""
  config = stages.pretraining(scale.variant, codes.workdir)
  on_shapes = bench.run(
    config,
    seed=seed,
    stage=findings.PRETRAINING,
    arm=findings.PRETRAINED,
    clouds=findings.SHAPES,
  )
  goes_on = stages.pretraining_on(
    merge(config, {"stop": {"steps": scale.further_steps}}),
    on_shapes.workdir,
    codes.workdir,
    sources[findings.FURNITURE],
  )
  on_furniture = bench.run(
    goes_on,
    seed=seed,
    stage=findings.PRETRAINING,
    arm=findings.PRETRAINED,
    clouds=findings.FURNITURE,
  )
  return {findings.SHAPES: on_shapes, findings.FURNITURE: on_furniture}


def untrained(bench: arms.Bench, scale: Scale, codes: arms.Run) -> arms.Run:
  """A pre-training that is over after a step at almost no rate."""
  config = stages.pretraining(scale.variant, codes.workdir)
  once = {"stop": {"steps": 1}, "optim": {"learning_rate": 1e-9}}
  return bench.run(
    merge(config, once),
    seed=scale.seeds[0],
    stage=findings.PRETRAINING,
    arm=findings.SCRATCH,
    clouds=findings.SHAPES,
  )


def few_shot(
  bench: arms.Bench,
  scale: Scale,
  clouds: str,
  source: Mapping[str, Any] | None,
  start: arms.Run,
  seed: int,
) -> None:
  """Fine-tunes to every fold, from a pre-training and from scratch.

  Args:
    bench: has the runs.
    scale: of the variant.
    clouds: what they are of.
    source: of them; None: that of the configs.
    start: pre-trained on them.
    seed: of that and of the fine-tunings.
  """
  if seed not in scale.few_shot_seeds:
    return
  for fold in range(scale.folds):
    data = stages.few_shot(fold, scale.tests[clouds])
    for arm, path in _origins(start).items():
      bench.run(
        stages.classification(
          scale.variant,
          path,
          scale.steps[findings.FEW_SHOT],
          **data | _source(source),
        ),
        seed=seed,
        stage=findings.FEW_SHOT,
        arm=arm,
        clouds=clouds,
        fold=fold,
      )


def fine_tuned(
  bench: arms.Bench,
  scale: Scale,
  clouds: str,
  source: Mapping[str, Any] | None,
  start: arms.Run,
  seed: int,
) -> None:
  """Fine-tunes to all classes and, where they are known, to parts.

  Arguments as those of `few_shot`.
  """
  tasks = {findings.CLASSES: stages.classification}
  if clouds == findings.SHAPES:
    tasks[findings.PARTS] = stages.segmentation
  labels = {"label_fraction": scale.fractions[clouds], "subset_seed": seed}
  for task, config in tasks.items():
    for arm, path in _origins(start).items():
      bench.run(
        config(
          scale.variant, path, scale.steps[task], **labels | _source(source)
        ),
        seed=seed,
        stage=task,
        arm=arm,
        clouds=clouds,
      )


def _origins(start: arms.Run) -> dict[str, pathlib.Path | None]:
  return {findings.PRETRAINED: start.workdir, findings.SCRATCH: None}


def _source(source: Mapping[str, Any] | None) -> dict[str, Any]:
  return {} if source is None else {"source": dict(source)}


def _found(meshes: Mapping[str, Any]) -> dict[str, Any]:
  """The source with the folder of its libraries, if it is one of files.

  Raises:
    ValueError: they are not installed.
  """
  if meshes["name"] != "furniture":
    return dict(meshes)
  folder = os.environ.get("SWEETHOME3D_FURNITURE", _INSTALLED)
  if not any(pathlib.Path(folder).glob("*.sh3f")):
    raise ValueError(
      f"SWEETHOME3D_FURNITURE={folder!r} holds no library (*.sh3f): install"
      " Debian's package sweethome3d-furniture, or name the folder of one that"
      " is unpacked."
    )
  return dict(meshes, path=folder)


if __name__ == "__main__":
  command.main(run)
