"""Whether a run looks healthy: its data and its curves against what to expect.

A stuck run looks like a slow run; these checks tell them apart. Where the
expected range follows from how the numbers arise, it is computed; the others
are judgements, each a named constant with its reason.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Table = Mapping[str, Sequence[float]]

# A share of n draws lies within four standard deviations of its expectation in
# all but one of 16,000 runs.
_SIGMAS = 4
# Units of whole words or spans are left out where they would overshoot, so
# rows may stay this far below the rate.
_UNITS_FILL = 0.8
# The noise of a gradient goes with one over the root of its labels: below a
# fifth of the mean a batch is more than twice as noisy as the others.
_LEAST_LABELS = 0.2
# Examples that teach nothing, or half of what they hold.
_MOST_WASTED = {
  "duplicate_share": ("duplicates", 0.05),
  "truncated_share": ("rows that were cut", 0.1),
  "unlabelled_share": ("rows without label", 0.05),
}
# Of even guessing. Below: the first row is a mean over its log interval, in
# which the loss falls, to that of guessing by frequency at the best. Above: an
# untrained head adds half the variance of its logits, e 0.02^2 / 2 in BERT, or
# 0.2 of 10.3 at e = 1024, and a pair objective ln 2.
_FIRST_LOSS = (0.6, 1.1)
# Rows of the curve that are enough to speak of its last third.
_LEAST_ROWS = 6
# A norm that varies so much comes with spikes of the loss, and clipping that
# acts on all but a few steps makes the norm's limit the learning rate.
_LARGEST_NORM = 100
_MOST_CLIPPED = 0.95
# Slower rows than this wait for data, or share the machine.
_SLOWEST_ROW = 1 / 3
# Allowed relative distance of a loss from a reference curve. Seeds differ
# least where the curve is flat and most where it falls steeply; a wrong rate,
# mask or corpus stays outside for good.
REFERENCE_TOLERANCE = 0.15


@dataclasses.dataclass(frozen=True)
class Check:
  """One line of the health section.

  Attributes:
    name: what was looked at.
    value: what was found, as text.
    expected: the range, as text.
    ok: whether the value is inside.
  """

  name: str
  value: str
  expected: str
  ok: bool


def _between(
  name: str, value: float, low: float, high: float, form: str = ".3g"
) -> Check:
  if math.isinf(high):
    expected = f"at least {low:{form}}"
  elif math.isinf(low):
    expected = f"at most {high:{form}}"
  else:
    expected = f"{low:{form}} to {high:{form}}"
  return Check(name, f"{value:{form}}", expected, low <= value <= high)


def data_checks(health: Mapping[str, Any]) -> list[Check]:
  """Checks of the data audit; a key that is absent gives no line.

  Args:
    health: any of `masking_rate` with `expected_masking_rate`, `masking_unit`
      and `row_tokens` (real tokens of a row, on average); `mask_share`,
      `random_share`, `keep_share` with `expected_` twins; `selected` (how many
      positions were counted); `duplicate_share`; `label_weight_min` and
      `label_weight_mean` per batch; of a task `class_shares` by label,
      `truncated_share` and `unlabelled_share`.
  """
  checks = _share_checks(health)
  if "masking_rate" in health:
    checks.append(_rate_check(health))
  for name, default in (("mask", 0.8), ("random", 0.1), ("keep", 0.1)):
    if f"{name}_share" in health:
      share = health.get(f"expected_{name}_share", default)
      count = max(health.get("selected", 1000), 1)
      band = _SIGMAS * math.sqrt(share * (1 - share) / count)
      checks.append(
        _between(
          f"share of {name} among the chosen",
          health[f"{name}_share"],
          max(share - band, 0),
          min(share + band, 1),
        )
      )
  if "label_weight_min" in health:
    mean = health.get("label_weight_mean", health["label_weight_min"])
    checks.append(
      _between(
        "least label weight of a batch",
        health["label_weight_min"],
        max(1.0, _LEAST_LABELS * mean),
        math.inf,
        ".4g",
      )
    )
  return checks


def _rate_check(health: Mapping[str, Any]) -> Check:
  """A row's count is rounded and at least one: off by less than one token."""
  rate = health.get("expected_masking_rate", 0.15)
  slack = 1 / health["row_tokens"] if "row_tokens" in health else 0.1 * rate
  low, high = rate - slack, rate + slack
  if health.get("masking_unit") != "token":
    low = min(low, _UNITS_FILL * rate)
  return _between("masking rate", health["masking_rate"], max(low, 0), high)


