"""The contract of an evaluator, and how evaluation batches are read."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from bertjax.parallel.sharding import feed

Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Measures a model: `evaluator(variables, key) -> {name: value}`.

  Attributes:
    measure: takes the objective's collections, parameters among them, and a
      PRNG key.
    baseline: what guessing achieves on the same data; {} if that makes no
      sense.
  """

  measure: Callable[[Mapping[str, Any], jax.Array], Values]
  baseline: Callable[[], Values] = dict

  def __call__(self, variables: Mapping[str, Any], key: jax.Array) -> Values:
    return self.measure(variables, key)


def read_batches(
  data: Any,
  mesh: Mesh,
  split: str,
  num_batches: int | None,
  batch_size: int | None,
) -> Iterable[Mapping[str, Any]]:
  """This process's slices of a split's evaluation batches."""
  index, count = feed(mesh)
  return data.dataset(split).evaluation_batches(
    batch_size or data.batch_size, num_batches, index, count
  )
