"""Runs are trained once, continued after a kill, and compared in pairs."""

import pathlib
import statistics
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax import train
from bertjax.metrics.accumulator import NonFiniteError
from experiments import arms


def result(interrupted=False, **metrics):
  return train.Result(
    state=None,
    step=5,
    reason="SIGTERM",
    metrics=metrics,
    interrupted=interrupted,
    elapsed_s=1.5,
  )


def run(seed, value, **factors):
  return arms.Run(factors, seed, {"accuracy": value}, 1.0, pathlib.Path())


class BenchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir())
    self.train = self.enterContext(mock.patch.object(train, "train"))
    self.train.return_value = result(accuracy=0.25)

  def folders(self):
    return [call.args[1] for call in self.train.call_args_list]

  def test_a_finished_run_is_read_back(self):
    config = {"model": {"name": "bert"}, "seed": 7}
    first = arms.Bench(self.workdir).run(config, seed=3, arm="a/b c")
    again = arms.Bench(self.workdir).run(config, seed=3, arm="a/b c")
    self.assertEqual(first, again)
    self.train.assert_called_once()
    self.assertEqual(self.train.call_args.args[0]["seed"], 3)
    self.assertEqual(first.workdir.parent, self.workdir)
    self.assertEqual(
      first.row(),
      {"arm": "a/b c", "seed": 3, "accuracy": 0.25, "seconds": 1.5},
    )

  def test_seeds_and_changed_configs_have_their_own_folders(self):
    bench = arms.Bench(self.workdir)
    bench.run({"model": {"size": "tiny"}}, seed=0, arm="a")
    bench.run({"model": {"size": "tiny"}}, seed=1, arm="a")
    bench.run({"model": {"size": "mini"}}, seed=0, arm="a")
    bench.run({"model": {"size": "tiny"}}, seed=0, arm="b")
    self.assertLen(set(self.folders()), 4)
    self.assertLen(bench.runs, 4)

  def test_a_run_that_diverges_is_an_error_or_a_finding(self):
    self.train.side_effect = NonFiniteError("loss is nan")
    bench = arms.Bench(self.workdir)
    with self.assertRaisesRegex(NonFiniteError, "loss is nan"):
      bench.run({}, seed=0, arm="a")
    self.assertEmpty(bench.runs)
    for _ in range(2):
      found = bench.run({}, seed=0, diverged={"accuracy": 0.0}, arm="a")
      self.assertEqual(found.metrics, {"accuracy": 0.0})
    self.assertEqual(self.train.call_count, 2)  # remembered

  def test_a_killed_run_goes_on_in_its_folder(self):
    self.train.side_effect = KeyboardInterrupt
    with self.assertRaises(KeyboardInterrupt):
      arms.Bench(self.workdir).run({}, seed=0, arm="a")
    self.train.side_effect = None
    arms.Bench(self.workdir).run({}, seed=0, arm="a")
    first, second = self.folders()
    self.assertEqual(first, second)

  def test_an_interrupted_run_ends_the_experiment_and_is_not_finished(self):
    self.train.return_value = result(interrupted=True)
    bench = arms.Bench(self.workdir)
    with self.assertRaisesRegex(
      arms.InterruptedRunError, "step 5: SIGTERM.*same command continues"
    ):
      bench.run({}, seed=0, arm="a")
    self.assertEmpty(bench.runs)
    self.train.return_value = result(accuracy=1.0)
    self.assertEqual(bench.run({}, seed=0, arm="a").metrics["accuracy"], 1.0)

  def test_a_curve_has_the_steps_at_which_it_was_measured(self):
    found = arms.Bench(self.workdir).run({}, seed=0, arm="a")
    (found.workdir / "metrics.csv").write_text(
      "step,loss,test/accuracy\n2,3.5,\n4,3.25,0.5\n"
    )
    self.assertEqual(found.curve("loss"), ([2, 4], [3.5, 3.25]))
    self.assertEqual(found.curve("test/accuracy"), ([4], [0.5]))


class StatisticsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # The seed moves both arms alike, by much more than they differ.
    self.runs = [
      run(seed, 10.0 * seed + extra, arm=arm)
      for seed in (0, 1, 2)
      for arm, extra in (("new", 0.5 + 0.25 * seed), ("old", 0.0))
    ]

  def test_stat_is_mean_and_sample_deviation(self):
    found = arms.stat(self.runs, "accuracy", arm="old")
    self.assertEqual(found.values, (0.0, 10.0, 20.0))
    self.assertEqual(found.mean, 10.0)
    self.assertEqual(found.spread, statistics.stdev([0, 10, 20]))

  @parameterized.parameters(
    ((0.25, 0.75), "{}", "0.500 ± 0.354"),
    ((0.25, 0.75), "{:+.1f}", "+0.5 ± 0.4"),
    ((0.25,), "{}", "0.250"),
  )
  def test_stat_prints_its_spread_unless_there_is_none(
    self, values, form, shown
  ):
    self.assertEqual(form.format(arms.Stat(values)), shown)

  def test_summary_has_a_row_for_each_combination_of_factors(self):
    metrics = {"ACC": "accuracy", "BLEU": "bleu"}
    self.assertEqual(
      arms.summary(self.runs, metrics),
      [
        {"arm": "new", "runs": 3, "ACC": "10.750 ± 10.250"},
        {"arm": "old", "runs": 3, "ACC": "10.000 ± 10.000"},
      ],
    )

  def test_gains_are_differences_within_a_seed(self):
    found = arms.gains(self.runs, "accuracy", "arm", "new", "old")
    self.assertEqual(found.values, (0.5, 0.75, 1.0))

  def test_gains_pair_runs_that_agree_in_everything_else(self):
    runs = [
      run(0, 1.0, arm="old", labels=8),
      run(0, 2.0, arm="old", labels=16),
      run(0, 4.0, arm="new", labels=16),
      run(1, 9.0, arm="new", labels=16),  # no partner
    ]
    found = arms.gains(runs, "accuracy", "arm", "new", "old")
    self.assertEqual(found.values, (2.0,))
    with self.assertRaisesRegex(ValueError, "no two runs differ just in arm"):
      arms.gains(runs, "accuracy", "arm", "new", "old", labels=8)

  def test_select_takes_factors_and_seed(self):
    found = arms.select(self.runs, arm="new", seed=2)
    self.assertEqual([r.metrics["accuracy"] for r in found], [21.0])

  def test_no_run_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "no run has .*'arm': 'newer'"):
      arms.stat(self.runs, "accuracy", arm="newer")


if __name__ == "__main__":
  absltest.main()
