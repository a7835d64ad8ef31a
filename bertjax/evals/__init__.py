"""Evaluators by name.

An evaluator is `(variables, key) -> {name: value}`; `variables` are the
objective's collections, parameters among them. A builder takes its options
from the config and `objective`, `data` and `mesh` from the experiment.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from bertjax.evals.objective import objective_eval
from bertjax.evals.pseudo_perplexity import pseudo_perplexity
from bertjax.evals.unigram import unigram_baseline

Evaluator = Callable[[Mapping[str, Any], jax.Array], dict[str, float]]

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
  "objective": objective_eval,
  "pseudo_perplexity": pseudo_perplexity,
}

__all__ = [
  "EVALUATORS",
  "Evaluator",
  "objective_eval",
  "pseudo_perplexity",
  "unigram_baseline",
]
