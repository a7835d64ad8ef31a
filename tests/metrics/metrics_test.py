"""Metrics add up, files survive kills and resumes, rates mean what they say."""

import io
import math
import pathlib
import shutil
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import hooks
from bertjax.metrics import (
  accumulator,
  logger,
  meters,
  progress,
  writers,
)


def temporary(test):
  path = pathlib.Path(tempfile.mkdtemp())
  test.addCleanup(shutil.rmtree, path, ignore_errors=True)
  return path


class Clock:
  now = 0.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


class AccumulatorTest(parameterized.TestCase):
  def test_mean_is_weighted_over_the_whole_window(self):
    sums = accumulator.MetricAccumulator()
    for step, (total, weight) in enumerate([(2.0, 1), (9.0, 3), (0.0, 0)]):
      metrics = {
        "loss": (jnp.float32(total), jnp.int32(weight)),
        "pairs": (jnp.float32(0), jnp.int32(0)),
      }
      with jax.transfer_guard("disallow"):  # nothing is fetched per step
        sums.add(step, metrics)
    self.assertEqual(sums.read(), {"loss": 11 / 4})
    self.assertEqual(sums.read(), {})

  @parameterized.parameters(float("nan"), float("inf"))
  def test_non_finite_loss_names_the_window(self, bad):
    sums = accumulator.MetricAccumulator()
    for step in range(8):
      loss = bad if step == 6 else 1.0
      sums.add(step, {"loss": (jnp.float32(loss), jnp.float32(1))})
      if step == 3:
        self.assertEqual(sums.read(), {"loss": 1.0})
    with self.assertRaisesRegex(
      accumulator.NonFiniteError, "steps 4 to 7.*optim.learning_rate,"
    ):
      sums.read()

  def test_changing_names_are_refused(self):
    sums = accumulator.MetricAccumulator()
    sums.add(0, {"loss": (jnp.float32(1), jnp.float32(1))})
    with self.assertRaisesRegex(ValueError, "loss, nsp not in both step 0"):
      sums.add(1, {"nsp": (jnp.float32(1), jnp.float32(1))})


class CsvTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.path = temporary(self) / "metrics.csv"

  def test_floats_keep_every_digit_and_steps_share_a_row(self):
    value = float(np.float32(1) / 3)
    writer = writers.CsvWriter(self.path)
    writer.write(1, {"loss": value})
    writer.write(2, {"loss": math.nan})
    writer.write(2, {"eval/loss": 4.0})  # a new column in the same row
    writer.write(3, {"loss": 0.5})
    writer.write(3, {"eval/loss": 6.0})
    writer.close()
    table = writers.read_csv(self.path)
    np.testing.assert_array_equal(table["step"], [1, 2, 3])
    np.testing.assert_array_equal(table["loss"], [value, math.nan, 0.5])
    np.testing.assert_array_equal(table["eval/loss"], [math.nan, 4, 6])

  def test_resume_has_each_step_once_wherever_it_was_killed(self):
    whole = writers.CsvWriter(self.path)
    for step in range(1, 9):
      whole.write(step, {"loss": 1 / step})
      if step % 3 == 0:
        whole.write(step, {"eval/loss": 2 / step})
    whole.close()
    expected = self.path.read_bytes()
    for kept in (0, 3, 4, 8):
      for cut in (0, 1, 5, 9):  # bytes of the last rows that a kill lost
        self.path.write_bytes(expected[: len(expected) - cut])
        lost = expected[len(expected) - cut :].count(b"\n")
        resume_from = min(kept, 8 - lost)
        again = writers.CsvWriter(self.path, resume_from=resume_from)
        for step in range(resume_from + 1, 9):
          again.write(step, {"loss": 1 / step})
          if step % 3 == 0:
            again.write(step, {"eval/loss": 2 / step})
        again.close()
        self.assertEqual(self.path.read_bytes(), expected)

  def test_rows_are_on_disk_before_close(self):
    writer = writers.CsvWriter(self.path)
    writer.write(4, {"loss": 2.0})
    self.assertEqual(writers.read_csv(self.path)["loss"], [2.0])
    with self.assertRaisesRegex(ValueError, "step=3 comes after step 4"):
      writer.write(3, {"loss": 1.0})
    writer.close()

  def test_another_table_is_refused(self):
    self.path.write_text("name,age\nx,3\n")
    with self.assertRaisesRegex(ValueError, "not a table of metrics"):
      writers.CsvWriter(self.path)


