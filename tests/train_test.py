"""Whole runs: resume after any kind of end, and what may be in a workdir."""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import evaluate, experiment, loading, train
from bertjax.checkpoint import load_params
from bertjax.config import merge, settings
from bertjax.handover import initial_state
from bertjax.metrics.accumulator import NonFiniteError
from bertjax.optim import Optimizer
from tests import noted, processes, tiny


class ResumeTest(tiny.CorpusTestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = tiny.small(
      cls.root,
      stop=dict(steps=40),
      every=dict(checkpoint=5),
      evals=dict(heldout=dict(every=10)),
    )
    cls.whole = cls.root / "whole"
    processes.finish(processes.start(cls.config, cls.whole))

  def test_killed_twice_equals_uninterrupted(self):
    workdir = self.root / "killed"
    process = processes.start(self.config, workdir)
    processes.wait_for_step(process, workdir, 7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    self.assertLess(int(processes.rows(workdir)[-1]["step"]), 40)
    process = processes.start(self.config, workdir, UNREPORTED="1")
    processes.wait_for_step(process, workdir, 18)
    process.send_signal(signal.SIGTERM)
    said = processes.finish(process)
    stopped = re.search(r"Stopped at step (\d+): signal SIGTERM", said)[1]
    process = processes.start(self.config, workdir, UNREPORTED="1")
    # Such a signal costs no step.
    self.assertIn(f"Resuming at step {stopped}.", processes.finish(process))
    self.assertEqual(processes.values(workdir), processes.values(self.whole))
    a, b = load_params(workdir)[0], load_params(self.whole)[0]
    jax.tree.map(np.testing.assert_array_equal, a, b)

  def test_other_device_counts_read_the_same_batches(self):
    workdir, stage = self.root / "moved", settings(self.config)
    for devices, limit in ((4, 5), (2, 3)):
      build = functools.partial(
        experiment.build, devices=jax.devices()[:devices]
      )
      with (
        noted.noting(workdir),
        mock.patch.object(experiment, "build", build),
        mock.patch.object(train.report, "write_report"),
      ):
        train.run(stage, workdir, limit=limit)
    self.assertEqual(
      processes.held_rows(workdir), processes.held_rows(self.whole)[: 8 * 8]
    )
    losses = [
      [float(row["loss"]) for row in processes.rows(folder)[:8]]
      for folder in (workdir, self.whole)
    ]
    # Sums over devices are rounded otherwise.
    np.testing.assert_allclose(*losses, rtol=1e-4)

  def test_evaluation_finds_the_tokens_of_training(self):
    cache = pathlib.Path(self.config["cache_dir"])
    before = set(cache.rglob("*"))
    with (
      tempfile.TemporaryDirectory() as home,
      mock.patch.dict(os.environ, {"BERTJAX_CACHE": home}),
    ):
      evaluate.evaluate(
        self.whole, split="validation", evaluators=["objective"]
      )
      self.assertEmpty(os.listdir(home))
    self.assertEqual(set(cache.rglob("*")), before)

  def test_a_finished_run_stays_as_it_is(self):
    before = processes.values(self.whole)
    with (
      mock.patch.object(jax, "devices", return_value=jax.devices()[:1]),
      mock.patch.object(train.report, "write_report"),
    ):
      train.train(self.config, self.whole)
    self.assertEqual(processes.values(self.whole), before)

  def test_the_workdir_tells_what_ran(self):
    config = json.loads((self.whole / "config.json").read_text())
    self.assertEqual(config["model"], self.config["model"])
    self.assertIn(
      "jax", json.loads((self.whole / "run.json").read_text())["libraries"]
    )
    self.assertTrue((self.whole / "report" / "curves.png").exists())
    self.assertTrue((self.whole / "tokenizer").is_dir())


class _Configured(tiny.CorpusTestCase):
  @classmethod
  def _config(cls, **changes):
    # One schedule, and so one program, however many steps a run takes.
    return tiny.small(cls.root, **{"horizon": 9, **changes})


class TrainTest(_Configured):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.begun = cls.root / "begun"
    # Partitioned programs take longer to compile; ResumeTest has some.
    cls.enterClassContext(
      mock.patch.object(jax, "devices", return_value=jax.devices()[:1])
    )
    # Plots take longer than the steps; ResumeTest has one.
    cls.enterClassContext(mock.patch.object(train.report, "write_report"))
    cls.begun_result = train.train(cls._config(stop=dict(steps=2)), cls.begun)

  def _begun(self):
    """A workdir of a run of two steps, to do with as one likes."""
    folder = pathlib.Path(self.create_tempdir()) / "run"
    return shutil.copytree(self.begun, folder)

  def test_loss_falls_on_learnable_text(self):
    result = train.train(
      tiny.config(
        self.root,
        optim=dict(name="adamw", learning_rate=1e-2, clip_norm=1.0),
        stop=dict(steps=150),
        every=dict(log=50, checkpoint=150),
        evals=dict(heldout=dict(every=150)),
      ),
      self.create_tempdir().full_path,
    )
    self.assertLess(
      result.metrics["heldout/mlm_loss"],
      result.metrics["heldout/unigram_loss"] - 0.2,
    )

  def test_a_target_ends_the_run_at_the_evaluation_that_reaches_it(self):
    folder = self.create_tempdir().full_path
    config = self._config(
      stop=dict(target=dict(metric="heldout/mlm_accuracy", value=0.0))
    )
    for _ in range(2):  # the same command again goes no further
      result = train.train(config, folder)
      self.assertEqual(result.step, 3)
      self.assertRegex(result.reason, "heldout/mlm_accuracy = .* reached")

  def test_a_training_value_as_target_goes_no_further_either(self):
    folder = self.create_tempdir().full_path
    target = dict(metric="loss", value=1e9, mode="min")
    for _ in range(2):
      result = train.train(self._config(stop=dict(target=target)), folder)
      self.assertEqual(result.step, 1)
      self.assertIn("loss", result.metrics)

  def test_a_finished_grid_selects_by_a_training_value_again(self):
    folder = pathlib.Path(self.create_tempdir())
    config = self._config(
      grid=dict(seed=[3]), keep=dict(best_metric="loss"), stop=dict(steps=1)
    )
    found = [train.train(config, folder) for _ in range(2)]
    self.assertEqual(found[0].metrics["loss"], found[1].metrics["loss"])
    self.assertEqual(found[1].report, folder / "grid.csv")

  def test_the_last_evaluation_counts_beside_a_checkpoint_that_is_due(self):
    config = self._config(
      stop=dict(steps=4),  # checkpoints at 2 and 4, evaluations at 3 and here
      keep=dict(best_metric="heldout/mlm_loss", best_mode="max", keep=9),
    )
    folder = pathlib.Path(self.create_tempdir())
    result = train.train(config, folder)
    metas = {
      step: json.loads(
        (folder / "checkpoints" / str(step) / "meta.json").read_text()
      )
      for step in (2, 3, 4)
    }
    scores = {
      step: meta["metrics"].get("heldout/mlm_loss")
      for step, meta in metas.items()
    }
    self.assertIsNone(scores[2])
    self.assertGreater(scores[3], scores[4])  # the model learns
    self.assertEqual(result.metrics["heldout/mlm_loss"], scores[3])
    # The worst one was selected, and is what the next stage begins with.
    carried = self._config(
      init_from=dict(path=str(folder), carry="optimizer"), keep={}
    )
    begun = initial_state(experiment.build(settings(carried)))
    jax.tree.map(
      np.testing.assert_array_equal, begun.params, load_params(folder, 3)[0]
    )

  def test_without_curves_there_is_no_report(self):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
      result = train.train(
        self._config(writers=(), stop=dict(steps=1)),
        self.create_tempdir().full_path,
      )
    self.assertIsNone(result.report)
    self.assertIn("There is no report", said.getvalue())

  @parameterized.parameters(
    (dict(samples=("no mask",)), r"samples: Text 0 .'no mask'. has no .MASK."),
    (dict(samples=("cat " * 32 + "[MASK]",)), "samples: .*after truncation"),
    (dict(reference_curve="/nope.csv"), "='/nope.csv' is not there; name a"),
    (dict(reference_curve="CSV"), "has the columns step, accuracy; it needs"),
  )
  def test_what_a_report_cannot_show_is_refused_before_training(
    self, changes, message
  ):
    table = self.root / "other.csv"
    table.write_text("step,accuracy\n1,0.5\n")
    if changes.get("reference_curve") == "CSV":
      changes = dict(reference_curve=str(table))
    folder = pathlib.Path(self.create_tempdir()) / "run"
    with self.assertRaisesRegex((ValueError, FileNotFoundError), message):
      train.train(self._config(**changes), folder)
    self.assertFalse(folder.exists())

  def test_a_finished_run_is_compared_with_another_reference(self):
    folder, curve = self._begun(), self.root / "good.csv"
    curve.write_text("step,loss\n1,4.5\n")
    for given, reference in ((str(curve), str(curve)), (None, "")):
      train.train(
        self._config(stop=dict(steps=2), reference_curve=given), folder
      )
      train.report.write_report.assert_called_with(
        folder, reference=reference, samples=[]
      )

  def test_a_finished_run_whose_curves_are_gone_has_no_report(self):
    folder = self._begun()
    (folder / "metrics.csv").unlink()
    config = self._config(stop=dict(steps=2)) | dict(evals={})
    self.assertIsNone(train.train(config, folder).report)
    self.assertTrue((folder / "metrics.csv").exists())  # without a row

  def test_warm_up_in_tokens_knows_the_batch(self):
    warmup = dict(tokens=4 * 8 * 32)  # steps of 8 rows of 32
    built = experiment.build(
      settings(
        self._config(optim=dict(schedule=dict(name="constant", warmup=warmup)))
      )
    )
    rate = built.optimizer.schedule
    np.testing.assert_allclose(rate(1), rate.peak / 4, rtol=1e-6)
    np.testing.assert_allclose(rate(4), rate.peak, rtol=1e-6)

  def test_float16_trains_as_float32_does(self):
    losses, scales = [], None
    for dtype in ("float32", "float16"):
      folder = pathlib.Path(self.create_tempdir())
      train.train(self._config(dtype=dtype), folder)
      rows = processes.rows(folder)
      losses.append([float(row["loss"]) for row in rows])
      scales = [row.get("loss_scale") for row in rows]
    np.testing.assert_allclose(*losses, rtol=2e-3)
    self.assertTrue(np.any(np.not_equal(*losses)))
    self.assertEqual(set(map(float, scales)), {2.0**15})

  def test_dry_run_takes_two_steps_and_leaves_nothing(self):
    folder = pathlib.Path(self.create_tempdir())
    result = train.train(self._config(), folder, dry_run=True)
    self.assertEqual(result.step, 2)
    self.assertEmpty(list(folder.iterdir()))

  @parameterized.parameters(
    ("keep.best_metric", {}),
    ("stop.target.metric", dict(stop=dict(target=dict(value=9)))),
    ("stop.early.metric", dict(stop=dict(early=dict(patience=9)))),
  )
  def test_dry_run_refuses_a_metric_that_is_not_reported(self, field, changes):
    group, *path = field.split(".")
    name = "heldout/mlm_accurcy"
    for key in reversed(path):
      name = {key: name}
    config = merge(self._config(**changes), {group: name})
    with self.assertRaisesRegex(
      ValueError, f"{field}='heldout/mlm_accurcy' is not reported; .*accuracy"
    ):
      train.train(config, "", dry_run=True)

  def test_a_truncated_checkpoint_falls_back(self):
    folder = pathlib.Path(self.create_tempdir())
    first = train.train(self._config(), folder)
    newest = folder / "checkpoints" / "6"
    largest = max(newest.rglob("*"), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with self.assertLogs(level="WARNING") as logs:
      again = train.train(self._config(), folder)
    self.assertRegex("\n".join(logs.output), "checkpoints.*6")
    self.assertEqual(again.step, 6)
    jax.tree.map(
      np.testing.assert_array_equal, first.state.params, again.state.params
    )

  def test_a_checkpoint_of_another_model_is_refused(self):
    folder = self._begun()
    with self.assertRaisesRegex(ValueError, "params/encoder/.*mlp"):
      train.train(self._config(model=dict(mlp_dim=40)), folder)
    self.assertTrue((folder / "checkpoints" / "2").exists())

  def test_the_optimizer_says_what_a_resumed_run_goes_on_with(self):
    with (
      mock.patch.object(
        Optimizer, "resumed", side_effect=ZeroDivisionError
      ) as asked,
      self.assertRaises(ZeroDivisionError),
    ):
      train.train(self._config(stop=dict(steps=3)), self._begun())
    asked.assert_called_once()

  def test_a_resume_tells_what_changed_in_the_config(self):
    folder = self._begun()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
      train.train(
        self._config(stop=dict(steps=3), optim=dict(learning_rate=2e-2)),
        folder,
      )
    changed = [x for x in said.getvalue().splitlines() if "Changed" in x]
    self.assertLen(changed, 2)
    self.assertIn("optim.learning_rate: 0.01 -> 0.02", changed[0])
    self.assertIn("stop.steps: 2 -> 3", changed[1])

  @parameterized.parameters((2, 1e-2), (3, 2e-2))
  def test_the_workdir_tells_what_steps_were_taken_with(self, steps, rate):
    folder = self._begun()
    train.train(
      self._config(stop=dict(steps=steps), optim=dict(learning_rate=2e-2)),
      folder,
    )
    config = json.loads((folder / "config.json").read_text())
    self.assertEqual(config["optim"]["learning_rate"], rate)

  @parameterized.parameters(
    (
      dict(name="lamb", learning_rate=1e-2),
      "optim.name=lamb, but .* with optim.name=adamw",
    ),
    (
      dict(precondition=dict(name="mkor")),
      "optim.precondition.name=mkor, but .*precondition.name=absent",
    ),
  )
  def test_another_optimizer_is_refused_by_name(self, changes, message):
    folder = self._begun()
    with self.assertRaisesRegex(ValueError, message):
      train.train(self._config(optim=changes), folder)
    # Nothing was changed: the old one goes on.
    result = train.train(self._config(stop=dict(steps=3)), folder)
    self.assertEqual(result.step, 3)

  def test_a_function_in_a_config_is_refused_by_field(self):
    config = self._config(optim=dict(no_decay=len))
    with self.assertRaisesRegex(ValueError, "optim.no_decay=<built-in .*dicts"):
      settings(config).to_json()

  def test_other_data_is_refused_on_resume(self):
    folder = self._begun()
    with self.assertRaisesRegex(ValueError, "belongs to other data"):
      train.train(self._config(data=dict(masking=dict(rate=0.2))), folder)

  def test_nan_ends_the_run_and_keeps_what_was_saved(self):
    broken = self._config(
      optim=dict(name="sgd", learning_rate=1e30), every=dict(log=2)
    )
    other = pathlib.Path(self.create_tempdir())
    with self.assertRaisesRegex(NonFiniteError, "steps \\d+ to \\d+"):
      train.train(broken, other)
    for step in (other / "checkpoints").glob("*"):
      params, _ = load_params(other, int(step.name))
      self.assertTrue(
        all(np.isfinite(x).all() for x in jax.tree.leaves(params))
      )

  def test_stages_hand_over_parameters_and_optimizer(self):
    stages = dict(
      one=dict(stop=dict(steps=3)),
      two=dict(
        stop=dict(steps=5),
        data=dict(seq_len=16),
        init_from=dict(carry="optimizer", reset_schedule=False),
      ),
    )
    folder = pathlib.Path(self.create_tempdir())
    config = self._config(
      horizon=9,
      stages=stages,
      optim=dict(schedule=dict(name="linear", warmup=0.0)),
    )
    result = train.train(config, folder)
    self.assertEqual(result.step, 5)
    train.report.write_report.assert_called_with(
      folder / "two", reference="", samples=[]
    )
    rates = [
      float(r["learning_rate"])
      for name in ("one", "two")
      for r in processes.rows(folder / name)
      if r["learning_rate"]
    ]
    # One line over both stages: the counter went on.
    np.testing.assert_allclose(rates, 1e-2 * (1 - np.arange(5) / 9), rtol=1e-5)
    # The whole is known by its last stage.
    jax.tree.map(
      np.testing.assert_array_equal, load_params(folder)[0], result.state.params
    )
    self.assertEqual(loading.load_model(folder).config["stop"], {"steps": 5})
    self.assertEqual(
      loading.describe(folder).tokenizer, folder / "last" / "tokenizer"
    )
    handed, _ = load_params(folder / "one")
    self.assertEqual(
      handed["encoder"]["embeddings"]["token"]["embedding"].shape,
      result.state.params["encoder"]["embeddings"]["token"]["embedding"].shape,
    )

  def test_init_from_starts_with_the_other_runs_parameters(self):
    # A rate of (almost) nothing leaves what was handed over.
    second = train.train(
      self._config(
        init_from=dict(path=str(self.begun)),
        stop=dict(steps=1),
        optim=dict(name="sgd", learning_rate=1e-30, clip_norm=1.0),
      ),
      self.create_tempdir().full_path,
    )
    jax.tree.map(
      np.testing.assert_array_equal,
      self.begun_result.state.params,
      second.state.params,
    )


class WorkdirTest(_Configured):
  """What may be in a workdir before anything is written."""

  STAGES = dict(stages=dict(one={}, two={}))
  GRID = dict(grid=dict(seed=[3, 4]), keep=dict(best_metric="loss"))

  def start(self, names, **changes):
    """Starts in a folder with these files and folders; whether it would run."""
    folder = pathlib.Path(self.create_tempdir())
    for name in names:
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.mkdir() if name.endswith("/") else path.touch()
    before = sorted(folder.rglob("*"))
    config = self._config(cache_dir=str(folder / "cache")) | changes
    try:
      with mock.patch.object(train, "_train_grid") as run:
        train.train(config, folder)
    finally:
      self.assertEqual(sorted(folder.rglob("*")), before)
    return run.called

  @parameterized.parameters(
    (
      ["config.json", "model.safetensors"],
      {},
      "config.json, but no run of bertjax; name a new f",
    ),
    (["tokenizer/", "a.txt"], STAGES, "holds tokenizer, but no run"),
    (["one/run.json", "a.txt"], {}, "holds runs in one, but not this one"),
    (["seed=3/one/run.json", "grid.csv"], {}, "holds runs in seed=3, but"),
    (["three/run.json"], STAGES, "holds runs in three, but not"),
    (["one/config.json"], STAGES, "one holds config.json, but no run"),
    (["run.json"], STAGES, "without stages or a grid, but .* one, two; name"),
    (["checkpoints/"], GRID, "without stages .* has seed=3, seed=4"),
    (["seed=3/run.json"], STAGES, "runs in seed=3, but not this one"),
    (["seed=3/run.json"], GRID | STAGES, "seed=3 holds a run without stages"),
  )
  def test_another_folder_is_refused_as_it_is(self, names, changes, message):
    with self.assertRaisesRegex(ValueError, f"workdir=.*{message}"):
      self.start(names, **changes)

  @parameterized.parameters(
    ([".hidden", "lost+found/", "switch_now", "freeze_now"], {}),
    (["log.txt", "data/a.txt"], {}),
    (["one/a.txt"], STAGES),
    (["cache/tokens"], {}),  # it was killed before it wrote anything else
    (["run.partial"], {}),
    (["run.json", "config.json", "notes.txt"], {}),
    (["one/"], STAGES),
    (["one/run.json", "notes.txt"], STAGES),
    (["seed=3/run.json"], GRID),
    (["seed=9/run.json", "grid.csv"], GRID),
    (["seed=3/one/run.json"], GRID | STAGES),
  )
  def test_a_new_folder_or_its_own_is_not(self, names, changes):
    self.assertTrue(self.start(names, **changes))


if __name__ == "__main__":
  absltest.main()
