"""Learning rate as a function of the step.

A schedule is warm-up times decay. Warm-up is the same for all: a ramp from 0 at
step 0 to the peak, in steps (int), as a fraction of the phase (float below 1)
or in tokens (`dict(tokens=10**9)`), optionally begun part-way up. Steps count
from 0, so with a warm-up the very first update of BERT has rate 0.

Two families differ in where the decay is drawn from. `linear`, `polynomial` and
`cosine` leave the peak where warm-up ends and are continuous. The `*_reference`
forms, used by the codes of BERT, NVIDIA and MLPerf, draw the decay from step 0:
the rate drops at the end of warm-up from the peak to what the line says there.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bertjax import registry
from bertjax.optim import durations

# Step (int32 scalar, traced or not) -> float32 scalar.
Shape = Callable[[Any], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A learning-rate schedule that knows its peak.

  Attributes:
    peak: largest rate.
    shape: step -> rate / peak.
  """

  peak: float
  shape: Shape

  def __call__(self, step: Any) -> Float[Array, ""]:
    return self.peak * self.shape(step)


def peak(learning_rate: float | optax.Schedule) -> float:
  """The largest rate of a number or a `Schedule`.

  Raises:
    ValueError: another kind of function, or a peak that is not positive.
  """
  value = getattr(learning_rate, "peak", learning_rate)
  if callable(value):
    raise ValueError(
      "learning_rate is a function that does not state its peak, which"
      " weight_decay_form='independent' needs; use schedules.build_schedule."
    )
  if not value > 0:
    raise ValueError(f"optim.learning_rate={value} must be positive.")
  return value


@dataclasses.dataclass(frozen=True)
class _Ramp:
  """The warm-up: multiplier min(1, (t - start) / steps)."""

  steps: int
  start: int

  @property
  def end(self) -> int:
    """First step at the peak."""
    return self.steps + self.start if self.steps else 0


def _ramp(warmup: int | float, warmup_start: int, total_steps: int) -> _Ramp:
  if isinstance(total_steps, bool) or not total_steps >= 1:
    raise ValueError(f"total_steps={total_steps} must be at least 1.")
  steps = durations.steps_of(warmup, total_steps, "optim.schedule.warmup")
  if not -steps <= warmup_start <= 0:
    raise ValueError(
      f"optim.schedule.warmup_start={warmup_start} must be between"
      f" -warmup={-steps} and 0: it is where on the ramp training begins."
    )
  return _Ramp(steps, warmup_start)


def _warmed(decay: Shape, ramp: _Ramp) -> Shape:
  """The ramp before its end, `decay` from there on."""
  if ramp.end <= 0:
    return lambda step: decay(jnp.asarray(step, jnp.float32))

  def shape(step):
    t = jnp.asarray(step, jnp.float32)
    return jnp.where(
      t < ramp.end, (t - ramp.start) / ramp.steps, decay(t)
    ).astype(jnp.float32)

  return shape


def _check_end_factor(end_factor: float) -> None:
  if not 0 <= end_factor <= 1:
    raise ValueError(
      f"optim.schedule.end_factor={end_factor} must be in [0, 1]: the last"
      " rate over the peak."
    )


def _falling(
  curve: Callable[[Array], Array],
  start: int,
  end: int,
  end_factor: float,
) -> Shape:
  """From 1 at `start` to `end_factor` at `end`, constant outside.

  `curve` maps progress in [0, 1] to a height that falls from 1 to 0.
  """
  _check_end_factor(end_factor)

  def shape(t):
    progress = jnp.clip((t - start) / max(end - start, 1), 0.0, 1.0)
    return end_factor + (1 - end_factor) * curve(progress)

  return shape


def _power(power: float) -> Callable[[Array], Array]:
  if not power > 0:
    raise ValueError(f"optim.schedule.power={power} must be positive.")
  if power == 1:
    return lambda progress: 1 - progress
  return lambda progress: (1 - progress) ** power


