"""Lengths of a schedule's parts: steps, fractions of the phase, tokens."""

import math
from typing import Any


def steps_of(amount: int | float, total_steps: int, field: str) -> int:
  """Steps that `amount` means: an int is steps, a float a fraction.

  A positive fraction is rounded to the nearest step and is at least one.

  Raises:
    ValueError: negative, a float of 1 or more, or more than `total_steps`.
  """
  if isinstance(amount, bool) or not isinstance(amount, int | float):
    raise ValueError(
      f"{field}={amount!r} must be a number of steps (int), a fraction of them"
      " (float below 1) or dict(tokens=...)."
    )
  if isinstance(amount, float):
    if not 0 <= amount < 1:
      raise ValueError(
        f"{field}={amount} is a float, hence a fraction, and must be in"
        " [0, 1); write an int for a number of steps."
      )
    return max(1, round(amount * total_steps)) if amount else 0
  if not 0 <= amount <= total_steps:
    raise ValueError(
      f"{field}={amount} must be between 0 and the {total_steps} steps of the"
      " phase."
    )
  return amount


def in_steps(spec: Any, tokens_per_step: int | float | None, field: str) -> Any:
  """A spec with every `dict(tokens=n)` in it replaced by a number of steps.

  Rounded to the nearest step, at least one. Tokens are the slots of a batch,
  padding included: that is known beforehand, and recipes that give a warm-up in
  tokens count so.

  Args:
    spec: nested mappings and sequences of plain values.
    tokens_per_step: slots of a global batch; None if nobody knows.
    field: the config field that holds `spec`, for messages.

  Raises:
    ValueError: tokens that are not a positive number, or no `tokens_per_step`.
  """
  if isinstance(spec, list | tuple):
    return [
      in_steps(value, tokens_per_step, f"{field}[{i}]")
      for i, value in enumerate(spec)
    ]
  if not hasattr(spec, "items"):
    return spec
  if set(spec.keys()) == {"tokens"}:
    return _steps_of_tokens(spec["tokens"], tokens_per_step, f"{field}.tokens")
  return {
    key: in_steps(value, tokens_per_step, f"{field}.{key}")
    for key, value in spec.items()
  }


def _steps_of_tokens(
  tokens: Any, tokens_per_step: int | float | None, field: str
) -> int:
  number = isinstance(tokens, int | float) and not isinstance(tokens, bool)
  if not (number and tokens > 0 and math.isfinite(tokens)):
    raise ValueError(f"{field}={tokens!r} must be a positive number of tokens.")
  if tokens_per_step is None:
    raise ValueError(
      f"{field}={tokens} needs tokens_per_step, the tokens of a batch; give it,"
      " or write a number of steps."
    )
  return max(1, round(tokens / tokens_per_step))
