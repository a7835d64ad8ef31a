"""Sizes and times as a reader wants them."""


def size(count: float) -> str:
  """Bytes, as "12.08 MiB"."""
  for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
    if count >= unit:
      return f"{count / unit:.2f} {name}"
  return f"{count:.0f} B"


def duration(seconds: float) -> str:
  """Seconds, as "3.41 ms"."""
  return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
