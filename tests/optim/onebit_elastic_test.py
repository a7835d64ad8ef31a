"""Runs that average in one bit go on with other workers."""

import pathlib

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import optim
from bertjax.checkpoint import Checkpointer
from bertjax.data.dataset import RowDataset
from bertjax.optim.onebit_adam import OneBitAdamState
from bertjax.optim.onebit_lamb import OneBitLambState
from bertjax.parallel import elastic
from bertjax.parallel.error_feedback import ErrorFeedback
from bertjax.parallel.sharding import put_batch
from tests.optim import onebit_state, workers
from tests.optim.workers import world


class _Stream(RowDataset):
  """The rows of `workers.batch`, step after step, as a dataset."""

  def __init__(self):
    self.seq_len, self.pad_id, self.seed = 1, 0, 0

  @property
  def row_spec(self):
    return {
      name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
      for name, x in workers.batch().items()
    }

  def rows_per_epoch(self, epoch):
    return 100 * workers.ROWS

  def rows(self, first, stop):
    rows = [divmod(row, workers.ROWS) for row in range(first, stop)]
    return {
      name: np.stack([workers.batch(step)[name][i] for step, i in rows])
      for name in self.row_spec
    }

  def fingerprint(self):
    return "workers"

  def reseeded(self, seed):
    raise NotImplementedError


class ElasticTest(parameterized.TestCase):
  def test_on_other_workers_what_is_owed_and_the_rows_stay(self):
    self._assert_stays("onebit_adam", 8)

  # What is owed is held and cut alike.
  @pytest.mark.slow
  def test_what_is_owed_stays_beside_the_ratios_of_lamb(self):
    self._assert_stays("onebit_lamb", 4)

  def _assert_stays(self, name, count):
    """On so many workers, then on half of them, then on as many as before."""
    folder = pathlib.Path(self.create_tempdir())
    options = dict(name=name, freeze_step=3)
    full, half = (
      world(axes=axes, **options)
      for axes in ((("data", count),), (("data", count // 2), ("fsdp", 2)))
    )
    state, losses, position, before = full.init(), [], None, None
    for w, hosts, start, until in (
      (full, count, 0, 6), (half, count // 2, 6, 8), (full, count, 8, 10)
    ):  # fmt: skip
      readers = [
        _Stream().iterator(
          workers.ROWS, process_index=i, process_count=hosts, prefetch=0
        )
        for i in range(hosts)
      ]
      if position is not None:
        with Checkpointer(folder) as checkpointer:
          checkpointer.save(start, state, iterator_state=position, config={})
          checkpointer.wait()
          restored = checkpointer.restore(w.abstract, adapt=elastic.adapt)
        onebit_state.assert_close(
          onebit_state.debt(restored.state), onebit_state.debt(state), atol=1e-7
        )
        kept, state = state, restored.state
        for reader in readers:
          reader.set_state(restored.iterator_state)
        for leaf, wanted in zip(jax.tree.leaves(state),
                                jax.tree.leaves(w.abstract)):  # fmt: skip
          self.assertEqual(leaf.sharding, wanted.sharding)
      for step in range(start, until):
        parts = [next(reader) for reader in readers]
        rows = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        jax.tree.map(np.testing.assert_array_equal, rows, workers.batch(step))
        if step == start and before is not None:
          # The run that is not resized takes the same step.
          stayed, (loss,) = before.run(kept, step, step + 1)
        state, metrics = w.step(state, put_batch(rows, w.mesh))
        losses.append(float(metrics["loss"][0]))
        if step == start and before is not None:
          np.testing.assert_allclose(losses[-1], loss, rtol=1e-6)
          onebit_state.assert_close(
            onebit_state.sent_and_owed(state),
            onebit_state.sent_and_owed(stayed),
          )
      position, before = readers[-1].get_state(), w
    _, expected = full.run(full.init(), 0, 6)
    self.assertEqual(losses[:6], expected)

  def test_the_same_workers_resume_bit_for_bit(self):
    w = world(**onebit_state.ONEBIT)
    state, _ = w.run(w.init(), 0, 5)
    folder = pathlib.Path(self.create_tempdir())
    with Checkpointer(folder) as checkpointer:
      checkpointer.save(5, state, iterator_state={}, config={})
      checkpointer.wait()
      restored = checkpointer.restore(w.abstract, adapt=elastic.adapt).state
    again, _ = w.run(restored, 5, 7)
    straight, _ = w.run(w.init(), 0, 7)
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.device_get((again.params, again.opt_state)),
      jax.device_get((straight.params, straight.opt_state)),
    )

  def test_what_is_owed_is_forgotten_if_asked(self):
    w = world(**onebit_state.ONEBIT, reset_errors=True)
    state, _ = w.run(w.init(), 0, 5)
    resumed = w.optimizer.resumed(state.opt_state)
    (before,), (after,) = (
      onebit_state.nodes(tree, ErrorFeedback)
      for tree in (state.opt_state, resumed)
    )
    self.assertGreater(max(np.abs(x).max() for x in jax.tree.leaves(before)), 0)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
      self.assertEqual(x.sharding, y.sharding)
      np.testing.assert_array_equal(y, 0)
    (old,), (new,) = (
      onebit_state.nodes(tree, OneBitAdamState)
      for tree in (state.opt_state, resumed)
    )
    jax.tree.map(np.testing.assert_array_equal, old.nu, new.nu)
    kept = world(**onebit_state.ONEBIT).optimizer
    self.assertIs(kept.resumed(state.opt_state), state.opt_state)
    with self.assertRaisesRegex(ValueError, "optim.reset_errors is not"):
      world(name="adamw", reset_errors=True)

  @parameterized.parameters("onebit_adam", "onebit_lamb")
  def test_a_new_phase_owes_nothing_and_settles_its_variance_again(self, name):
    w = world(name=name, freeze_step=3)
    state, _ = w.run(w.init(), 0, 5)
    self.assertTrue(np.any(onebit_state.debt(state)["up"]))
    handed = state.replace(
      opt_state=optim.hand_over(state.opt_state, w.init().opt_state)
    )
    for debt in jax.tree.leaves(onebit_state.debt(handed)):
      self.assertFalse(np.any(debt))
    kind = OneBitAdamState if name == "onebit_adam" else OneBitLambState
    (old,), (new,) = (
      onebit_state.nodes(s.opt_state, kind) for s in (state, handed)
    )
    self.assertTrue(old.phase.frozen)
    self.assertFalse(new.phase.frozen)
    jax.tree.map(
      np.testing.assert_array_equal, (old.mu, old.nu), (new.mu, new.nu)
    )

  def test_a_schedule_goes_on_beside_moments_that_begin_again(self):
    w = world(**onebit_state.ONEBIT)
    state, _ = w.run(w.init(), 0, 5)
    handed = optim.hand_over(
      state.opt_state,
      w.init().opt_state,
      reset_schedule=False,
      reset_moments=True,
    )
    self.assertEqual(optim.schedule_step(handed), 5)

  def test_another_optimizer_is_refused(self):
    w, other = world(**onebit_state.ONEBIT), world(name="onebit_sgd")
    folder = pathlib.Path(self.create_tempdir())
    with Checkpointer(folder) as checkpointer:
      checkpointer.save(0, w.init(), iterator_state={}, config={})
      checkpointer.wait()
      with self.assertRaisesRegex(ValueError, "belongs to another model"):
        checkpointer.restore(other.abstract, adapt=elastic.adapt)


if __name__ == "__main__":
  absltest.main()