class WritersTest(absltest.TestCase):
  def test_tensorboard_reads_back_what_was_written_after_a_resume(self):
    from tensorboard.backend.event_processing import event_accumulator

    workdir = temporary(self)
    writer = writers.open_writers(workdir)
    for step in range(1, 6):
      writer.write(step, {"loss": step / 4})
    writer.close()
    writer = writers.open_writers(workdir, resume_from=3)
    writer.write(4, {"loss": 9.0})
    writer.close()
    events = event_accumulator.EventAccumulator(str(workdir / "events"))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("loss")}
    self.assertEqual(found, {1: 0.25, 2: 0.5, 3: 0.75, 4: 9.0})
    self.assertLen(events.Scalars("loss"), 4)
    table = writers.read_csv(workdir / "metrics.csv")
    self.assertEqual(table["loss"], [0.25, 0.5, 0.75, 9.0])

  def test_a_wandb_run_is_its_workdirs_and_continues_on_resume(self):
    wandb, root = mock.Mock(), temporary(self)

    def opened(name, **options):
      (root / name).mkdir(parents=True, exist_ok=True)
      writers.open_writers(root / name, ["wandb"], **options)
      given = wandb.init.call_args.kwargs
      self.assertEqual(f"{given['group']}/{given['name']}", name)
      return given["id"]

    with mock.patch.dict(sys.modules, {"wandb": wandb}):
      first, other = opened("a/seed=0"), opened("b/seed=0")
      self.assertNotEqual(first, other)
      self.assertEqual(opened("a/seed=0", resume_from=3), first)
      self.assertEqual(opened("b/seed=0", resume_from=3), other)
      self.assertNotEqual(opened("a/seed=0"), first)  # begins anew
      opened("c/phase2", resume_from=3)  # begins with the step of another run

  def test_unknown_writer_is_refused(self):
    with self.assertRaisesRegex(ValueError, "'cvs' is unknown.*'csv'"):
      writers.open_writers(temporary(self), ["cvs"])


