"""When a run ends: rows of `STOP_RULES`, keys of `config.stop`."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from bertjax import fields, registry
from bertjax.parallel import agreement

# Evaluations in the order of their steps: (step, values by name).
History = Sequence[tuple[int, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Progress:
  """What a rule may look at.

  Attributes:
    step: optimizer steps taken.
    tokens_seen: real tokens, as of the last reading of the metrics.
    elapsed_s: seconds of training, counted over all resumes.
    metrics: the last training and evaluation values.
    history: all evaluations of the run.
    evals: names of the run's evaluators.
  """

  step: int
  tokens_seen: float
  elapsed_s: float
  metrics: Mapping[str, float]
  history: History = ()
  evals: Collection[str] = ()


@runtime_checkable
class StopRule(Protocol):
  """Says why to stop before the next step, or None."""

  def __call__(self, progress: Progress) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class MaxSteps:
  """After `steps` optimizer steps."""

  steps: int

  def __call__(self, progress: Progress) -> str | None:
    done = progress.step >= self.steps
    return f"{progress.step} steps are done" if done else None


@dataclasses.dataclass(frozen=True)
class MaxTokens:
  """After `tokens` real tokens."""

  tokens: float

  def __call__(self, progress: Progress) -> str | None:
    if progress.tokens_seen >= self.tokens:
      return f"{progress.tokens_seen:,.0f} tokens were seen"
    return None


@dataclasses.dataclass(frozen=True)
class MaxWallClock:
  """After `wall_clock_s` seconds."""

  wall_clock_s: float
  _alarm: agreement.Alarm = dataclasses.field(
    default_factory=agreement.Alarm, init=False, repr=False, compare=False
  )

  def __call__(self, progress: Progress) -> str | None:
    left_s = self.wall_clock_s - progress.elapsed_s
    if self._alarm(progress.step, left_s):
      return f"{progress.elapsed_s:.0f} s of {self.wall_clock_s:g} s are used"
    return None


def sign_of(mode: str, field: str) -> float:
  """1 for "max", -1 for "min".

  Raises:
    ValueError: another mode.
  """
  if mode not in ("max", "min"):
    raise ValueError(f"{field}={mode!r} must be 'max' or 'min'.")
  return 1.0 if mode == "max" else -1.0


def score(value: float, sign: float) -> float:
  """More is better, and NaN is no better than nothing.

  Args:
    value: of a metric.
    sign: of `sign_of`.
  """
  return -math.inf if math.isnan(value) else sign * value


def _evaluator(metric: str, evals: Collection[str]) -> str:
  """Whose a metric is, "" for training's: it may have a "/" of its own."""
  first, slash, _ = metric.partition("/")
  known = [name for name in evals if metric.startswith(f"{name}/")]
  return max(known, key=len, default=first if slash else "")


def check_evaluated(
  metric: str, evals: Mapping[str, Mapping[str, Any]], field: str
) -> None:
  """Raises ValueError for a metric that no evaluation in the run reports."""
  name = _evaluator(metric, evals)
  if name:
    spec = registry.lookup(evals, name, f"{field}: evals")
    if not spec.get("every"):
      raise ValueError(
        f"evals.{name}.every must be set: {field}={metric!r} waits for"
        " evaluations during the run."
      )


def refuse_unreported(
  metric: str,
  metrics: Mapping[str, float],
  evals: Collection[str],
  field: str,
) -> None:
  """Raises ValueError for a name that its evaluator, having run, lacks."""
  own = _evaluator(metric, evals)
  known = [name for name in metrics if _evaluator(name, evals) == own]
  if known and metric not in metrics:
    raise ValueError(
      f"{field}={metric!r} is not reported; choose from"
      f" {', '.join(sorted(known))}."
    )