def _share_checks(health: Mapping[str, Any]) -> list[Check]:
  """Of examples that are worth little, and of the classes."""
  checks = [
    _between(name, health[key], -math.inf, most, ".1%")
    for key, (name, most) in _MOST_WASTED.items()
    if key in health
  ]
  if shares := health.get("class_shares"):
    shown = sorted(shares.items(), key=lambda item: -item[1])
    value = ", ".join(f"{label} {share:.1%}" for label, share in shown[:5])
    if len(shown) > 5:
      label, share = shown[-1]
      value += f", ... {label} {share:.1%}"
    ok = all(share > 0 for share in shares.values())
    checks.append(Check("class shares", value, "each above 0", ok))
  return checks


def curve_checks(
  table: Table,
  *,
  initial_loss: float | None = None,
  pretrained: bool = False,
  clip_norm: float | None = None,
  reference: Table | None = None,
  tolerance: float = REFERENCE_TOLERANCE,
) -> list[Check]:
  """Checks of what the run wrote.

  Args:
    table: columns of `metrics.csv`.
    initial_loss: what guessing evenly gives, the loss of an untrained model.
    pretrained: the run starts from a trained model, so maybe far below it.
    clip_norm: gradients above it were clipped.
    reference: `step` and `loss` of a run known to be good.
    tolerance: allowed relative distance from the reference.
  """
  step, loss = column(table, "loss")
  checks = _loss_checks(step, loss, initial_loss, pretrained)
  checks += _gradient_checks(column(table, "grad_norm")[1], clip_norm)
  if reference is not None and len(loss):
    checks.append(_reference_check(step, loss, reference, tolerance))
  _, rate = column(table, "tokens_per_s")
  if len(rate):
    checks.append(
      Check(
        "tokens/s, median",
        f"{float(np.median(rate)):,.0f}",
        "slowest row above a third of it",
        bool(np.min(rate) > np.median(rate) * _SLOWEST_ROW),
      )
    )
  return checks


def _loss_checks(
  step: np.ndarray,
  loss: np.ndarray,
  initial_loss: float | None,
  pretrained: bool,
) -> list[Check]:
  checks = []
  if initial_loss and len(loss):
    low, high = (factor * initial_loss for factor in _FIRST_LOSS)
    low = -math.inf if pretrained else low
    checks.append(
      _between("first loss (even guessing)", loss[0], low, high, ".2f")
    )
  if len(loss) >= _LEAST_ROWS:
    last = slice(len(loss) - len(loss) // 3, None)
    slope = float(np.polyfit(step[last], loss[last], 1)[0]) * 1000
    checks.append(
      Check(
        "loss slope, last third, per 1000 steps",
        f"{slope:.3g}",
        "below 0",
        slope < 0,
      )
    )
  return checks


def _gradient_checks(norm: np.ndarray, clip_norm: float | None) -> list[Check]:
  if not len(norm):
    return []
  median, largest = float(np.median(norm)), float(np.max(norm))
  checks = [
    Check(
      "gradient norm, median",
      f"{median:.3g}",
      "above 0",
      0 < median < math.inf,
    ),
    _between("gradient norm, largest", largest, 0, _LARGEST_NORM * median),
  ]
  if clip_norm:
    clipped = float(np.mean(norm > clip_norm))
    checks.append(
      Check(
        f"share of logged rows with the norm above {clip_norm:g}",
        f"{clipped:.0%}",
        f"below {_MOST_CLIPPED:.0%}",
        clipped < _MOST_CLIPPED,
      )
    )
  return checks


def _reference_check(
  step: np.ndarray, loss: np.ndarray, reference: Table, tolerance: float
) -> Check:
  known_step, known = column(reference, "loss")
  name, expected = "loss against the reference", f"within {tolerance:.0%}"
  if not len(known):
    raise ValueError("reference: the curve has no finite loss.")
  inside = (step >= known_step[0]) & (step <= known_step[-1])
  if not inside.any():
    return Check(name, "no common steps", expected, False)
  wanted = np.interp(step[inside], known_step, known)
  gap = loss[inside] / wanted - 1
  worst = int(np.argmax(np.abs(gap)))
  return Check(
    name,
    f"{gap[worst]:+.1%} at step {int(step[inside][worst])}",
    expected,
    bool(abs(gap[worst]) <= tolerance),
  )


def column(table: Table, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values where the column has a finite value."""
  if name not in table:
    return np.zeros(0), np.zeros(0)
  step = np.asarray(table["step"], float)
  values = np.asarray(table[name], float)
  finite = np.isfinite(values)
  return step[finite], values[finite]