class MetersTest(absltest.TestCase):
  def test_flops_equal_what_xla_counts(self):
    t, e, a, f, v, m = 11, 12, 15, 20, 37, 5

    def row(x, qkv, scores, up, down, head, out):
      q = x @ qkv  # three products of this size, one output
      for _ in range(2):
        q = q + x @ qkv
      attended = scores @ q
      x = attended @ qkv.T
      x = (x @ up) @ down
      return (x[:m] @ head) @ out, q @ q.T

    shapes = [(t, e), (e, a), (t, t), (e, f), (f, e), (e, e), (e, v)]
    jaxpr = jax.make_jaxpr(row)(*(jnp.zeros(s) for s in shapes))
    counted = 0
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        ((contract, _), _) = equation.params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[i] for i in contract)
        counted += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    sizes = dict(
      num_layers=1,
      emb_dim=e,
      mlp_dim=f,
      seq_len=t,
      vocab_size=v,
      max_masked=m,
      attention_dim=a,
    )
    self.assertEqual(meters.forward_flops(**sizes), counted)
    self.assertEqual(meters.train_flops(**sizes), 3 * counted)

  def test_bert_base_is_about_six_flops_per_weight_and_token(self):
    flops = meters.train_flops(
      num_layers=12,
      emb_dim=768,
      mlp_dim=3072,
      seq_len=128,
      vocab_size=30522,
      max_masked=0,
    )
    # 85.0 M matrix weights in the encoder; attention adds 4 t / 12 e of it.
    weights = 12 * 12 * 768**2
    self.assertAlmostEqual(
      flops / 128 / (6 * weights), 1 + 128 / (6 * 768), places=6
    )

  def test_rates_leave_out_pauses(self):
    clock = Clock()
    meter = meters.Throughput(
      flops_per_token=10.0, peak=meters.Peak(400.0, False), clock=clock
    )
    self.assertEqual(meter.read(1, 5, 6), {})
    meter.start()
    clock.now += 2
    with meter.pause():
      clock.now += 100
    clock.now += 3
    rates = meter.read(steps=10, tokens=50, slots=60)
    self.assertEqual(
      rates,
      {
        "step_time_s": 0.5,
        "tokens_per_s": 10.0,
        "slots_per_s": 12.0,
        "mfu": 0.25,
      },
    )

  def test_cpu_peak_is_measured_once_for_all_fake_devices(self):
    peak = meters.peak_flops()
    self.assertTrue(peak.measured)
    self.assertEqual(peak, meters.peak_flops(jax.devices()[:1]))

  def test_accelerator_peaks_take_the_longest_name(self):
    def device(kind):
      return mock.Mock(
        spec=jax.Device, platform="tpu", process_index=0, device_kind=kind
      )

    for kind, flops in (
      ("TPU v5 lite", 197e12),
      ("TPU v5", 459e12),
      ("NVIDIA H100 80GB HBM3", 989e12),
      ("NVIDIA H100 PCIe", 756e12),
      ("NVIDIA A100-SXM4-80GB", 312e12),
    ):
      peak = meters.peak_flops([device(kind)] * 3)
      self.assertEqual(peak, meters.Peak(3 * flops, False), kind)
    self.assertIsNone(meters.peak_flops([device("Abacus")]))


class LoggerTest(absltest.TestCase):
  def test_rows_rates_and_totals_of_a_run(self):
    workdir = temporary(self)
    clock = Clock()
    out = io.StringIO()
    writer = writers.open_writers(workdir, ["csv"])
    log = logger.TrainLogger(
      hooks.Every(2),
      writer,
      slots_per_step=40,
      throughput=meters.Throughput(clock=clock),
      progress=progress.Progress(6, stream=out),
      tokens_seen=1000,
    )
    for step in range(6):
      clock.now += 60 if step == 0 else 0.5  # the first one compiles
      log(
        step,
        {
          "loss": (jnp.float32(step), jnp.float32(1)),
          "tokens": (jnp.int32(30), jnp.int32(1)),
          "learning_rate": (jnp.float32(step / 1000), jnp.float32(1)),
        },
      )
    writer.close()
    table = writers.read_csv(workdir / "metrics.csv")
    self.assertEqual(table["step"], [2, 4, 6])
    self.assertEqual(table["loss"], [0.5, 2.5, 4.5])
    self.assertEqual(table["tokens_seen"], [1060, 1120, 1180])
    self.assertEqual(table["tokens_per_s"], [60, 60, 60])
    self.assertEqual(table["slots_per_s"], [80, 80, 80])
    np.testing.assert_allclose(
      table["learning_rate"],
      [0.0005, 0.0025, 0.0045],
      rtol=1e-6,  # float32
    )
    lines = out.getvalue().splitlines()
    self.assertEqual(
      lines[0], "step 2/6  loss 0.5000  lr 5.00e-04  tok/s 60  eta 0:02"
    )
    self.assertLen(lines, 3)

  def test_terminal_gets_a_bar_and_no_lines(self):
    out = Terminal()
    bar = progress.Progress(4, start=1, stream=out)
    bar.advance(3)
    bar.report(3, {"loss": 2.5})
    bar.advance(4)
    bar.close()
    self.assertIn("4/4", out.getvalue())
    self.assertIn("loss=2.5000", out.getvalue())
    self.assertNotIn("step 3/4", out.getvalue())

  def test_duration(self):
    self.assertEqual(progress.duration(75.2), "1:15")
    self.assertEqual(progress.duration(3675), "1:01:15")


if __name__ == "__main__":
  absltest.main()
