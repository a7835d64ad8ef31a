"""Runs that stop early, keep their best checkpoint, break, and form grids."""

import contextlib
import csv
import functools
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import experiment, loading, loop, train
from bertjax.checkpoint import load_params
from bertjax.config import merge, settings
from bertjax.handover import initial_state
from tests import processes
from tests.fine_tuning.pretrained import (
  FineTuningTestCase,
  fine_tuning,
  unreported,
)

pytestmark = pytest.mark.usefixtures("one_device")


@contextlib.contextmanager
def breaking_at(last):
  """Runs end by an error as soon as they have logged this step."""
  fit = loop.fit

  def breaking(*arguments, log, **options):
    def log_or_break(step, metrics):
      log(step, metrics)
      if step + 1 == last:
        raise OSError("no power")

    return fit(*arguments, log=log_or_break, **options)

  with mock.patch.object(loop, "fit", breaking):
    yield


class SelectionTest(FineTuningTestCase):
  """Early stopping, the best checkpoint, grids, and runs that break.

  The worst loss is what is looked for: it is sure to come first.
  """

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(unreported())
    worst = "dev/classification_loss"
    changes = dict(
      samples=(),
      stop=dict(
        epochs=None,
        steps=20,
        early=dict(metric=worst, patience=3, mode="max"),
      ),
      keep=dict(keep=1, best_metric=worst, best_mode="max"),
      every=dict(log=1, checkpoint=4),
      optim=dict(learning_rate=1e-3),
    )
    cls.changed = merge(fine_tuning(cls.pretrained), changes)
    cls.changed["evals"] = dict(
      dev=dict(name="objective", every=3), test=dict(name="task_metrics"),
    )  # fmt: skip
    cls.workdir = cls.root / "selected"
    train.train(cls.changed, cls.workdir)

  def test_the_run_ends_after_the_evaluations_that_brought_nothing(self):
    rows = processes.rows(self.workdir)
    self.assertEqual(int(float(rows[-1]["step"])), 12)  # 3, then 6, 9, 12

  def test_the_best_checkpoint_stays_and_is_what_readers_get(self):
    folder = self.workdir / "checkpoints"
    self.assertEqual({p.name for p in folder.iterdir()}, {"3", "12"})
    best, last = (load_params(self.workdir, step)[0] for step in (3, 12))
    by_default, _ = load_params(self.workdir)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(by_default, best)
    same(
      jax.tree.map(np.asarray, loading.load_model(self.workdir).params), best
    )
    self.assertFalse(
      np.array_equal(best["classifier"]["bias"], last["classifier"]["bias"])
    )
    start = experiment.build(
      settings(self.config(init_from=dict(path=str(self.workdir))))
    )
    same(initial_state(start).params["pooler"], best["pooler"])

  def test_a_run_that_broke_becomes_the_same_run(self):
    workdir = self.root / "broken"
    # The best was at 3, the last checkpoint at 4, an evaluation at 6.
    with breaking_at(7), self.assertRaisesRegex(OSError, "power"):
      train.train(self.changed, workdir)
    self.assertEqual(int(float(processes.rows(workdir)[-1]["step"])), 7)
    train.train(self.changed, workdir)
    self.assertEqual(processes.values(workdir), processes.values(self.workdir))
    for step in (3, 12):
      jax.tree.map(
        np.testing.assert_array_equal,
        load_params(workdir, step)[0],
        load_params(self.workdir, step)[0],
      )

  def test_a_grid_runs_every_combination_and_names_the_best(self):
    grid = dict(optim=dict(learning_rate=[1e-9, 3e-2]), seed=[1])
    config = self.changed | dict(
      grid=grid,
      stop=dict(steps=6),
      keep=dict(best_metric="dev/classification_loss", best_mode="min"),
      every=dict(log=6, checkpoint=6),
    )
    workdir = self.root / "grid"
    result = train.train(config, workdir)
    with (workdir / "grid.csv").open() as file:
      rows = list(csv.DictReader(file))
    self.assertEqual(
      [(r["optim.learning_rate"], r["seed"]) for r in rows],
      [("1e-09", "1"), ("0.03", "1")],
    )
    losses = [float(r["dev/classification_loss"]) for r in rows]
    self.assertEqual([r["best"] for r in rows].index("1"), np.argmin(losses))
    self.assertEqual(np.argmin(losses), 1)  # the rate that learns
    self.assertAlmostEqual(
      result.metrics["dev/classification_loss"], min(losses), places=6
    )
    self.assertIn("test/accuracy", result.metrics)
    best = loading.load_model(workdir)
    self.assertEqual(best.config["optim"]["learning_rate"], 0.03)

  @parameterized.named_parameters(
    (
      "no_list",
      dict(grid=dict(seed=3)),
      "grid.seed=3 must be a list of the values to try",
    ),
    (
      "no_metric",
      dict(grid=dict(seed=[3]), keep=dict(best_metric=None)),
      "grid: keep.best_metric is required",
    ),
    (
      "twice",
      dict(grid=dict(seed=[3, 3])),
      "grid: two combinations are called 'seed=3'; remove one",
    ),
    (
      "never_evaluated",
      dict(keep=dict(best_metric="test/accuracy")),
      "evals.test.every must be set: keep.best_metric='test/accuracy'",
    ),
    (
      "unknown_metric",
      dict(keep=dict(best_metric="dev/accuracie"), stop=dict(early=None)),
      "keep.best_metric='dev/accuracie' is not reported; .*dev/accuracy",
    ),
  )
  def test_what_cannot_be_selected_by_is_refused(self, changes, message):
    config = merge(self.changed, changes)
    with self.assertRaisesRegex(ValueError, message):
      train.train(config, pathlib.Path(self.create_tempdir()))


if __name__ == "__main__":
  absltest.main()
