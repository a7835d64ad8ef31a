"""The contract of an objective, and the one way its terms become a loss."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Terms = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@runtime_checkable
class Objective(Protocol):
  """A linen module that owns an encoder and its heads.

  The loss of a batch is the sum over terms of coefficient * sum / weight. The
  weights come from the batch alone, so that microbatches and hosts divide by
  the weight of the whole global batch and their gradients add up to its own.

  Attributes:
    coefficients: factor of every term.
    fresh: parts of the parameter tree that may begin untrained when a run takes
      its weights from elsewhere; () if all must be there.
    reads: arrays of a batch without which it cannot train.
    independent_rows: whether a row brings the same to sums, metrics and
      gradients whatever other rows are in its batch, changes no variables, and
      draws by its index in the global batch (`parallel.sharding.first_row`).
  """

  coefficients: Mapping[str, float]
  fresh: tuple[str, ...]
  reads: tuple[str, ...]
  independent_rows: bool

  def weights(self, batch: Mapping[str, ArrayLike]) -> Terms:
    """Total weight of every term in the batch; scalars."""
    ...

  def __call__(
    self, batch: Mapping[str, ArrayLike], *, train: bool
  ) -> tuple[Terms, Metrics]:
    """Weighted sums of every term, and metrics as (sum, weight) pairs."""
    ...

  def encode(self, batch: Mapping[str, ArrayLike]) -> jax.Array:
    """Final hidden states [b, t, e], without dropout."""
    ...

  def outputs(self, batch: Mapping[str, ArrayLike]) -> Terms:
    """All that the model says of rows without labels, for comparisons."""
    ...

  def row_flops(self, params: Any, batch: BatchSpec) -> float | None:
    """FLOPs of the matrix products of one row's forward pass.

    Args:
      params: the objective's parameters, or their shapes.
      batch: shapes of a batch.

    Returns:
      None if nobody has counted them; then there is no MFU.
    """
    ...


def check_reads(
  objective: Objective, held: Collection[str], name: str, data: str
) -> None:
  """Refuses data without an array that the objective reads.

  Args:
    objective: with `reads`.
    held: names of the arrays of a batch.
    name: of the objective, for the message.
    data: what they are called there, in the plural.

  Raises:
    ValueError: names what is missing and what there is.
  """
  if missing := [array for array in objective.reads if array not in held]:
    raise ValueError(
      f"{name} reads {', '.join(missing)}, which {data} do not have; their"
      f" batches hold {', '.join(held)}."
    )


def total_loss(
  sums: Terms, weights: Terms, coefficients: Mapping[str, float]
) -> jax.Array:
  """Sum of coefficient * sum / weight; a term without weight counts nothing."""
  return sum(
    coefficients[name] * sums[name] / jnp.maximum(weights[name], 1.0)
    for name in sums
  )
