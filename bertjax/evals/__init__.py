"""Evaluators by name.

A builder takes its options from the config and `objective`, `data` and `mesh`
from the experiment.
"""

from collections.abc import Callable

from bertjax.evals.base import Evaluator
from bertjax.evals.objective import objective_eval
from bertjax.evals.pseudo_perplexity import pseudo_perplexity
from bertjax.evals.reconstruction import reconstruction
from bertjax.evals.replicas import ReplicaError, replicas
from bertjax.evals.task_metrics import task_metrics

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
  "objective": objective_eval,
  "pseudo_perplexity": pseudo_perplexity,
  "reconstruction": reconstruction,
  "replicas": replicas,
  "task_metrics": task_metrics,
}

__all__ = [
  "EVALUATORS",
  "Evaluator",
  "ReplicaError",
  "objective_eval",
  "pseudo_perplexity",
  "reconstruction",
  "replicas",
  "task_metrics",
]
