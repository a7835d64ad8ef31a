"""Evaluators by name.

A builder takes its options from the config and `objective`, `data` and `mesh`
from the experiment.
"""

from collections.abc import Callable

from bertjax.evals.base import Evaluator
from bertjax.evals.linear_probe import linear_probe
from bertjax.evals.objective import objective_eval
from bertjax.evals.part_iou import part_iou
from bertjax.evals.pseudo_perplexity import pseudo_perplexity
from bertjax.evals.reconstruction import reconstruction
from bertjax.evals.replicas import ReplicaError, replicas
from bertjax.evals.task_metrics import task_metrics
from bertjax.evals.voting import voting

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
  "linear_probe": linear_probe,
  "objective": objective_eval,
  "part_iou": part_iou,
  "pseudo_perplexity": pseudo_perplexity,
  "reconstruction": reconstruction,
  "replicas": replicas,
  "task_metrics": task_metrics,
  "voting": voting,
}

__all__ = [
  "EVALUATORS",
  "Evaluator",
  "ReplicaError",
  "linear_probe",
  "objective_eval",
  "part_iou",
  "pseudo_perplexity",
  "reconstruction",
  "replicas",
  "task_metrics",
  "voting",
]