def polynomial(
  learning_rate: float,
  total_steps: int,
  *,
  power: float = 1.0,
  warmup: int | float = 0,
  warmup_start: int = 0,
  end_factor: float = 0.0,
) -> Schedule:
  """peak (1 - progress)^power from the end of warm-up; continuous.

  Args:
    learning_rate: the peak.
    total_steps: length of the phase; the rate stays put afterwards.
    power: 1 in the LAMB paper, 0.5 in NVIDIA-derived scripts.
    warmup: length of the ramp: steps (int) or fraction of `total_steps`
      (float); in a config also `dict(tokens=n)`.
    warmup_start: s <= 0; the ramp is (t - s) / warmup, so training begins at
      |s| / warmup of the peak and reaches it at step warmup + s. The decay
      still counts steps from 0.
    end_factor: rate at `total_steps` over the peak.

  Raises:
    ValueError: an argument out of range.
  """
  ramp = _ramp(warmup, warmup_start, total_steps)
  decay = _falling(_power(power), ramp.end, total_steps, end_factor)
  return Schedule(learning_rate, _warmed(decay, ramp))


def polynomial_reference(
  learning_rate: float,
  total_steps: int,
  *,
  power: float = 1.0,
  warmup: int | float = 0,
  warmup_start: int = 0,
  end_factor: float = 0.0,
) -> Schedule:
  """peak (1 - t / total_steps)^power, drawn from step 0; see `polynomial`.

  The form of BERT's, NVIDIA's and MLPerf's codes: a drop at the end of warm-up.
  """
  ramp = _ramp(warmup, warmup_start, total_steps)
  decay = _falling(_power(power), 0, total_steps, end_factor)
  return Schedule(learning_rate, _warmed(decay, ramp))


def linear(
  learning_rate: float,
  total_steps: int,
  *,
  warmup: int | float = 0,
  warmup_start: int = 0,
  end_factor: float = 0.0,
) -> Schedule:
  """Linear warm-up, linear decay, continuous; see `polynomial`."""
  return polynomial(
    learning_rate,
    total_steps,
    warmup=warmup,
    warmup_start=warmup_start,
    end_factor=end_factor,
  )


def linear_reference(
  learning_rate: float,
  total_steps: int,
  *,
  warmup: int | float = 0,
  warmup_start: int = 0,
  end_factor: float = 0.0,
) -> Schedule:
  """BERT's own: peak t / warmup, then peak (1 - t / total_steps).

  Reference: Devlin et al. 2018, arXiv:1810.04805, A.2 and their code.
  """
  return polynomial_reference(
    learning_rate,
    total_steps,
    warmup=warmup,
    warmup_start=warmup_start,
    end_factor=end_factor,
  )


def cosine(
  learning_rate: float,
  total_steps: int,
  *,
  warmup: int | float = 0,
  warmup_start: int = 0,
  end_factor: float = 0.0,
) -> Schedule:
  """Half a cosine from the end of warm-up; see `polynomial`.

  Reference: Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5.
  """
  ramp = _ramp(warmup, warmup_start, total_steps)
  decay = _falling(
    lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    ramp.end,
    total_steps,
    end_factor,
  )
  return Schedule(learning_rate, _warmed(decay, ramp))


def constant(
  learning_rate: float,
  total_steps: int,
  *,
  warmup: int | float = 0,
  warmup_start: int = 0,
) -> Schedule:
  """The peak, after warm-up; see `polynomial`."""
  ramp = _ramp(warmup, warmup_start, total_steps)
  return Schedule(learning_rate, _warmed(jnp.ones_like, ramp))


