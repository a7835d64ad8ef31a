"""Microbatches of a mesh add up, and their sums are sent once."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from bertjax import hardware, train_step
from bertjax.accumulation import accumulate
from bertjax.hardware import hlo
from bertjax.objectives.fine_tuning import Classification
from bertjax.objectives.left_to_right import LeftToRightLM
from bertjax.objectives.masked_lm import MaskedLM
from bertjax.objectives.masked_points import MaskedPoints
from bertjax.objectives.part_segmentation import PartSegmentation
from bertjax.objectives.point_classification import PointClassification
from bertjax.objectives.point_reconstruction import PointReconstruction
from tests.optim.workers import HIDDEN, OUTPUTS, Dense, Regression, world


def _sent(**options):
  """Bytes that a device adds to sums over "data" in a step."""
  w = world(name="sgd", **options)
  with jax.set_mesh(w.mesh):
    text = w.lower().compile().as_text()
  return sum(
    found.operand_bytes * found.times
    for found in hardware.read_collectives(hlo.Module(text))
    if "data" in found.axes(dict(w.mesh.shape))
  )


class ExchangeTest(parameterized.TestCase):
  @parameterized.product(
    objective=(Dense(), Regression()),
    axes=((("data", 4),), (("data", 2), ("fsdp", 2))),
  )
  def test_many_microbatches_send_no_more_than_one(self, **options):
    one = _sent(**options)
    self.assertGreater(one, 4 * HIDDEN * OUTPUTS)
    # Some scalars more: weights and losses.
    self.assertLess(_sent(**options, microbatches=4), one + 64)


class TracingTest(absltest.TestCase):
  def test_a_gradient_is_traced_once(self):
    traced = []

    @jax.custom_vjp
    def double(x):
      return 2 * x

    def backward(_, g):
      traced.append(g)
      return (2 * g,)

    double.defvjp(lambda x: (2 * x, None), backward)

    def loss(params, extra, batch, key):
      del key
      total = (double(params["params"]["w"]) * batch["x"]).sum()
      return total, ({"total": total}, extra)

    w, x = jnp.float32(3.0), jnp.arange(8.0)
    total, grads, metrics, _ = accumulate(
      loss, {"params": {"w": w}}, {}, {"x": x}, jax.random.key(0), 4
    )
    self.assertLen(traced, 1)
    self.assertEqual(total, 6 * x.sum())
    self.assertEqual(metrics["total"], total)
    self.assertEqual(grads["params"]["w"], 2 * x.sum())


class WhenTest(parameterized.TestCase):
  """Whether a step sums once."""

  def once(self, *, rows=True, local=False, microbatches=2, data=4):
    return train_step.sums_once(
      SimpleNamespace(independent_rows=rows),
      SimpleNamespace(local_gradients=local),
      microbatches,
      SimpleNamespace(shape={"data": data}),
    )

  def test_rows_that_see_each_other_and_single_parts_do_not(self):
    self.assertTrue(self.once())
    for other in (
      dict(rows=False),
      dict(local=True),
      dict(microbatches=1),
      dict(data=1),
    ):
      self.assertFalse(self.once(**other), other)

  @parameterized.parameters(
    (MaskedLM, True),
    (LeftToRightLM, True),
    (Classification, True),
    (MaskedPoints, False),  # mixes clouds, and has a queue
    (PartSegmentation, False),  # BatchNorm
    (PointClassification, False),  # BatchNorm
    (PointReconstruction, False),  # BatchNorm, and codes of the whole batch
  )
  def test_objectives_say_whether_rows_see_each_other(self, objective, alone):
    self.assertEqual(objective.independent_rows, alone)


if __name__ == "__main__":
  absltest.main()
