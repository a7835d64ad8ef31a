"""Sizes and times as a reader wants them."""

import math


def digits(value: float) -> str:
  """Three significant digits, never an exponent: "0.0341", "3.41", "34,100"."""
  if not value:
    return "0"
  decimals = 2 - math.floor(math.log10(abs(value)))
  rounded = round(value, decimals)
  # Rounding may have gained a place: 9.996 is 10.0.
  decimals = 2 - math.floor(math.log10(abs(rounded)))
  return f"{rounded:,.{max(0, decimals)}f}"


def size(count: float) -> str:
  """Bytes, as "12.08 MiB"."""
  names = "TiB", "GiB", "MiB", "KiB"
  for unit, name in zip((2**40, 2**30, 2**20, 2**10), names):
    if count >= unit:
      return f"{count / unit:.2f} {name}"
  return f"{count:.0f} B"


def duration(seconds: float) -> str:
  """Seconds of a step, as "3.41 ms"."""
  for unit, name in ((1, "s"), (1e-3, "ms")):
    if seconds >= 0.9995 * unit:
      return f"{digits(seconds / unit)} {name}"
  return f"{digits(seconds / 1e-6)} us"


def span(seconds: float) -> str:
  """Seconds of a run, as "2.70 hours"."""
  if seconds < 1:
    return duration(seconds)
  for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
    if seconds >= 2 * unit:
      return f"{digits(seconds / unit)} {name}"
  return f"{digits(seconds)} seconds"


def plural(count: int, noun: str) -> str:
  """As "1 chip" or "256 chips"."""
  return f"{count:,} {noun}{'' if count == 1 else 's'}"
