"""Preconditioners through the one train step: devices, what travels."""

import functools
import importlib.util
import unittest

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import hardware, train_state
from bertjax.hardware import hlo
from bertjax.layers.linear import Linear
from bertjax.models import bert
from bertjax.objectives import masked_lm
from bertjax.optim import build_optimizer
from tests.optim import workers
from tests.optim.workers import HIDDEN, INPUTS, OUTPUTS, Dense, batch, world


class _Scores(nn.Module):
  """A linear layer, and one that scores a vocabulary."""

  coefficients = {"squares": 1.0}
  independent_rows = True
  fresh = ()

  def weights(self, batch):
    return {"squares": jnp.sum(batch["weight"])}

  @nn.compact
  def __call__(self, batch, *, train):
    del train
    init = nn.initializers.normal(0.5)
    hidden = Linear(
      "be,ef->bf", (HIDDEN,), ("norm", "embed"), kernel_init=init, name="up"
    )(batch["x"])
    found = Linear(
      "be,ev->bv", (OUTPUTS,), ("embed", "vocab"), kernel_init=init,
      name="decoder",
    )(jnp.tanh(hidden))  # fmt: skip
    squares = jnp.square(found - batch["y"]).sum(-1) * batch["weight"]
    return {"squares": squares.sum()}, {}


_DENSE, _SCORES = Dense(), _Scores()
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
    self._assert_same(one, _path(name, axes=(("data", 2),), microbatches=4))
    self.assertLess(one[1][-1], one[1][0])

  def test_devices_alone_change_nothing(self):
    one, four = (_path("mkor", axes=(("data", n),)) for n in (1, 4))
    self._assert_same(one, four)

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


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class PodTest(absltest.TestCase):
  def test_a_tpu_adds_up_half_precision(self):
    """XLA's CPU backend does not; two bytes for each number of the vectors."""
    program = hardware.compile_for(
      "v5e:2x2",
      workers.lowered,
      name="sgd",
      precondition=(("name", "mkor"), ("interval", 2)),
    )
    found = hardware.read_collectives(program.module)
    refresh = [c for c in found if len(c.branch)]
    self.assertEqual([c.kind for c in refresh], ["all-reduce"])
    self.assertEqual(refresh[0].operand_bytes, 2 * (INPUTS + HIDDEN + OUTPUTS))


class FirstOrderTest(parameterized.TestCase):
  """Which layers are left to the optimizer alone."""

  def _moved(self, spec):
    options = {} if spec is None else {"precondition": spec}
    w = world(
      objective=_SCORES, name="sgd", learning_rate=0.02, axes=(("data", 1),),
      **options,
    )  # fmt: skip
    state, _ = w.run(w.init(), 0, 1)
    return w.optimizer.statistics, jax.device_get(state.params)

  @parameterized.parameters("mkor", "kfac", "eva")
  def test_a_vocabulary_is_scored_first_order_unless_opted_in(self, name):
    plain = self._moved(None)[1]
    wanted, params = self._moved(_SPECS[name])
    self.assertEqual(set(wanted.layers), {"up"})
    jax.tree.map(
      np.testing.assert_array_equal, params["decoder"], plain["decoder"]
    )
    self.assertTrue(np.any(params["up"]["kernel"] != plain["up"]["kernel"]))
    wanted, params = self._moved((*_SPECS[name], ("first_order", _is_up)))
    self.assertEqual(set(wanted.layers), {"decoder"})
    jax.tree.map(np.testing.assert_array_equal, params["up"], plain["up"])
    self.assertTrue(
      np.any(params["decoder"]["kernel"] != plain["decoder"]["kernel"])
    )

  @parameterized.parameters((None, False), ((), True), (("up/",), True))
  def test_any_list_replaces_the_default(self, first_order, opted_in):
    spec = dict(name="mkor")
    if first_order is not None:
      spec["first_order"] = first_order
    shape = {"x": (2, INPUTS), "y": (2, OUTPUTS), "weight": (2,)}
    layers = _layers(_SCORES, shape, jnp.float32, spec)
    self.assertEqual("decoder" in layers, opted_in)
    self.assertEqual("up" in layers, first_order != ("up/",))

  def test_a_decoder_tied_to_embeddings_is_no_layer(self):
    """Of BERT the encoder's dense layers and the heads' own, nothing else."""
    objective = masked_lm(
      encoder=bert(vocab_size=50, size="tiny"), pair_task="nsp"
    )
    rows = ("tokens", "segment_ids", "type_ids", "positions",
            "masked_positions", "labels")  # fmt: skip
    shapes = dict.fromkeys(rows, (2, 8)) | {"pair_labels": (2,)}
    layers = _layers(objective, shapes, jnp.int32, dict(name="mkor"))
    heads = {path for path in layers if not path.startswith("encoder/")}
    self.assertEqual(heads, {"mlm_head/transform", "pooler/dense", "pair_head"})
    self.assertFalse([path for path in layers if "embed" in path])
    self.assertLen(layers, 6 + len(heads))
    self.assertNotIn(50, [width for x in layers.values() for width in x[1:]])


def _is_up(name, leaf):
  del leaf
  return name.startswith("up/")


def _layers(objective, shapes, dtype, precondition):
  """Those that are asked for statistics: sizes by path."""
  spec = {k: jax.ShapeDtypeStruct(v, dtype) for k, v in shapes.items()}
  params, axes = train_state.abstract_params(objective, spec)
  optimizer = build_optimizer(
    dict(name="sgd", learning_rate=0.1, precondition=precondition),
    total_steps=9,
    params=params,
    logical_axes=axes,
    linear_layers=lambda: train_state.linear_layers(objective, spec),
  )
  return optimizer.statistics.layers


if __name__ == "__main__":
  absltest.main()
