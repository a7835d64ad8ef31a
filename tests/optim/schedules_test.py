"""Schedules at the points that papers and codes state."""

import math

import jax
import numpy as np
import optax
from absl.testing import absltest, parameterized

from bertjax.optim import SCHEDULES, build_schedule, square_root_scaling

# Rates are float32: relative error of a few 1e-7.
RTOL = 1e-6


def build(total_steps, learning_rate=1.0, tokens_per_step=None, **spec):
  return build_schedule(
    spec,
    learning_rate=learning_rate,
    total_steps=total_steps,
    tokens_per_step=tokens_per_step,
  )


class SchedulesTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("linear", dict(name="linear"), {20: 1.0, 60: 0.5, 100: 0.0}),
    (
      "linear_reference",
      dict(name="linear_reference"),
      {19: 0.95, 20: 0.8, 60: 0.4, 100: 0.0},
    ),
    (
      "polynomial",
      dict(name="polynomial", power=0.5),
      {20: 1.0, 80: 0.5, 100: 0.0},
    ),
    (
      "polynomial_reference",
      dict(name="polynomial_reference", power=0.5),
      {20: math.sqrt(0.8), 75: 0.5, 100: 0.0},
    ),
    (
      "cosine",
      dict(name="cosine", end_factor=0.1),
      {20: 1.0, 60: 0.55, 100: 0.1},
    ),
    ("constant", dict(name="constant"), {20: 1.0, 100: 1.0}),
    ("inverse_sqrt", dict(name="inverse_sqrt"), {20: 1.0, 80: 0.5}),
    (
      "staircase",
      dict(name="staircase", every=30, factor=0.5),
      {20: 1.0, 49: 1.0, 50: 0.5, 80: 0.25},
    ),
    (
      "trapezoid",
      dict(name="trapezoid", decay=40, end_factor=0.2),
      {20: 1.0, 60: 1.0, 70: 0.6, 100: 0.2},
    ),
  )
  def test_points(self, spec, points):
    for warmup in (20, 0.2):
      schedule = build(100, warmup=warmup, learning_rate=3.0, **spec)
      for step, value in ({0: 0.0, 5: 0.25} | points).items():
        np.testing.assert_allclose(
          schedule(step), 3.0 * value, rtol=RTOL, atol=1e-6
        )
      if spec["name"] != "inverse_sqrt":
        np.testing.assert_array_equal(schedule(250), schedule(100))

  @parameterized.parameters("linear", "cosine")
  def test_continuous_forms_are_optax(self, name):
    mine = build(100, name=name, warmup=20)
    theirs = (
      optax.warmup_cosine_decay_schedule(0.0, 1.0, 20, 100)
      if name == "cosine"
      else optax.join_schedules(
        [
          optax.linear_schedule(0.0, 1.0, 20),
          optax.linear_schedule(1.0, 0.0, 80),
        ],
        [20],
      )
    )
    for step in range(0, 110, 3):
      np.testing.assert_allclose(mine(step), theirs(step), rtol=RTOL, atol=1e-6)

  @parameterized.parameters(
    (1271, 100, -25), (820, 256, -76), (454, 314, -112), (470, 290, -100)
  )
  def test_negative_start_of_mlperf_runs(self, total, warmup, start):
    schedule = build(
      total, name="linear_reference", warmup=warmup, warmup_start=start
    )
    np.testing.assert_allclose(schedule(0), -start / warmup, rtol=RTOL)
    end = warmup + start
    np.testing.assert_allclose(
      schedule(end - 1), (warmup - 1) / warmup, rtol=RTOL
    )
    # The decay counts from step 0.
    np.testing.assert_allclose(schedule(end), 1 - end / total, rtol=RTOL)
    np.testing.assert_allclose(schedule(total), 0.0, atol=RTOL)

  def test_mixed_batch_run_of_lamb(self):
    schedule = build(
      7038 + 1563,
      name="two_phase",
      phases=[
        dict(
          name="polynomial_reference",
          steps=7038,
          learning_rate=6e-3,
          warmup=0.2843,
          power=0.5,
        ),
        dict(
          name="polynomial_reference",
          learning_rate=4e-3,
          warmup=0.128,
          power=0.5,
        ),
      ],
    )
    self.assertEqual(schedule.peak, 6e-3)
    expected = {
      0: 0.0,
      1000: 6e-3 * 1000 / 2001,
      2001: 6e-3 * math.sqrt(1 - 2001 / 7038),
      7038: 0.0,  # warm-up again
      7038 + 100: 2e-3,
      7038 + 200: 4e-3 * math.sqrt(1 - 200 / 1563),
      7038 + 1563: 0.0,
    }
    for step, value in expected.items():
      np.testing.assert_allclose(schedule(step), value, rtol=1e-5, atol=1e-8)

  def test_lengths_in_tokens_are_those_steps(self):
    # 1,000 tokens a step: 19.6 steps round to 20, and next to none to one.
    for options, steps in (
      (dict(warmup=dict(tokens=19_600)), dict(warmup=20)),
      (dict(warmup=dict(tokens=2e4), decay=dict(tokens=3e4)),
       dict(warmup=20, decay=30)),
      (dict(warmup=dict(tokens=3)), dict(warmup=1)),
    ):  # fmt: skip
      found = build(100, tokens_per_step=1_000, name="trapezoid", **options)
      wanted = build(100, name="trapezoid", **steps)
      for step in (0, 1, 10, 19, 20, 21, 71, 80, 95, 100):
        self.assertEqual(float(found(step)), float(wanted(step)))

  def test_phases_may_be_as_long_as_so_many_tokens(self):
    def phases(unit):
      first = dict(name="linear", steps=unit(60), warmup=unit(20))
      return [first, dict(name="constant", warmup=unit(10))]

    found = build(
      100,
      tokens_per_step=512,
      name="two_phase",
      phases=phases(lambda n: dict(tokens=512 * n)),
    )
    wanted = build(100, name="two_phase", phases=phases(lambda n: n))
    for step in range(0, 101, 5):
      self.assertEqual(float(found(step)), float(wanted(step)))

  @parameterized.parameters(
    (dict(tokens=0), 512, "warmup.tokens=0 must be a positive number"),
    (dict(tokens="1B"), 512, "warmup.tokens='1B' must be a positive number"),
    (dict(tokens=1e9), 512, "warmup=1953125 must be between 0 and the 100 st"),
    (dict(tokens=1e9), None, "warmup.tokens=1000000000.0 needs tokens_per_st"),
  )
  def test_bad_tokens_are_refused(self, warmup, tokens_per_step, message):
    with self.assertRaisesRegex(ValueError, message):
      build(100, name="linear", warmup=warmup, tokens_per_step=tokens_per_step)

  def test_an_ill_typed_length_is_refused(self):
    with self.assertRaisesRegex(
      ValueError, "warmup={'tokns': 1000000000.0} must be a number"
    ):
      build(100, name="linear", warmup=dict(tokns=1e9), tokens_per_step=512)

  def test_square_root_scaling_is_the_table_of_the_paper(self):
    for i, batch_size in enumerate((32768, 16384, 8192, 4096, 2048, 1024, 512)):
      rate, warmup = square_root_scaling(batch_size)
      self.assertAlmostEqual(rate, 5e-3 / 2 ** (i / 2), places=12)
      self.assertAlmostEqual(warmup, 1 / (5 * 2**i), places=12)

  @parameterized.parameters(sorted(set(SCHEDULES) - {"two_phase"}))
  def test_every_row_runs_in_jit_and_peaks_at_its_peak(self, name):
    schedule = build(50, learning_rate=2.0, name=name, warmup=5)
    with jax.numpy_dtype_promotion("strict"):
      rates = jax.jit(jax.vmap(schedule))(np.arange(60, dtype=np.int32))
    self.assertEqual(rates.dtype, np.float32)
    self.assertLessEqual(float(rates.max()), schedule.peak)
    self.assertEqual(float(rates[0]), 0.0)
    self.assertGreaterEqual(float(rates.min()), 0.0)

  @parameterized.parameters(
    (dict(name="linear", warmup=1.5), "warmup=1.5 is a float"),
    (dict(name="linear", warmup=101), "warmup=101 must be between 0 and"),
    (dict(name="linear", warmup=-0.1), "warmup=-0.1"),
    (dict(name="linear", warmup=True), "warmup=True"),
    (dict(name="linear", warmup=5, warmup_start=-6), "warmup_start=-6"),
    (dict(name="staircase", every=0), "every=0 must be at least one"),
    (dict(name="staircase", factor=1.1), "factor=1.1 must be in"),
    (dict(name="linear", end_factor=2.0), "end_factor=2.0"),
    (dict(name="polynomial", power=0), "power=0"),
    (dict(name="linaer"), "optim.schedule.name='linaer' .* 'linear'"),
    (dict(name="linear", warmpu=1), "optim.schedule.warmpu"),
    (dict(name="trapezoid", warmup=60, decay=50), "do not fit in 100"),
    (dict(name="two_phase", phases=[]), "phases is empty"),
    (
      dict(name="two_phase", phases=[dict(name="linear", steps=40)]),
      "40 steps together but total_steps=100",
    ),
    (
      dict(name="two_phase", phases=[dict(name="lin", steps=100)]),
      r"optim.schedule.phases\[0\].name='lin'",
    ),
  )
  def test_bad_schedules_are_refused(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      build(100, **spec)

  def test_rate_must_be_positive(self):
    with self.assertRaisesRegex(ValueError, "learning_rate=0"):
      build(100, learning_rate=0.0, name="constant")


if __name__ == "__main__":
  absltest.main()
