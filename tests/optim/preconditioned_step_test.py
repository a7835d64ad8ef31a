"""Preconditioners through the one train step: devices, what travels."""

import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.hardware import hlo
from tests.optim.workers import HIDDEN, INPUTS, OUTPUTS, Dense, batch, world

_DENSE = Dense()
_SPECS = {
  "mkor": (("name", "mkor"), ("rule", "exact"), ("interval", 2),
           ("wire_dtype", "float32"), ("dtype", "float32")),
  "kfac": (("name", "kfac"), ("inverse_interval", 2)),
  "eva": (("name", "eva"),),
  "sngd": (("name", "sngd"), ("rank", 16), ("interval", 2)),
}  # fmt: skip


def _world(name, **options):
  spec = _SPECS.get(name, name)
  return world(
    objective=_DENSE, name="sgd", learning_rate=0.02, precondition=spec,
    **options,
  )  # fmt: skip


@functools.cache
def _path(name, **options):
  w = _world(name, **options)
  state, losses = w.run(w.init(), 0, 4, lambda step, rows: batch(0))
  return jax.device_get(state.params), losses


class TrainStepTest(parameterized.TestCase):
  """Through the one train step."""

  def _assert_same(self, a, b):
    np.testing.assert_allclose(a[1], b[1], rtol=2e-5)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
      a[0],
      b[0],
    )

  @parameterized.parameters("mkor", "kfac", "eva", "sngd")
  def test_devices_and_microbatches_change_nothing(self, name):
    one = _path(name, axes=(("data", 1),))
    self._assert_same(one, _path(name, axes=(("data", 4),)))
    self._assert_same(one, _path(name, axes=(("data", 2),), microbatches=4))
    self.assertLess(one[1][-1], one[1][0])

  def test_a_preconditioner_asks_only_for_what_it_uses(self):
    found = {name: _world(name).optimizer.statistics.names for name in _SPECS}
    self.assertEqual(
      found["mkor"],
      {"up": ("token_count", "input_sum"),
       "down": ("token_count", "input_sum", "output_sum")},
    )  # fmt: skip

  @parameterized.parameters(("bfloat16", 2), ("float32", 4))
  def test_a_refresh_sends_one_vector_per_side(self, wire_dtype, size):
    """Inputs of both layers, and the gradient that no bias has."""
    spec = tuple(dict(_SPECS["mkor"], wire_dtype=wire_dtype).items())
    w = _world(spec, axes=(("data", 8),))
    with jax.set_mesh(w.mesh):
      lowered = w.lower()
    module = hlo.Module(lowered.compile().as_text())
    found = hardware.read_collectives(module)
    refresh = [c for c in found if len(c.branch)]
    self.assertEqual([c.kind for c in refresh], ["all-reduce"])
    numbers = INPUTS + HIDDEN + OUTPUTS
    # XLA's CPU backend adds up in no less than float32.
    self.assertIn(refresh[0].operand_bytes, (numbers * size, numbers * 4))
    kind = {"bfloat16": "bf16", "float32": "f32"}[wire_dtype]
    self.assertTrue(f"tensor<8x{numbers}x{kind}>" in lowered.as_text())


if __name__ == "__main__":
  absltest.main()
