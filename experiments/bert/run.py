"""BERT's claims about its pre-training, in minutes on two cores.

  python -m experiments.bert.run [--workdir DIR] [--variant tiny]

(a) a BERT-tiny learns both pre-training tasks, (b) its loss falls steadily,
(c) it guesses words better than left-to-right models of the same size, (d) what
it learned helps on a downstream task with few labels.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from bertjax.config import merge, plain
from bertjax.registry import lookup
from configs import fine_tune, grammar
from experiments import arms, command
from experiments.bert import findings, tasks
from experiments.labelled import LabelledTexts
from experiments.outcome import Outcome


@dataclasses.dataclass(frozen=True)
class Scale:
  """How large a variant is.

  Attributes:
    variant: of configs/grammar.py.
    seeds: of pre-training on generated text.
    fine_tuning_seeds: of fine-tuning, all from the first seed's pre-training.
    compared_steps: of the arms without NSP, which are only compared.
    packages: whose docstrings are told apart.
    docstring_steps: of pre-training on docstrings.
    sentences: labelled ones, in all splits.
    labels: training examples by task, in ascending order.
    fine_tuning_steps: of each fine-tuning run.
  """

  variant: str
  seeds: tuple[int, ...]
  fine_tuning_seeds: tuple[int, ...]
  compared_steps: int
  packages: tuple[str, ...]
  docstring_steps: int
  sentences: int
  labels: Mapping[str, tuple[int, ...]]
  fine_tuning_steps: int


SCALES = {
  command.FULL: Scale(
    variant="",
    seeds=(0,),
    fine_tuning_seeds=(0, 1, 2),
    compared_steps=500,
    packages=("scipy", "matplotlib", "jax", "scikit-learn", "numpy", "flax"),
    docstring_steps=500,
    sentences=4000,
    labels={"topics": (32, 256), "docstrings": (128, 1024)},
    fine_tuning_steps=100,
  ),
  "tiny": Scale(
    variant="tiny",
    seeds=(0,),
    fine_tuning_seeds=(0,),
    compared_steps=4,
    packages=("absl-py", "grain"),
    docstring_steps=4,
    sentences=100,
    labels={"topics": (16,), "docstrings": (16,)},
    fine_tuning_steps=3,
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
  config = plain(grammar.get_config(scale.variant))
  options = {k: v for k, v in config["data"]["source"].items() if k != "name"}
  topics = tasks.topics(workdir / "topics", options, scale.sentences)
  docstrings = tasks.docstrings(workdir / "docstrings", scale.packages)
  on_docstrings = bench.run(
    merge(config, _on_docstrings(docstrings, scale)),
    seed=scale.seeds[0],
    task="docstrings",
    arm=findings.MLM_NSP,
  )
  for seed in scale.seeds:
    for arm, changes in pre_training_arms(config, scale).items():
      bench.run(merge(config, changes), seed=seed, task="grammar", arm=arm)
  on_grammar, *_ = arms.select(bench.runs, task="grammar", arm=findings.MLM_NSP)
  fine_tune_all(bench, scale, "topics", topics, on_grammar)
  fine_tune_all(bench, scale, "docstrings", docstrings, on_docstrings)
  return findings.outcome(bench.runs)


def pre_training_arms(
  config: Mapping[str, Any], scale: Scale
) -> dict[str, dict[str, Any]]:
  """What each arm on generated text changes in the config."""
  causal = {"model": config["model"] | {"name": "left_to_right_bert"}}
  shorter = {"stop": {"steps": scale.compared_steps}}
  no_pairs = shorter | {"objective": {"pair_task": None}}
  next_token = shorter | {"objective": {"name": "left_to_right_lm"}}
  return {
    findings.MLM_NSP: {},
    findings.MLM: no_pairs,
    findings.MLM_CAUSAL: no_pairs | causal,
    findings.LTR: next_token | causal,
  }


def _on_docstrings(texts: LabelledTexts, scale: Scale) -> dict[str, Any]:
  """What pre-training on the task's own unlabelled texts changes."""
  return {
    "data": {
      "source": texts.source(),
      "tokenizer": {"vocab_size": 4096},
      "splitter": "sentences",
    },
    "stop": {"steps": scale.docstring_steps},
  }


def fine_tuning_config(
  texts: LabelledTexts, start: arms.Run, scale: Scale
) -> dict[str, Any]:
  """The recipe of configs/fine_tune.py for a model of this size.

  Model and vocabulary are written out, so that it also serves random weights.
  """
  model = plain(grammar.get_config(scale.variant))["model"]
  tokenizer = {"name": "folder", "path": str(start.workdir / "tokenizer")}
  config = merge(
    plain(fine_tune.get_config()),
    {
      "dtype": "float32",
      "model": model,
      "data": {
        "task": texts.task(),
        "tokenizer": tokenizer,
        "seq_len": model["max_positions"],
      },
      "optim": {"learning_rate": 1e-3},
      "every": {"log": 50, "checkpoint": 1000},
      "writers": ("csv",),
    },
  )
  config["stop"] = {"steps": scale.fine_tuning_steps}
  config["evals"] = {"test": {"name": "task_metrics", "split": "test"}}
  return config


def fine_tune_all(
  bench: arms.Bench,
  scale: Scale,
  task: str,
  texts: LabelledTexts,
  start: arms.Run,
) -> None:
  """Trains from `start` and from random weights, for each label budget."""
  config = fine_tuning_config(texts, start, scale)
  origins = {
    findings.PRE_TRAINED: {"path": str(start.workdir)},
    findings.RANDOM: None,
  }
  for count in scale.labels[task]:
    limited = merge(config, {"data": {"max_examples": count}})
    for seed in scale.fine_tuning_seeds:
      for arm, init_from in origins.items():
        bench.run(
          limited | {"init_from": init_from},
          seed=seed,
          task=task,
          arm=arm,
          labels=count,
        )


if __name__ == "__main__":
  command.main(run)