@dataclasses.dataclass(frozen=True)
class Target:
  """Once `metric` reaches `value`, from below (mode max) or above (min)."""

  metric: str
  value: float
  mode: str = "max"

  def __post_init__(self):
    sign_of(self.mode, "stop.target.mode")

  def __call__(self, progress: Progress) -> str | None:
    found = progress.metrics.get(self.metric)
    if found is None:
      refuse_unreported(
        self.metric, progress.metrics, progress.evals, "stop.target.metric"
      )
      return None
    sign = sign_of(self.mode, "stop.target.mode")
    if sign * found >= sign * self.value:
      return f"{self.metric} = {found:.4g} reached the target {self.value:g}"
    return None


@dataclasses.dataclass(frozen=True)
class Early:
  """Once `patience` evaluations in a row have not improved `metric`.

  Attributes:
    metric: of an evaluation, such as "dev/accuracy".
    patience: evaluations without improvement that are borne.
    min_delta: what counts as one is better by more than this.
    mode: whether more ("max") or less ("min") is better.
  """

  metric: str
  patience: int
  min_delta: float = 0.0
  mode: str = "max"

  def __post_init__(self):
    sign_of(self.mode, "stop.early.mode")
    if "/" not in self.metric:
      raise ValueError(
        f"stop.early.metric={self.metric!r} must be of an evaluation, such as"
        " 'dev/accuracy'."
      )

  def __call__(self, progress: Progress) -> str | None:
    sign = sign_of(self.mode, "stop.early.mode")
    best, at, since = -math.inf, None, 0
    refuse_unreported(
      self.metric, progress.metrics, progress.evals, "stop.early.metric"
    )
    for step, values in progress.history:
      if self.metric not in values:
        continue
      value = score(values[self.metric], sign)
      if value > best + self.min_delta:
        best, at, since = value, step, 0
      else:
        since += 1
    if since < self.patience:
      return None
    if at is None:
      return f"{self.metric} was no number in {since} evaluations"
    return (
      f"{self.metric} did not improve in {since} evaluations on the"
      f" {sign * best:.4g} of step {at}"
    )


def _row(rule: Callable[..., StopRule], field: str) -> Callable[..., StopRule]:
  return lambda spec: registry.call(rule, dict(spec), field)


STOP_RULES: dict[str, Callable[[Any], StopRule]] = {
  "steps": MaxSteps,
  "tokens": MaxTokens,
  "wall_clock_s": MaxWallClock,
  "target": _row(Target, "stop.target"),
  "early": _row(Early, "stop.early"),
}
UNSURE = ("target", "early")  # wait for a metric; may never be


@dataclasses.dataclass(frozen=True)
class StopRules:
  """The reason of the first rule that has one.

  Attributes:
    rules: in this order.
    evals: names of the run's evaluators.
  """

  rules: Sequence[StopRule]
  evals: Collection[str] = ()

  def __call__(
    self,
    step: int,
    tokens_seen: float,
    elapsed_s: float,
    metrics: Mapping[str, float],
    history: History = (),
  ) -> str | None:
    progress = Progress(
      step, tokens_seen, elapsed_s, metrics, history, self.evals
    )
    for rule in self.rules:
      if reason := rule(progress):
        return reason
    return None


def build_stop(
  spec: Mapping[str, Any],
  evals: Mapping[str, Mapping[str, Any]] | None = None,
) -> StopRules:
  """Rules from a config, `dict(steps=900, target=dict(metric=..., value=...))`.

  Args:
    spec: keys of `STOP_RULES`; None switches a rule off.
    evals: the config's evaluators, one of which reports the metric of a target
      or of early stopping.

  Raises:
    ValueError: an unknown rule, a value out of range, a metric that nothing
      reports, or no rule that is sure to end the run (a target may never be
      reached).
  """
  fields.check({"stop": spec})
  built = {
    name: registry.lookup(STOP_RULES, name, "stop")(value)
    for name, value in dict(spec).items()
    if value is not None
  }
  if not set(built) - set(UNSURE):
    raise ValueError(
      "stop has no rule that is sure to end the run; set stop.steps,"
      " stop.tokens or stop.wall_clock_s."
    )
  if evals is not None:
    for name in UNSURE:
      if name in built:
        check_evaluated(built[name].metric, evals, f"stop.{name}.metric")
  return StopRules(tuple(built.values()), tuple(evals or ()))