def inverse_sqrt(
  learning_rate: float,
  total_steps: int,
  *,
  warmup: int | float = 0,
  warmup_start: int = 0,
) -> Schedule:
  """peak sqrt(w / max(t, w)), w the end of warm-up (at least 1).

  Reference: Vaswani et al. 2017, arXiv:1706.03762, eq. 3, rescaled to its peak.
  """
  ramp = _ramp(warmup, warmup_start, total_steps)
  timescale = float(max(ramp.end, 1))
  return Schedule(
    learning_rate,
    _warmed(lambda t: jnp.sqrt(timescale / jnp.maximum(t, timescale)), ramp),
  )


def staircase(
  learning_rate: float,
  total_steps: int,
  *,
  every: int | float = 520,
  factor: float = 0.99,
  warmup: int | float = 0,
  warmup_start: int = 0,
) -> Schedule:
  """peak factor^floor((t - w) / every), w the end of warm-up, until the end.

  Args:
    learning_rate: the peak.
    total_steps: of the phase.
    every: length of a stair, steps (int) or fraction of all (float).
    factor: of one stair over the one before, in (0, 1].
    warmup: see `polynomial`.
    warmup_start: see `polynomial`.

  Raises:
    ValueError: an argument out of range.

  Reference: Tang et al. 2021, arXiv:2102.02888, section 7.1.
  """
  length = every
  if isinstance(every, float):
    length = durations.steps_of(every, total_steps, "optim.schedule.every")
  if not length >= 1:
    raise ValueError(f"optim.schedule.every={every} must be at least one step.")
  if not 0 < factor <= 1:
    raise ValueError(f"optim.schedule.factor={factor} must be in (0, 1].")
  ramp = _ramp(warmup, warmup_start, total_steps)

  def stairs(t):
    t = jnp.clip(t - ramp.end, 0.0, max(total_steps - ramp.end, 0))
    return factor ** jnp.floor(t / length)

  return Schedule(learning_rate, _warmed(stairs, ramp))


def trapezoid(
  learning_rate: float,
  total_steps: int,
  *,
  decay: int | float = 0.1,
  warmup: int | float = 0,
  warmup_start: int = 0,
  end_factor: float = 0.0,
) -> Schedule:
  """Warm-up, plateau, then 1 - sqrt(progress) over the last `decay` steps.

  Args:
    learning_rate: the peak and plateau; see `polynomial` for the rest.
    total_steps: length of the phase.
    decay: length of the final decay: steps (int) or fraction (float).
    warmup: length of the ramp.
    warmup_start: where on the ramp training begins.
    end_factor: rate at `total_steps` over the peak.

  Raises:
    ValueError: warm-up and decay overlap, or an argument out of range.

  Reference: Haegele et al. 2024, arXiv:2405.18392 (cooldown, "1-sqrt").
  """
  ramp = _ramp(warmup, warmup_start, total_steps)
  length = durations.steps_of(decay, total_steps, "optim.schedule.decay")
  if ramp.end + length > total_steps:
    raise ValueError(
      f"optim.schedule: warm-up of {ramp.end} steps and decay of {length} do"
      f" not fit in {total_steps}; shorten one."
    )
  falling = _falling(
    lambda progress: 1 - jnp.sqrt(progress),
    total_steps - length,
    total_steps,
    end_factor,
  )
  shape = falling if length else jnp.ones_like
  return Schedule(learning_rate, _warmed(shape, ramp))


