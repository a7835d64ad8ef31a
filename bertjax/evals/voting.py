"""Classes of clouds by the sum of votes of several random views.

As reported for Point-BERT, but for one repetition: the published numbers are
the best of nine on the test split.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from bertjax.evals.base import Evaluator, read_batches
from bertjax.parallel.sharding import put_batch


def view(
  key: jax.Array,
  cloud: Float[Array, "b n 3"],
  num_points: int,
  scale: tuple[float, float],
  shift: float,
) -> Float[Array, "b m 3"]:
  """Some points of each cloud, each axis scaled and moved at random.

  Args:
    key: PRNG key.
    cloud: clouds.
    num_points: how many points m, without repetition.
    scale: smallest and largest factor.
    shift: largest distance, to either side.
  """
  choosing, scaling, moving = jax.random.split(key, 3)
  b, n, _ = cloud.shape
  order = jnp.argsort(jax.random.uniform(choosing, (b, n)), axis=1)
  some = jnp.take_along_axis(cloud, order[:, :num_points, None], axis=1)
  size = (b, 1, 3)
  factors = jax.random.uniform(scaling, size, minval=scale[0], maxval=scale[1])
  return some * factors + jax.random.uniform(
    moving, size, minval=-shift, maxval=shift
  )


def voting(
  *,
  objective: Any,
  data: Any,
  mesh: Mesh,
  split: str = "validation",
  views: int = 10,
  num_points: int | None = None,
  scale: Sequence[float] = (2 / 3, 3 / 2),
  shift: float = 0.2,
  batch_size: int | None = None,
) -> Evaluator:
  """Accuracy of the sum of logits over random views, and of one of them.

  Args:
    objective: a `PointClassification`.
    data: with `points` [b, n, 3] and `labels` [b], -1 for none.
    mesh: the device mesh.
    split: of the source.
    views: how many.
    num_points: of a view; all of the n by default.
    scale: see `view`.
    shift: see `view`.
    batch_size: of the global batch; that of training by default.

  Raises:
    ValueError: data without labelled clouds, no view, or one of more points
      than there are.
  """
  spec = data.batch_spec(data.batch_size)
  if "points" not in spec or "labels" not in spec:
    raise ValueError(
      f"evals: voting needs clouds with labels; these data have"
      f" {', '.join(spec)}."
    )
  given = spec["points"].shape[1]
  count = given if num_points is None else num_points
  if views < 1 or not 1 <= count <= given:
    raise ValueError(
      f"views={views} must be at least 1 and num_points={num_points} between 1"
      f" and {given}, the points of a cloud."
    )

  def run(variables, batch, key):
    def add(total, key):
      cloud = view(key, batch["points"], count, tuple(scale), shift)
      logits = objective.apply(
        variables, {**batch, "points": cloud}, method="logits"
      )
      return total + logits, logits

    keys = jax.random.split(key, views)
    shape = jax.eval_shape(
      lambda b: objective.apply(variables, b, method="logits"), batch
    )
    total, each = jax.lax.scan(add, jnp.zeros(shape.shape), keys)
    labels = batch["labels"]
    valid = labels >= 0
    return (
      ((total.argmax(-1) == labels) & valid).sum(),
      ((each[0].argmax(-1) == labels) & valid).sum(),
      valid.sum(),
    )

  run = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def evaluate(variables, key) -> dict[str, float]:
    voted = single = rows = 0
    with jax.set_mesh(mesh):
      batches = read_batches(data, mesh, split, None, batch_size)
      for number, batch in enumerate(batches):
        found = run(
          variables, put_batch(batch, mesh), jax.random.fold_in(key, number)
        )
        a, b, c = map(int, jax.device_get(found))
        voted, single, rows = voted + a, single + b, rows + c
    if not rows:
      raise ValueError(f"split={split!r} has no labelled row to evaluate on.")
    return {"accuracy": voted / rows, "single_view_accuracy": single / rows}

  return Evaluator(evaluate, lambda: data.baseline(split))
