"""Pseudo-perplexity of a masked LM (Salazar et al. 2020, arXiv:1910.14659).

exp of the mean of -log p(token | all others), each token masked in turn.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bertjax.data.audit import original_tokens
from bertjax.evals.base import Evaluator, check_counts, size_of
from bertjax.evals.objective import metrics
from bertjax.objectives.masked_lm import MaskedLM
from bertjax.parallel.sharding import feed, put_batch


def one_mask_each(
  row: Mapping[str, np.ndarray], tokenizer: Any
) -> dict[str, np.ndarray]:
  """A copy of one unmasked row for every ordinary token, that token masked.

  Args:
    row: arrays of one row, without batch axis and before masking.
    tokenizer: for its special ids.

  Returns:
    A batch with `labels` and `masked_positions` of shape [n, 1].
  """
  ordinary = ~np.isin(row["tokens"], tokenizer.special_ids)
  places = np.flatnonzero(ordinary & (row["segment_ids"] > 0))
  kept = ("tokens", "segment_ids", "positions", "type_ids")
  batch = {
    k: np.repeat(v[None], len(places), axis=0)
    for k, v in row.items()
    if k in kept
  }
  batch["tokens"][np.arange(len(places)), places] = tokenizer.mask_id
  batch["masked_positions"] = places[:, None].astype(np.int32)
  batch["labels"] = row["tokens"][places][:, None].astype(np.int32)
  return batch


def _rebatch(
  parts: Iterator[Mapping[str, np.ndarray]], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of one size; the last is filled with rows of weight 0."""
  held: dict[str, np.ndarray] | None = None
  for part in parts:
    if held is not None:
      part = {k: np.concatenate([held[k], part[k]]) for k in part}
    count = len(part["labels"])
    whole = count - count % batch_size
    for start in range(0, whole, batch_size):
      yield {k: v[start : start + batch_size] for k, v in part.items()}
    held = {k: v[whole:] for k, v in part.items()}
  if held is not None and len(held["labels"]):
    missing = batch_size - len(held["labels"])
    empty = {k: np.repeat(v[:1], missing, axis=0) for k, v in held.items()}
    empty["labels"] = np.full_like(empty["labels"], -1)
    yield {k: np.concatenate([held[k], empty[k]]) for k in held}


def pseudo_perplexity(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  split: str = "validation",
  num_rows: int = 32,
  batch_size: int | None = None,
) -> Evaluator:
  """Pseudo-perplexity over the first rows of a split.

  Args:
    objective: a `MaskedLM`; its pair task, if any, plays no part.
    data: the experiment's data.
    mesh: the device mesh.
    split: of the source.
    num_rows: rows that are scored; each costs one pass per token.
    batch_size: masked copies per pass; the batch size of training by default.

  Raises:
    ValueError: the objective has no masked-token head, a count below 1 or, when
      it is called, no token to score.
  """
  if not isinstance(objective, MaskedLM):
    raise ValueError(
      f"evals: pseudo_perplexity needs objective.name='masked_lm', not"
      f" {type(objective).__name__}."
    )
  check_counts(num_rows=num_rows, batch_size=batch_size)
  batch_size = size_of(batch_size, data)
  metrics_of = metrics(objective.clone(pair_task=None))

  def rows() -> Iterator[dict[str, np.ndarray]]:
    # Every process reads all of the few rows, for how many copies they give is
    # known only then, and all processes must make the same passes.
    left = num_rows
    whole = data.dataset(split).evaluation_batches(data.batch_size, None, 0, 1)
    for batch in whole:
      batch = dict(batch, tokens=original_tokens(batch))
      for i in range(min(left, len(batch["tokens"]))):
        if (batch["segment_ids"][i] > 0).any():
          row = {k: v[i] for k, v in batch.items()}
          yield one_mask_each(row, data.tokenizer)
      left -= len(batch["tokens"])
      if left <= 0:
        return

  def evaluate(variables, key) -> dict[str, float]:
    del key
    total = weight = 0.0
    index, parts = feed(mesh)
    mine = slice(index * batch_size // parts, (index + 1) * batch_size // parts)
    with jax.set_mesh(mesh):
      for batch in _rebatch(rows(), batch_size):
        batch = {name: x[mine] for name, x in batch.items()}
        found = metrics_of(variables, put_batch(batch, mesh))
        loss, count = found["mlm_loss"]
        total, weight = total + float(loss), weight + float(count)
    if not weight:
      raise ValueError(f"split={split!r} has no token to score.")
    mean = total / weight
    return {
      "pseudo_log_likelihood": -mean,
      "pseudo_perplexity": math.exp(min(mean, 700.0)),
      "scored_tokens": weight,
    }

  return Evaluator(evaluate)
