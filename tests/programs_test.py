"""What equal configs share in a process, and what they do not."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import experiment, programs, reuse, train, train_step
from bertjax.config import settings
from bertjax.models import MODELS
from bertjax.reuse import Partial, kept
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")


class ProgramsTest(tiny.CorpusTestCase):
  def build(self, **changes):
    return experiment.build(settings(tiny.small(self.root, **changes)))

  @parameterized.parameters(
    dict(seed=4),
    dict(seeds=dict(dropout=5)),
    dict(data=dict(masking=dict(unit="whole_word"))),
    dict(evals=dict(heldout=dict(every=1)), every=dict(log=3)),
  )
  def test_what_is_not_compiled_makes_no_difference(self, **changes):
    self.assertIs(self.build().program, self.build(**changes).program)

  @parameterized.parameters(
    dict(optim=dict(learning_rate=2e-2)),
    dict(stop=dict(steps=7)),
    dict(model=dict(dropout_rate=0.2)),
    dict(data=dict(batch_size=16)),
    dict(microbatches=2),
    dict(prng="rbg"),
    dict(dtype="bfloat16"),
  )
  def test_what_is_compiled_does(self, **changes):
    self.assertIsNot(self.build().program, self.build(**changes).program)

  def test_another_seed_compiles_no_step_and_trains_as_it_does_alone(self):
    config = tiny.small(self.root, stop=dict(steps=2), evals={})
    with mock.patch.object(train.report, "write_report"):
      train.train(config, self.root / "first")
      with mock.patch.object(
        train_step, "jit_step", side_effect=AssertionError("compiled again")
      ):
        shared = train.train(config | dict(seed=4), self.root / "second")
      with mock.patch.object(
        programs, "_program", programs._program.__wrapped__
      ):
        alone = train.train(config | dict(seed=4), self.root / "alone")
    jax.tree.map(
      np.testing.assert_array_equal, shared.state.params, alone.state.params
    )

  def test_every_run_counts_its_own_steps(self):
    calls = []

    class Compacting:
      compact_every = 2

      def compact(self, opt_state):
        calls.append(opt_state)
        return opt_state

    def jitted(state, batch):
      return state, batch

    mesh = self.build().mesh
    first, second = (
      train_step.runner(jitted, Compacting(), mesh) for _ in range(2)
    )
    state = mock.Mock()
    for run in (first, second):
      run(state, {})
    self.assertEmpty(calls)  # two steps, but not of one run
    second(state, {})
    self.assertLen(calls, 1)


class KeptTest(absltest.TestCase):
  def test_equal_arguments_are_computed_once_and_those_without_hash_anew(self):
    made = []
    make = kept(lambda x: made.append(x) or len(made))
    self.assertEqual([make(1), make(1), make(2), make(1)], [1, 1, 2, 1])
    self.assertEqual([make([1]), make([1])], [3, 4])
    reuse.forget()
    self.assertEqual(make(1), 5)


class PartialTest(parameterized.TestCase):
  def test_equal_parts_are_equal(self):
    self.assertEqual(Partial(nn.Dense, 3), Partial(nn.Dense, 3))
    self.assertEqual(
      hash(Partial(nn.Dense, features=3, name="x")),
      hash(Partial(nn.Dense, name="x", features=3)),
    )
    for other in (Partial(nn.Dense, 4), Partial(nn.Embed, 3), nn.Dense):
      self.assertNotEqual(Partial(nn.Dense, 3), other)

  def test_an_argument_without_hash_equals_nothing_else(self):
    first, second = (Partial(nn.Dense, features=[3]) for _ in range(2))
    self.assertEqual(first, first)
    self.assertLen({first, second}, 2)

  @parameterized.parameters(
    ("bert", dict(vocab_size=64)),
    ("roberta", dict(vocab_size=64)),
    ("left_to_right_bert", dict(vocab_size=64)),
    ("bert", dict(vocab_size=64, positions="relative", norm="pre")),
    ("point_bert", {}),
  )
  def test_models_that_are_built_alike_are_equal(self, name, options):
    a, b, other = (
      MODELS[name](**options, dtype=dtype)
      for dtype in (jnp.float32, jnp.float32, jnp.bfloat16)
    )
    self.assertEqual(a, b)
    self.assertEqual(hash(a), hash(b))
    self.assertNotEqual(a, other)


if __name__ == "__main__":
  absltest.main()
