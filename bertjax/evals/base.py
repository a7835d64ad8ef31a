"""The contract of an evaluator, and how evaluation batches are read."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax.parallel.sharding import batch_shards, feed, put_batch
from bertjax.reuse import kept

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


def check_counts(**counts: int | None) -> None:
  """Raises ValueError for a count, by its option, below 1; None passes."""
  for name, count in counts.items():
    if count is not None and count < 1:
      raise ValueError(
        f"evals: {name}={count} must be at least 1, or left out."
      )


def check_batch(batch_size: int, mesh: Mesh, field: str) -> None:
  """Raises ValueError, naming the field, for rows that shards do not divide."""
  shards = batch_shards(mesh)
  if batch_size % shards:
    raise ValueError(
      f"{field}={batch_size} does not divide over {shards} batch shards"
      f" (mesh.data x mesh.fsdp); use a multiple of {shards}."
    )


def size_of(batch_size: int | None, data: Any) -> int:
  """Rows of a global evaluation batch; as many as in training by default."""
  return data.batch_size if batch_size is None else batch_size


def read_batches(
  data: Any,
  mesh: Mesh,
  split: str,
  num_batches: int | None,
  batch_size: int | None,
) -> Iterator[Mapping[str, Any]]:
  """This process's slices of a split's evaluation batches.

  Raises:
    ValueError: there are none.
  """
  index, count = feed(mesh)
  batch = None
  for batch in data.dataset(split).evaluation_batches(
    size_of(batch_size, data), num_batches, index, count
  ):
    yield batch
  if batch is None:
    raise ValueError(f"split={split!r} has no row to evaluate on.")


@kept
def _compiled(step, objective, mesh):
  return jax.jit(
    functools.partial(step, objective),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )


def gathered(
  step: Callable[[Any, Mapping[str, Any], Mapping[str, jax.Array]], Any],
  objective: Any,
  mesh: Mesh,
) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Any]:
  """A compiled step whose outputs every process has whole, as NumPy arrays.

  They are fetched at once: many collectives in flight can stop a CPU mesh.
  Evaluators of equal steps and objectives share what is compiled.

  Args:
    step: of (objective, variables, batch).
    objective: the first of them.
    mesh: the device mesh.

  Returns:
    A function of the variables and of this process's slice of a batch.
  """
  compiled = _compiled(step, objective, mesh)

  def run(variables, batch):
    with jax.set_mesh(mesh):
      return jax.device_get(compiled(variables, put_batch(batch, mesh)))

  return run