def two_phase(
  learning_rate: float,
  total_steps: int,
  *,
  phases: Sequence[Mapping[str, Any]],
) -> Schedule:
  """Schedules one after the other, each with its own counter and warm-up.

  LAMB's mixed-batch run: phase 2 warms up again from zero. Warm-up fractions
  are of the phase, not of the run. Only the schedule restarts; the optimizer's
  moments and debiasing counter do not notice.

  Args:
    learning_rate: peak of the phases that do not give one.
    total_steps: length of all phases.
    phases: specs of schedules, each with `steps` (int, or float for a fraction
      of `total_steps`; the last phase may leave it out and takes what remains)
      and optionally `learning_rate`.

  Raises:
    ValueError: the phases do not add up to `total_steps`, or one is wrong.

  Reference: You et al. 2020, arXiv:1904.00962, section 4.1 ("mixed-batch").
  """
  field = "optim.schedule.phases"
  if not phases:
    raise ValueError(f"{field} is empty; give a list of schedules.")
  schedules, starts, start = [], [], 0
  for i, phase in enumerate(phases):
    spec = dict(phase)
    rate = spec.pop("learning_rate", learning_rate)
    steps = spec.pop("steps", None)
    if steps is None and i + 1 < len(phases):
      raise ValueError(
        f"{field}[{i}].steps is required; only the last phase may leave it out."
      )
    steps = (
      total_steps - start
      if steps is None
      else durations.steps_of(steps, total_steps, f"{field}[{i}].steps")
    )
    if steps < 1:
      raise ValueError(
        f"{field}[{i}] has {steps} steps; every phase needs at least one of"
        f" the {total_steps}."
      )
    schedules.append(
      build_schedule(
        spec,
        learning_rate=rate,
        total_steps=steps,
        field=f"{field}[{i}]",
      )
    )
    starts.append(start)
    start += steps
  if start != total_steps:
    raise ValueError(
      f"{field} have {start} steps together but total_steps={total_steps};"
      " correct one of them, or leave out the last phase's steps."
    )
  highest = max(schedule.peak for schedule in schedules)

  def shape(step):
    step = jnp.asarray(step, jnp.int32)
    value = schedules[0](step)
    for schedule, begin in zip(schedules[1:], starts[1:]):
      value = jnp.where(step < begin, value, schedule(step - begin))
    return value / highest

  return Schedule(highest, shape)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
  "constant": constant,
  "cosine": cosine,
  "inverse_sqrt": inverse_sqrt,
  "linear": linear,
  "linear_reference": linear_reference,
  "polynomial": polynomial,
  "polynomial_reference": polynomial_reference,
  "staircase": staircase,
  "trapezoid": trapezoid,
  "two_phase": two_phase,
}


def build_schedule(
  spec: Mapping[str, Any],
  *,
  learning_rate: float,
  total_steps: int,
  tokens_per_step: int | float | None = None,
  field: str = "optim.schedule",
) -> Schedule:
  """The schedule that a config's sub-dict names.

  Args:
    spec: `name` and the arguments of a row of `SCHEDULES`; any length in it may
      be `dict(tokens=n)`.
    learning_rate: the peak.
    total_steps: steps of the phase.
    tokens_per_step: tokens of a global batch, padding included.
    field: the config field that holds `spec`, for messages.

  Raises:
    ValueError: unknown name or option, or a value out of range.
  """
  peak(learning_rate)
  return registry.build(
    SCHEDULES,
    durations.in_steps(spec, tokens_per_step, field),
    field,
    learning_rate=learning_rate,
    total_steps=total_steps,
  )


def square_root_scaling(
  batch_size: int,
  *,
  batch_size_ref: int = 32_768,
  learning_rate_ref: float = 5e-3,
  warmup_ref: float = 0.2,
) -> tuple[float, float]:
  """Learning rate and warm-up fraction for a batch size.

      lr = lr_ref sqrt(b / b_ref),   warmup = warmup_ref b / b_ref

  The defaults are the LAMB paper's BERT-large table: 5e-3 and 1/5 at 32k down
  to 5e-3 / 8 and 1/320 at 512. So warm-up lasts a constant number of examples.

  Raises:
    ValueError: the batch is so large that warm-up would fill the run.

  Reference: You et al. 2020, arXiv:1904.00962, table 4.
  """
  scale = batch_size / batch_size_ref
  if not 0 < warmup_ref * scale < 1:
    raise ValueError(
      f"batch_size={batch_size} scales the warm-up to {warmup_ref * scale:g}"
      " of the run; it must stay between 0 and 1."
    )
  return learning_rate_ref * math.sqrt(scale), warmup_ref * scale
